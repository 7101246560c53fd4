"""Gradient flow: the norm of the gradient at each time step, and which gates are saturated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn.autograd import apply_layer
from fastrnn.capture import is_capturing
from fastrnn.cells import State
from fastrnn.dispatch import load_layer_backend, resolve_backend
from fastrnn.functional import run_stack, stack_sizes
from fastrnn.layer import Layer, rows_of
from fastrnn.modules import RNNBase

__all__ = ["GradientFlow", "gradient_flow"]

_SATURATED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda gate: (gate - 0.5).abs() > 0.4,
    "tanh": lambda gate: gate.abs() > 0.9,
    "relu": lambda gate: gate <= 0,
}


@dataclass(frozen=True)
class GradientFlow:
    """The result of :func:`gradient_flow` by layer, direction and time step: ``[L, D, T]`` each.

    Attributes:
        gradient: for each state, by name, the norm over the batch and all units of the gradient of
            the loss with respect to the state that the step passes on. The part that reaches c
            through the same step's h counts for h.
        saturation: for each gate, by name, the share of the batch's units that are saturated: a
            sigmoid below 0.1 or above 0.9, a tanh below -0.9 or above 0.9, a relu at zero. For an
            RNN it is the share of h.
    """

    gradient: dict[str, Tensor]
    saturation: dict[str, Tensor]

    def plot(self) -> Any:
        """A matplotlib figure: gradients on a logarithmic scale, and saturation below."""
        from matplotlib import pyplot as plt
        from matplotlib.lines import Line2D

        figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
        L, D, T = next(iter(self.gradient.values())).shape
        styles: dict[str, dict[str, Any]] = {
            f"layer {k}" + ", reverse" * d: {"ls": ("-", "--")[d], "alpha": (k + 1) / L}
            for k in range(L)
            for d in range(D)
        }
        handles = [Line2D([], [], color="black", label=n, **style) for n, style in styles.items()]
        for ax, values in zip(axes, (self.gradient, self.saturation), strict=True):
            colors = {name: f"C{k}" for k, name in enumerate(values)}
            for name, color in colors.items():
                curves = values[name].flatten(0, 1).cpu()
                for curve, style in zip(curves, styles.values(), strict=True):
                    ax.plot(range(T), curve, color=color, **style)
            names = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
            lines = handles if len(handles) > 1 and ax is axes[0] else []
            ax.legend(handles=names + lines, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
            ax.grid(alpha=0.3)
        axes[0].set_yscale("log", nonpositive="mask")
        axes[0].set_ylabel("norm of the gradient")
        axes[1].set_ylabel("share saturated")
        axes[1].set_ylim(-0.02, 1.02)
        axes[1].set_xlabel("time step")
        return figure


def gradient_flow(
    module: RNNBase,
    input: Tensor,
    hx: Any = None,
    *,
    loss: Callable[[Tensor, State], Tensor] | None = None,
) -> GradientFlow:
    r"""Measure the gradient of a loss at each time step, by one backward pass.

    Each layer gets additional inputs of zero, one for each pre-activation, so that the fused
    backward pass computes the gradients of the pre-activations. One product with W_hh for all
    steps, and the cell's own elementwise path, then give

    .. math:: \lVert \partial L / \partial h_t \rVert, \lVert \partial L / \partial c_t \rVert

    Args:
        module: an :class:`~fastrnn.RNN`, :class:`~fastrnn.LSTM` or :class:`~fastrnn.GRU`.
        input, hx: as ``module`` takes them, without packing. Where the module would run on torch's
            own operators, the reference is measured.
        loss: a function of the output and the final states, both as ``module`` returns them, but
            the states always as a tuple. By default the sum of the last layer's h_n: the gradient
            of each direction then begins at its last step.

    Raises:
        TypeError, ValueError, RuntimeError: as ``module`` itself, and for other modules.

    >>> import torch, fastrnn
    >>> flow = fastrnn.diagnostics.gradient_flow(fastrnn.LSTM(3, 4), torch.randn(50, 2, 3))
    >>> flow.gradient["c"].shape, sorted(flow.saturation)
    (torch.Size([1, 1, 50]), ['f', 'g', 'i', 'o'])
    """
    if not isinstance(module, RNNBase):
        got = type(module).__name__
        raise TypeError(f"expected a fastrnn layer (fastrnn.convert makes one), got {got}")
    if not isinstance(input, Tensor):
        raise TypeError(f"expected a Tensor, got {type(input).__name__}")
    with torch.no_grad():
        module(input, hx)  # which checks both
    cell, weights, dim = module._cell, module._weights(), input.dim()
    state = None if hx is None else module._check_rank(cell, hx, dim)
    x = module._time_major(input)
    rows = rows_of(x)
    layers = [Layer(cell, rows, directions, None) for directions in weights]
    measured: list[_MeasuredLayer] = []

    def run_layer(layer: Layer, x: Tensor) -> tuple[Tensor, State]:
        measured.append(_MeasuredLayer(layer, x.contiguous()))
        return measured[-1].out, measured[-1].final

    with torch.enable_grad():
        initial = None if state is None else tuple(s.detach() for s in state)
        dropout = module.dropout if module.training else 0.0
        output, final = run_stack(run_layer, layers, x, initial, dropout)
        if dim == 2:
            output, final = output.squeeze(1), tuple(s.squeeze(1) for s in final)
        elif module.batch_first:
            output = output.transpose(0, 1)
        D = 1 + bool(module.bidirectional)
        value = final[0][-D:].sum() if loss is None else loss(output, final)
        inputs = [t for layer in measured for t in layer.inputs]
        grads = iter(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))
    gradient: dict[str, list[Tensor]] = {name: [] for name in cell.states}
    saturation: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for layer in measured:
            own = [next(grads) for _ in layer.inputs]
            for d in range(D):
                for name, norm in layer.gradients(d, own).items():
                    gradient[name].append(norm)
                for name, share in layer.saturation(d).items():
                    saturation.setdefault(name, []).append(share)

    def stacked(values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {n: torch.stack(v).unflatten(0, (len(weights), D)) for n, v in values.items() if v}

    return GradientFlow(stacked(gradient), stacked(saturation))


class _MeasuredLayer:
    """A layer's forward pass with an additional input of zero for each pre-activation.

    Attributes:
        inputs: the tensors whose gradients :meth:`gradients` takes: those zeros, the output, and
            the final states.
    """

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self.layer = layer
        cell, D, gate_size = layer.cell, layer.D, layer.G * layer.H
        zeros = x.new_zeros(*x.shape[:2], D * gate_size, requires_grad=True)
        one = torch.eye(gate_size, dtype=x.dtype, device=x.device)
        widened = []
        for d, w in enumerate(layer.weights):
            blocks = [one if d == k else torch.zeros_like(one) for k in range(D)]
            widened.append(w._replace(ih=torch.cat([w.ih, *blocks], 1)))
        sizes = stack_sizes((layer,), x)
        backend = resolve_backend(cell, x.dtype, x.device, sizes, None)
        if backend.kind == "stack":
            backend = load_layer_backend("reference")
        self.out, self.final = apply_layer(
            backend,
            Layer(cell, layer.rows, widened, layer.state),
            torch.cat([x, zeros], 2),
            is_capturing(),
        )
        self.inputs = [zeros, self.out, *self.final]
        with torch.no_grad():
            _, _, saved = backend.forward(layer, x.detach(), save=True)
        assert saved is not None
        # [D, T, B, num_saved, H]
        self.saved = saved[..., : layer.H].unflatten(1, (layer.rows.T, layer.rows.B))

    def _h(self, d: int) -> Tensor:
        P = self.layer.P
        return self.out[:, :, d * P : (d + 1) * P].detach()

    def gradients(self, d: int, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """The norm of the loss's gradient at each state after each step of direction d."""
        layer, cell, states = self.layer, self.layer.cell, len(self.layer.cell.states)
        T, G, H, P, summed = layer.rows.T, layer.G, layer.H, layer.P, layer.cell.summed
        dzeros, dout, *dfinal = grads
        w = layer.weights[d]
        h = self._h(d)
        first = torch.zeros_like(h[:1]) if layer.state is None else layer.state[0][d : d + 1]
        h_before = torch.cat([first, h[:-1]]) if d == 0 else torch.cat([h[1:], first])
        values = self.saved[d].unbind(2)
        v, s = values[: len(cell.saved)], (h_before, *values[len(cell.saved) :][: states - 1])

        # The cell's backward function is linear in dy: its results for unit vectors define it.
        zero = torch.zeros_like(values[0] if values else h)
        one = torch.ones_like(zero)
        preacts, direct = [], []
        for k in range(states):
            dpre, ds = cell.backward(v, s, h, [one if j == k else zero for j in range(states)])
            preacts.append(dpre)
            direct.append([zero if each is None else each for each in ds])
        dgx = dzeros.unflatten(2, (-1, G, H))[:, :, d].unbind(2)
        dgh = list(dgx[:summed])
        for k in range(summed, G):
            # The two parts of such a gate only enter the cell together, so that the gradient of the
            # h part is that of the x part times a factor.
            x_part, h_part = preacts[0][k], preacts[0][k + G - summed]
            dgh.append(dgx[k] * (h_part / x_part).nan_to_num(0.0, 0.0, 0.0))
        through_product = torch.stack(dgh, 2).flatten(2) @ w.hh  # to the h before each step

        dy = [g[d] for g in dfinal]
        norms = [dout.new_zeros(T, dtype=torch.float64) for _ in dy]
        for t in reversed(range(T)) if d == 0 else range(T):  # against the direction's order
            dy[0] = dy[0] + dout[t, :, d * P : (d + 1) * P]
            for k, g in enumerate(dy):
                norms[k][t] = g.double().norm()
            dcell = [dy[0] if w.hr is None else dy[0] @ w.hr, *dy[1:]]
            dstates = [
                torch.stack([direct[j][k][t] * dcell[j] for j in range(states)]).sum(0)
                for k in range(states)
            ]
            dh = through_product[t] if layer.projected else through_product[t] + dstates[0]
            dy = [dh, *dstates[1:]]
        return dict(zip(cell.states, norms, strict=True))

    def saturation(self, d: int) -> dict[str, Tensor]:
        """The share of saturated units at each step of direction d."""
        cell = self.layer.cell
        values = {"h": self._h(d)}
        values.update(zip(cell.saved, self.saved[d].unbind(2), strict=False))
        return {
            gate: _SATURATED[activation](values[gate]).double().mean((1, 2))
            for gate, activation in zip(cell.gates, cell.activations, strict=False)
            if gate in values
        }
