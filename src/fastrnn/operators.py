"""A layer and its reverse as operators of torch, for whatever records operators.

Compilers, exporters and tracers cannot look into a backend. They get ``torch.ops.fastrnn.layer``
and ``torch.ops.fastrnn.reverse``, of which torch knows the sizes of the results and the derivative.
Otherwise layers do without: an operator takes its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import onnx
from fastrnn.backends import Backend
from fastrnn.cells import CELLS, Cell, State, Weights
from fastrnn.checks import check_batch_sizes, check_layer
from fastrnn.dispatch import load

__all__ = ["exporting", "layer", "recording", "tracing"]

_library = torch.library.Library("fastrnn", "DEF")
# The weights of a direction that are there, after each other.
_LAYER = (
    "str backend, str mode, Tensor x, Tensor[] weights, bool bias, bool projected, Tensor[] state, "
    "Tensor? batch_sizes"
)
_library.define(f"layer({_LAYER}, bool save) -> Tensor[]")
_library.define(
    f"reverse({_LAYER}, Tensor out, Tensor saved, Tensor dout, Tensor[] dfinal, bool[] needed)"
    " -> Tensor[]"
)


def tracing() -> bool:
    """Whether ``torch.jit.trace`` records."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def exporting() -> bool:
    """Whether ``torch.export`` records; torch before 2.7 does not say."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return ask is not None and ask()


def recording() -> bool:
    """Whether operators are recorded, or their results only described."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def layer(
    backend: str,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
) -> tuple[Tensor, State]:
    """As :func:`fastrnn.autograd.layer`; ``save`` if a gradient may be asked for."""
    if batch_sizes is None and x.dim() == 2:
        # A cell's step is a layer of one, so that what was recorded of a layer never is a step.
        state = None if state is None else tuple(s.unsqueeze(0) for s in state)
        _, final = layer(backend, cell, x.unsqueeze(0), weights, state, None, batch, save)
        final = tuple(s.squeeze(0) for s in final)
        return final[0], final
    if onnx.exporting():
        return onnx.layer(cell, x, weights, state)
    _, w_hh, b_ih, _, w_hr = weights[0]
    H, P = w_hh.shape[0] // len(cell.gates), w_hh.shape[1]
    if state is None and batch_sizes is not None:
        # Nothing else tells how many sequences there are, without a look at numbers. A trace is to
        # look itself.
        sequences = batch_sizes[0] if tracing() else batch
        state = cell.zero_state(x, (len(weights), sequences), H, P)
    elif state is None and exporting():
        # AOTInductor cannot pass on a list of nothing.
        state = cell.zero_state(x, (len(weights), batch), H, P)
    there = [w for w in chain(*weights) if w is not None]
    out, _, *final = torch.ops.fastrnn.layer(
        backend,
        cell.mode,
        x,
        there,
        b_ih is not None,
        w_hr is not None,
        list(state or ()),
        batch_sizes,
        save,
    )
    return out, tuple(final)


def _batch(x: Tensor, state: Sequence[Tensor], batch_sizes: Tensor | None) -> int:
    return x.shape[1] if batch_sizes is None else state[0].shape[1]


def _directions(weights: Sequence[Tensor], bias: bool, projected: bool) -> list[Weights]:
    has = (True, True, bias, bias, projected)
    count = sum(has)
    directions = []
    for k in range(0, len(weights), count):
        values = iter(weights[k : k + count])
        directions.append(cast(Weights, tuple(next(values) if here else None for here in has)))
    return directions


def _refuse_tangents() -> None:
    """They would be lost: an operator has none."""
    if forward_ad._current_level >= 0:
        raise RuntimeError("a recorded layer of fastrnn's has no forward mode")


