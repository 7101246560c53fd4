"""Where a layer's gradient goes: what of it reaches each time step, and which gates are stuck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.autograd import layer
from fastrnn.backends import Backend
from fastrnn.cells import Cell, State, Weights
from fastrnn.dispatch import load, pick
from fastrnn.functional import sizes_of
from fastrnn.modules import RNNBase

__all__ = ["GradientFlow", "gradient_flow"]

_SIGMOIDS = {"LSTM": ("i", "f", "o"), "GRU": ("r", "z")}
_TANHS = {"LSTM": ("g",), "GRU": ("n",), "RNN_TANH": ("h",)}


@dataclass(frozen=True)
class GradientFlow:
    """What :func:`gradient_flow` found, by layer, direction and time step: ``[L, D, T]`` each.

    Attributes:
        gradient: of each state, by name, the norm of the gradient of the loss with respect to what
            the step hands on, over the batch and all units. What reaches c by way of the same
            step's h is h's.
        saturation: of each gate, by name, the share of the batch's units at which it hardly moves:
            a sigmoid below 0.1 or above 0.9, a tanh beyond 0.9 either way, a relu at zero. A
            cell that has no gates is asked for its h.
    """

    gradient: dict[str, Tensor]
    saturation: dict[str, Tensor]

    def plot(self) -> Any:
        """A matplotlib figure: gradients on a logarithmic scale, and saturation below."""
        from matplotlib import pyplot as plt
        from matplotlib.lines import Line2D

        figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
        L, D, T = next(iter(self.gradient.values())).shape
        looks: dict[str, dict[str, Any]] = {
            f"layer {k}" + ", backward" * d: {"ls": ("-", "--")[d], "alpha": (k + 1) / L}
            for k in range(L)
            for d in range(D)
        }
        handles = [Line2D([], [], color="black", label=n, **look) for n, look in looks.items()]
        for ax, values in zip(axes, (self.gradient, self.saturation), strict=True):
            colors = {name: f"C{k}" for k, name in enumerate(values)}
            for name, color in colors.items():
                rows = values[name].flatten(0, 1).cpu()
                for row, look in zip(rows, looks.values(), strict=True):
                    ax.plot(range(T), row, color=color, **look)
            names = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
            more = handles if len(handles) > 1 and ax is axes[0] else []
            ax.legend(handles=names + more, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
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
    r"""Measure the gradient of a loss that reaches each time step, by one backward pass.

    Each layer reads an input of zeros beside its own, one for each pre-activation, so the fused
    backward says what reaches these. From there it is one product with W_hh for all steps at
    once, and the cell's own elementwise path, to

    .. math:: \lVert \partial L / \partial h_t \rVert, \lVert \partial L / \partial c_t \rVert

    Args:
        module: an :class:`~fastrnn.RNN`, :class:`~fastrnn.LSTM` or :class:`~fastrnn.GRU`.
        input, hx: as ``module`` takes them, without packing. Where the module would run on torch's
            own layers, the reference is measured.
        loss: of the output and the final states, both as ``module`` gives them but the states
            always as a tuple. By default the sum of the last layer's h_n: each direction's gradient
            then begins at the last step that it takes.

    Raises:
        TypeError, ValueError, RuntimeError: as ``module`` itself, and where it is not fastrnn's.

    >>> import torch, fastrnn
    >>> flow = fastrnn.diagnostics.gradient_flow(fastrnn.LSTM(3, 4), torch.randn(50, 2, 3))
    >>> flow.gradient["c"].shape, sorted(flow.saturation)
    (torch.Size([1, 1, 50]), ['f', 'g', 'i', 'o'])
    """
    if not isinstance(module, RNNBase):
        got = type(module).__name__
        raise TypeError(f"expected a layer of fastrnn's (fastrnn.convert makes it one), got {got}")
    if not isinstance(input, Tensor):
        raise TypeError(f"expected a Tensor, got {type(input).__name__}")
    with torch.no_grad():
        module(input, hx)  # which checks both
    cell, weights, D = module._cell, module._weights(), 1 + bool(module.bidirectional)
    dim = input.dim()
    state = None if hx is None else module._check_rank(cell, hx, dim)
    x = input.unsqueeze(1) if dim == 2 else input.transpose(0, 1) if module.batch_first else input
    runs = []
    with torch.enable_grad():
        finals: list[State] = []
        for k, directions in enumerate(weights):
            if k and module.dropout:
                x = F.dropout(x, module.dropout, module.training)
            given = None if state is None else tuple(s[k * D : (k + 1) * D].detach() for s in state)
            runs.append(_Run(cell, x.contiguous(), directions, given))
            x = runs[-1].out
            finals.append(runs[-1].final)
        final = tuple(map(torch.cat, zip(*finals, strict=True)))
        if dim == 2:
            output, final = x.squeeze(1), tuple(s.squeeze(1) for s in final)
        else:
            output = x.transpose(0, 1) if module.batch_first else x
        value = final[0][-D:].sum() if loss is None else loss(output, final)
        wanted = [t for run in runs for t in run.wanted]
        found = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))
    gradient: dict[str, list[Tensor]] = {name: [] for name in cell.states}
    saturation: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for run in runs:
            grads = [next(found) for _ in run.wanted]
            for d in range(D):
                for name, norm in run.gradients(d, grads).items():
                    gradient[name].append(norm)
                for name, share in run.saturation(d).items():
                    saturation.setdefault(name, []).append(share)

    def stacked(values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {n: torch.stack(v).unflatten(0, (len(weights), D)) for n, v in values.items() if v}

    return GradientFlow(stacked(gradient), stacked(saturation))


class _Run:
    """One layer's forward pass, with an input of zeros for each pre-activation.

    Attributes:
        wanted: the tensors whose gradients :meth:`gradients` takes: those zeros, the output, and
            the final states.
    """

    def __init__(
        self, cell: Cell, x: Tensor, weights: Sequence[Weights], state: State | None
    ) -> None:
        T, B, _ = x.shape
        rows = weights[0][1].shape[0]
        self.cell, self.weights, self.state = cell, weights, state
        zeros = x.new_zeros(T, B, len(weights) * rows, requires_grad=True)
        one = torch.eye(rows, dtype=x.dtype, device=x.device)
        wider = []
        for d, (w_ih, *others) in enumerate(weights):
            blocks = [one if d == k else torch.zeros_like(one) for k in range(len(weights))]
            wider.append(cast(Weights, (torch.cat([w_ih, *blocks], 1), *others)))
        sizes = sizes_of(cell, x, (weights,), B)
        chosen = pick(cell, x.dtype, x.device, sizes, None)
        backend = cast(Backend, load("reference") if chosen.STACKS else chosen)
        self.out, self.final = layer(backend, cell, torch.cat([x, zeros], 2), wider, state, None, B)
        self.wanted = [zeros, self.out, *self.final]
        with torch.no_grad():
            _, _, saved = backend.forward(cell, x.detach(), weights, state, None, B, save=True)
        assert saved is not None
        H = rows // len(cell.gates)
        self.saved = saved[..., :H].unflatten(1, (T, B))  # [D, T, B, slots, H]
        self.P = weights[0][1].shape[1]

    def _h(self, d: int) -> Tensor:
        return self.out[:, :, d * self.P : (d + 1) * self.P].detach()

    def gradients(self, d: int, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of each state after each step of direction d, the norm of the loss's gradient."""
        cell, H, states = self.cell, self.saved.shape[-1], len(self.cell.states)
        dzeros, dout, *dfinal = grads
        T, G = len(dout), len(cell.gates)
        w_hh, w_hr = self.weights[d][1], self.weights[d][4]
        order = range(T - 1, -1, -1) if d == 0 else range(T)  # against the direction's own time
        h = self._h(d)
        first = torch.zeros_like(h[:1]) if self.state is None else self.state[0][d : d + 1]
        before = torch.cat([first, h[:-1]]) if d == 0 else torch.cat([h[1:], first])
        values = self.saved[d].unbind(2)
        v, s = values[: len(cell.saved)], (before, *values[len(cell.saved) :][: states - 1])

        # The cell's reverse is linear in dy: what a unit of each gives is all there is to know.
        zero = torch.zeros_like(values[0] if values else h)
        one = torch.ones_like(zero)
        slots, back = [], []
        for k in range(states):
            dpre, ds = cell.backward(v, s, h, [one if j == k else zero for j in range(states)])
            slots.append(dpre)
            back.append([zero if each is None else each for each in ds])
        dgx = dzeros.unflatten(2, (-1, G, H))[:, :, d].unbind(2)
        dgh = list(dgx[: cell.shared])
        for k in range(cell.shared, G):
            # Both parts of a gate that is not shared meet in one sum: dgh is dgx times a factor.
            x_part, h_part = slots[0][k], slots[0][k + G - cell.shared]
            dgh.append(dgx[k] * (h_part / x_part).nan_to_num(0.0, 0.0, 0.0))
        through = torch.stack(dgh, 2).flatten(2) @ w_hh  # to the h before each step

        dy = [g[d] for g in dfinal]
        norms = [dout.new_zeros(T, dtype=torch.float64) for _ in dy]
        for t in order:
            dy[0] = dy[0] + dout[t, :, d * self.P : (d + 1) * self.P]
            for k, g in enumerate(dy):
                norms[k][t] = g.double().norm()
            m = [dy[0] if w_hr is None else dy[0] @ w_hr, *dy[1:]]
            new = [sum(back[j][k][t] * m[j] for j in range(states)) for k in range(states)]
            direct = through[t] if w_hr is not None else through[t] + new[0]
            dy = [direct, *new[1:]]  # type: ignore[list-item]
        return dict(zip(cell.states, norms, strict=True))

    def saturation(self, d: int) -> dict[str, Tensor]:
        mode = self.cell.mode
        found = dict(zip(self.cell.saved, self.saved[d].unbind(2), strict=False))
        found.setdefault("h", self._h(d))

        def share(stuck: Tensor) -> Tensor:
            return stuck.double().mean((1, 2))

        shares = {n: share((found[n] - 0.5).abs() > 0.4) for n in _SIGMOIDS.get(mode, ())}
        shares |= {n: share(found[n].abs() > 0.9) for n in _TANHS.get(mode, ())}
        if mode == "RNN_RELU":
            shares["h"] = share(found["h"] <= 0)
        return shares
