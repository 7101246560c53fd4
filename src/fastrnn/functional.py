"""Layers as functions of their weights: a stack of layers and directions, and one cell step.

The modules check their user's arguments in torch's words. Everything that backends rely on is
checked here, for every caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn import onnx
from fastrnn.autograd import apply_layer
from fastrnn.backends import Backend, LayerBackend, StackSizes
from fastrnn.capture import is_capturing, is_jit_tracing, is_onnx_exporting, is_transforming
from fastrnn.cells import CELLS, Cell, State
from fastrnn.dispatch import load_backend, load_layer_backend, resolve_backend, sizes_matter
from fastrnn.layer import (
    Layer,
    Weights,
    castable,
    check_state,
    rows_of,
    rows_of_one_step,
    to_dtype,
)

__all__ = ["Weights", "rnn", "step"]

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # evaluated in every call


def rnn(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    hx: State | None = None,
    *,
    batch_sizes: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Run a stack of recurrent layers.

    Args:
        cell: one of :data:`fastrnn.cells.CELLS`.
        input: ``[T, B, I]``, or with ``batch_sizes`` the rows of a packed batch, ``[N, I]``.
        weights: ``weights[layer][direction]``, all of them :class:`Weights`, or all of them tuples
            of its five fields.
        hx: the initial state, one tensor per state of the cell: h ``[L*D, B, P]``, the others
            ``[L*D, B, H]``, for L layers of D directions. None is zero.
        batch_sizes: as in :class:`torch.nn.utils.rnn.PackedSequence`: int64, on the CPU.
        dropout: probability with which an element of the output of every layer but the last is
            zeroed, if ``training``.
        backend: name of the backend; None for the choice of :mod:`fastrnn.dispatch`.

    Under autocast, tensors of all real floating-point dtypes but float64 are first cast to
    autocast's dtype.

    Returns:
        The output ``[T, B, D*P]`` (packed: ``[N, D*P]``) and the final state, shaped like ``hx``.

    Raises:
        ValueError: the rank of the input or the dtype of batch_sizes is wrong, or the backend is
            unknown.
        RuntimeError: sizes, dtypes or devices do not fit together, or T = 0.
        fastrnn.BackendError: the selected backend cannot run this.
    """
    if type(weights[0][0]) is not Weights:
        weights = [[Weights(*w) for w in directions] for directions in weights]
    if _is_any_autocast_enabled() and (dtype := autocast_dtype(input)) is not None:
        weights = [[Weights(*to_dtype(dtype, w)) for w in directions] for directions in weights]
        input, hx = input.to(dtype), None if hx is None else to_dtype(dtype, hx)
    rows, capturing = rows_of(input, batch_sizes), is_capturing()
    state = hx if len(weights) == 1 else None
    layers = [Layer(cell, rows, directions, state) for directions in weights]
    run = _backend(layers, input, backend, capturing)
    if run.kind == "stack":
        if not is_onnx_exporting():  # where sizes are tensors
            _check_stack(layers, input, hx)
        return run.run_stack(layers, input, hx, dropout, training)
    if len(layers) == 1:
        return _run_layer(run, capturing, layers[0], input)
    one_layer = partial(_run_layer, run, capturing)
    return run_stack(one_layer, layers, input, hx, dropout if training else 0.0)


def run_stack(
    run_layer: Callable[[Layer, Tensor], tuple[Tensor, State]],
    layers: Sequence[Layer],
    x: Tensor,
    hx: State | None,
    dropout: float,
) -> tuple[Tensor, State]:
    """Run one layer after the other by a function of a layer and its input.

    Each gets its slice of ``hx``, the initial state of the stack, as its state.
    """
    D = layers[0].D
    if hx is not None:
        _check_stack_state(layers, x, hx)
    finals: list[State] = []
    for k, layer in enumerate(layers):
        if k and dropout:
            x = F.dropout(x, dropout)
        state = None if hx is None else tuple(s[k * D : (k + 1) * D] for s in hx)
        x, final = run_layer(Layer(layer.cell, layer.rows, layer.weights, state), x)
        finals.append(final)
    return x, tuple(map(torch.cat, zip(*finals, strict=True)))


