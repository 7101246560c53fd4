"""A layer and its backward pass as operators of torch, for graphs that capture operators.

Compilers, exporters and tracers cannot look into a backend. They see ``torch.ops.fastrnn.layer``
and ``torch.ops.fastrnn.layer_backward``, of which torch knows the shapes of the results and the
derivative. Eager layers do not use them: the call of an operator takes time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import onnx
from fastrnn.capture import is_exporting, is_forward_ad, is_jit_tracing, is_onnx_exporting
from fastrnn.cells import CELLS, State
from fastrnn.dispatch import load_layer_backend
from fastrnn.layer import Layer, Rows, Weights, filled, rows_of

__all__ = ["call_layer_op"]

_library = torch.library.Library("fastrnn", "DEF")
# `weights` holds the weights of each direction in turn, without those that are None.
_LAYER = (
    "str backend, str mode, Tensor x, Tensor[] weights, bool bias, bool projected, Tensor[] state, "
    "Tensor? batch_sizes"
)
_library.define(f"layer({_LAYER}, bool save) -> Tensor[]")
_library.define(
    f"layer_backward({_LAYER}, Tensor out, Tensor saved, Tensor dout, Tensor[] dfinal, "
    "bool[] needed) -> Tensor[]"
)


class _Arguments(NamedTuple):
    """The arguments that both operators begin with."""

    backend: str
    mode: str
    x: Tensor
    weights: list[Tensor]
    bias: bool
    projected: bool
    state: list[Tensor]
    batch_sizes: Tensor | None

    def layer(self, rows: Rows) -> Layer:
        present = (True, True, self.bias, self.bias, self.projected)
        count = sum(present)
        weights = [
            Weights(*filled(present, self.weights[k : k + count]))
            for k in range(0, len(self.weights), count)
        ]
        return Layer(CELLS[self.mode], rows, weights, tuple(self.state) or None)

    def symbolic_layer(self) -> Layer:
        """The layer without a look at values, which a graph does not have while it is captured."""
        if self.batch_sizes is None:
            T, B, _ = self.x.shape
            return self.layer(Rows(T, B, T * B))
        T, B = self.batch_sizes.shape[0], self.state[0].shape[1]
        return self.layer(Rows(T, B, self.x.shape[0], self.batch_sizes))


def call_layer_op(backend: str, layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State]:
    """As :func:`fastrnn.autograd.apply_layer`; ``save`` if a gradient may be needed."""
    cell, rows, state = layer.cell, layer.rows, layer.state
    if rows.one_step:
        # A step becomes a layer of one step, so that a captured layer never runs as a step.
        state = None if state is None else tuple(s.unsqueeze(0) for s in state)
        sequence = Layer(cell, Rows(1, rows.B, rows.B), layer.weights, state)
        _, final = call_layer_op(backend, sequence, x.unsqueeze(0), save)
        final = tuple(s.squeeze(0) for s in final)
        return final[0], final
    if is_onnx_exporting():
        return onnx.emit_node(layer, x)
    if state is None and rows.batch_sizes is not None:
        # The state gives the number of sequences without a look at values. A trace reads that
        # number at every run.
        B = rows.batch_sizes[0] if is_jit_tracing() else rows.B
        state = cell.zero_state(x, (layer.D, B), layer.H, layer.P)
    elif state is None and is_exporting():
        # AOTInductor cannot pass an empty list.
        state = layer.zero_state(x)
    out, _, *final = torch.ops.fastrnn.layer(
        backend,
        cell.mode,
        x,
        [w for direction in layer.weights for w in direction if w is not None],
        layer.weights[0].bias_ih is not None,
        layer.projected,
        list(state or ()),
        rows.batch_sizes,
        save,
    )
    return out, tuple(final)


def _refuse_tangents() -> None:
    """They would be lost: an operator has none."""
    if is_forward_ad():
        raise RuntimeError("a captured fastrnn layer does not support forward-mode AD")


def _run(*args: Any) -> list[Tensor]:
    _refuse_tangents()
    *arguments, save = args
    a = _Arguments(*arguments)
    # The checks made during capture need not hold for this input.
    rank = 3 if a.batch_sizes is None else 2
    if a.x.dim() != rank:
        raise RuntimeError(f"expected an input of {rank} dimensions, as captured, got {a.x.dim()}")
    layer, backend = a.layer(rows_of(a.x, a.batch_sizes)), load_layer_backend(a.backend)
    if not backend.VALIDATES or a.x.dtype.itemsize == 2:
        layer.check(a.x)
    out, final, saved = backend.forward(layer, a.x.contiguous(), save=save)
    return [out, a.x.new_empty(0) if saved is None else saved, *final]


def _fake(*args: Any) -> list[Tensor]:
    *arguments, save = args
    a = _Arguments(*arguments)
    layer, x = a.symbolic_layer(), a.x
    out = x.new_empty(*x.shape[:-1], layer.D * layer.P)
    saved = x.new_empty(0)
    if save:
        shape, dtype = load_layer_backend(a.backend).saved_spec(layer, x.dtype)
        saved = x.new_empty(shape, dtype=dtype)
    states = [(*layer.leading, layer.H if k else layer.P) for k in layer.cell.state_range]
    return [out, saved, *(x.new_empty(shape) for shape in states)]


def _run_backward(*args: Any) -> list[Tensor]:
    _refuse_tangents()
    *arguments, out, saved, dout, dfinal, needed = args
    a = _Arguments(*arguments)
    layer, x = a.symbolic_layer(), a.x
    # `needed` has a flag for each tensor that is present, a backend expects one for each field.
    present = [True, *(t is not None for t in layer.tensors())]
    flags = [bool(flag) for flag in filled(present, needed)]
    grads = load_layer_backend(a.backend).backward(
        layer, x.contiguous(), out, saved, dout, dfinal, flags
    )
    return [g for g in grads if g is not None]


def _fake_backward(*args: Any) -> list[Tensor]:
    *arguments, _, _, _, _, needed = args
    a = _Arguments(*arguments)
    inputs = zip((a.x, *a.weights, *a.state), needed, strict=True)
    return [t.new_empty(t.shape) for t, need in inputs if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *arguments, ctx.save = inputs
    a = _Arguments(*arguments)
    ctx.options = a.backend, a.mode, a.bias, a.projected
    ctx.num_weights = len(a.weights)
    out, saved, *_ = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(a.x, a.batch_sizes, out, saved, *a.weights, *a.state)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError(
            "this layer was captured without gradients (under no_grad, or with frozen parameters): "
            "capture it again with gradients to train it"
        )
    x, batch_sizes, out, saved, *tensors = ctx.saved_tensors
    backend, mode, bias, projected = ctx.options
    weights, state = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
    dout, _, *dfinal = grads
    a = _Arguments(backend, mode, x, weights, bias, projected, state, batch_sizes)
    _, _, needs_x, needs_weights, _, _, needs_state, *_ = ctx.needs_input_grad
    needed = [needs_x, *needs_weights, *needs_state]
    result = torch.ops.fastrnn.layer_backward(*a, out, saved, dout, dfinal, needed)
    dx, *dtensors = filled(needed, result)
    dweights, dstate = dtensors[: ctx.num_weights], dtensors[ctx.num_weights :]
    return None, None, dx, dweights, None, None, dstate, None, None


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "double backward through a captured fastrnn layer (torch.compile, torch.export, "
        "torch.jit.trace) is not supported"
    )


for _name, _function, _fake_function in (
    ("layer", _run, _fake),
    ("layer_backward", _run_backward, _fake_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastrnn::{_name}", _fake_function, lib=_library)
torch.library.register_autograd(
    "fastrnn::layer", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("fastrnn::layer_backward", _refuse_double_backward, lib=_library)