def _run(
    backend: str,
    mode: str,
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    projected: bool,
    state: list[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
) -> list[Tensor]:
    _refuse_tangents()
    # What was checked when the layer was recorded need not hold now.
    rank = 3 if batch_sizes is None else 2
    if x.dim() != rank:
        raise RuntimeError(f"expected an input of {rank} dimensions, as recorded, got {x.dim()}")
    batch = x.shape[1] if batch_sizes is None else check_batch_sizes(batch_sizes, len(x))
    if len(x) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got 0")
    directions, initial = _directions(weights, bias, projected), tuple(state) or None
    module = cast(Backend, load(backend))
    if not module.CHECKS or x.dtype.itemsize == 2:
        check_layer(CELLS[mode], x, directions, initial, batch_sizes, batch)
    out, final, saved = module.forward(
        CELLS[mode], x.contiguous(), directions, initial, batch_sizes, batch, save=save
    )
    return [out, x.new_empty(0) if saved is None else saved, *final]


def _shapes(
    backend: str,
    mode: str,
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    projected: bool,
    state: list[Tensor],
    batch_sizes: Tensor | None,
    save: bool,
) -> list[Tensor]:
    cell, D = CELLS[mode], len(_directions(weights, bias, projected))
    rows, P = weights[1].shape
    H = rows // len(cell.gates)
    saved = x.new_empty(0)
    if save:
        module = cast(Backend, load(backend))
        units = -(-H // module.MULTIPLE) * module.MULTIPLE
        N = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
        dtype = torch.float32 if module.WIDE and x.dtype.itemsize == 2 else x.dtype
        saved = x.new_empty(D, N, cell.saved_slots(projected), units, dtype=dtype)
    batch = _batch(x, state, batch_sizes)
    final = [x.new_empty(D, batch, H if k else P) for k in cell.state_range]
    return [x.new_empty(*x.shape[:-1], D * P), saved, *final]


def _run_reverse(
    backend: str,
    mode: str,
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    projected: bool,
    state: list[Tensor],
    batch_sizes: Tensor | None,
    out: Tensor,
    saved: Tensor,
    dout: Tensor,
    dfinal: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    _refuse_tangents()
    directions = _directions(weights, bias, projected)
    # Of x, of each direction's five weights, there or not, and of the states.
    flags = iter(needed)
    x_needed = next(flags)
    each = [w is not None and next(flags) for w in chain(*directions)]
    grads = cast(Backend, load(backend)).backward(
        CELLS[mode],
        x.contiguous(),
        directions,
        tuple(state) or None,
        batch_sizes,
        _batch(x, state, batch_sizes),
        out,
        saved,
        dout,
        dfinal,
        (x_needed, *each, *flags),
    )
    return [g for g in grads if g is not None]


def _shapes_reverse(
    backend: str,
    mode: str,
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    projected: bool,
    state: list[Tensor],
    batch_sizes: Tensor | None,
    out: Tensor,
    saved: Tensor,
    dout: Tensor,
    dfinal: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    inputs = zip((x, *weights, *state), needed, strict=True)
    return [t.new_empty(t.shape) for t, need in inputs if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    backend, mode, x, weights, bias, projected, state, batch_sizes, ctx.saved = inputs
    ctx.layer = backend, mode, bias, projected
    ctx.weights = len(weights)
    out, saved, *_ = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(x, batch_sizes, out, saved, *weights, *state)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError("this layer was recorded where no gradient was needed, and has none")
    x, batch_sizes, out, saved, *tensors = ctx.saved_tensors
    backend, mode, bias, projected = ctx.layer
    W = ctx.weights
    weights, state = tensors[:W], tensors[W:]
    dout, _, *dfinal = grads
    _, _, x_needed, weights_needed, _, _, state_needed, *_ = ctx.needs_input_grad
    needed = [x_needed, *weights_needed, *state_needed]
    found = iter(
        torch.ops.fastrnn.reverse(
            backend,
            mode,
            x,
            weights,
            bias,
            projected,
            state,
            batch_sizes,
            out,
            saved,
            dout,
            dfinal,
            needed,
        )
    )
    dx, *rest = [next(found) if need else None for need in needed]
    return None, None, dx, rest[:W], None, None, rest[W:], None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("a recorded layer of fastrnn's has no derivatives of derivatives")


for _name, _function, _fake in (
    ("layer", _run, _shapes),
    ("reverse", _run_reverse, _shapes_reverse),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastrnn::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastrnn::layer", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("fastrnn::reverse", _refuse, lib=_library)