def step(
    cell: Cell, input: Tensor, hx: State | None, weights: Weights, *, backend: str | None = None
) -> State:
    """Run one step of one cell: the loop over time at T = 1.

    Args:
        cell: one of :data:`fastrnn.cells.CELLS`.
        input: ``[B, I]``.
        hx: the state, one tensor ``[B, H]`` per state of the cell. None is zero.
        weights: as in :func:`rnn`, of one layer and direction.
        backend: as in :func:`rnn`.

    Returns:
        The new state, shaped like ``hx``.

    Raises:
        ValueError, RuntimeError, fastrnn.BackendError: as :func:`rnn`.
    """
    if type(weights) is not Weights:
        weights = Weights(*weights)
    if _is_any_autocast_enabled() and (dtype := autocast_dtype(input)) is not None:
        weights = Weights(*to_dtype(dtype, weights))
        input, hx = input.to(dtype), None if hx is None else to_dtype(dtype, hx)
    rows, capturing = rows_of_one_step(input), is_capturing()
    layer = Layer(cell, rows, (weights,), hx)
    run = _backend((layer,), input, backend, capturing)
    if run.kind == "stack":
        if not is_onnx_exporting():
            layer.check(input)
        return run.run_step(layer, input)
    return _run_layer(run, capturing, layer, input)[1]


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs a layer here and now; None if it keeps the input's."""
    if not _is_any_autocast_enabled() or not castable(input):
        return None
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def stack_sizes(layers: Sequence[Layer], input: Tensor) -> StackSizes:
    """The sizes on which a choice of :mod:`fastrnn.dispatch` may depend."""
    first = layers[0]
    gate_size = first.weights[0].hh.shape[:1].numel()  # an int in a trace, too
    return StackSizes(
        len(layers),
        first.D,
        first.rows.B,
        input.shape[-1],
        gate_size // first.G,
        first.P if first.projected else 0,
        first.rows.batch_sizes is not None,
        first.rows.T == 1,
    )


def _backend(
    layers: Sequence[Layer], input: Tensor, backend: str | None, capturing: bool
) -> Backend:
    """The backend of a call; see the table in :mod:`fastrnn.capture`."""
    first = layers[0]
    cell = first.cell
    if capturing:
        if is_onnx_exporting():
            onnx.check(cell, first.weights[0])
            # The exporter that traces knows the ONNX equivalents of torch's own operators.
            traced = is_jit_tracing() or not onnx.knows(cell)
            return load_backend("torch" if traced else "reference")
        # Without the sizes of the input, which may be symbols.
        H, proj_size = first.H, first.P if first.projected else 0
        compiled = torch.compiler.is_compiling()
        sizes = StackSizes(len(layers), first.D, 1, H, H, proj_size, compiled=compiled)
        return _captured_backend(cell.mode, input.dtype, input.device.type, backend, *sizes)
    known = stack_sizes(layers, input) if sizes_matter(input.is_cpu) else None
    run = resolve_backend(cell, input.dtype, input.device, known, backend)
    # torch's own operators have no rule for vmap, and some have none for forward mode.
    return load_backend("reference") if run.kind == "stack" and is_transforming() else run


def _captured_backend(
    mode: str, dtype: torch.dtype, device: str, backend: str | None, *sizes: Any
) -> Backend:
    """The choice as a constant of a graph: a compiler does not trace into it, nor into imports.

    Args:
        sizes: the fields of :class:`StackSizes`, since a constant cannot be made of a named tuple.
    """
    load_layer_backend("reference")
    return resolve_backend(CELLS[mode], dtype, torch.device(device), StackSizes(*sizes), backend)


# As torch.compiler.assume_constant_result, which imports the compiler.
_captured_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_layer(
    backend: LayerBackend, capturing: bool, layer: Layer, x: Tensor
) -> tuple[Tensor, State]:
    # Lazy validation: a backend that validates costs a correct call nothing here. Where it fails,
    # the check is repeated for an error in the words of this package.
    if not backend.VALIDATES or x.layout is not torch.strided or x.dtype.itemsize == 2:
        layer.check(x)
    try:
        return apply_layer(backend, layer, x.contiguous(), capturing)
    except (ValueError, IndexError):
        layer.check(x)
        raise


def _check_stack(layers: Sequence[Layer], input: Tensor, hx: State | None) -> None:
    x = input
    for layer in layers:
        layer.check(x)
        x = input.new_empty(0, sum(w.hh.shape[1] for w in layer.weights))
    if hx is not None:
        _check_stack_state(layers, input, hx)


def _check_stack_state(layers: Sequence[Layer], input: Tensor, hx: State) -> None:
    first = layers[0]
    leading = (len(layers) * first.D, first.rows.B)
    check_state(first.cell, hx, leading, first.weights[0], input)
