"""Layers as functions of their weights: a stack of layers and directions, and one cell step.

The modules check their user's arguments in torch's words. Everything that backends rely on is
checked here, for every caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
    Rows,
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
    run = _backend(cell, input, weights, rows, backend, capturing)
    if run.kind == "stack":
        layers = [Layer(cell, rows, directions, None) for directions in weights]
        if not is_onnx_exporting():  # where sizes are tensors
            _check_stack(layers, input, hx)
        return run.run_stack(layers, input, hx, dropout, training)
    if len(weights) == 1:
        return _run_layer(run, capturing, Layer(cell, rows, weights[0], hx), input)
    one_layer = partial(_run_layer, run, capturing)
    return run_stack(one_layer, cell, rows, weights, input, hx, dropout if training else 0.0)


def run_stack(
    run_layer: Callable[[Layer, Tensor], tuple[Tensor, State]],
    cell: Cell,
    rows: Rows,
    weights: Sequence[Sequence[Weights]],
    x: Tensor,
    hx: State | None,
    dropout: float,
) -> tuple[Tensor, State]:
    """Run one layer after the other by a function of a layer and its input."""
    D = len(weights[0])
    if hx is not None:
        check_state(cell, hx, (len(weights) * D, rows.B), weights[0][0], x)
    finals: list[State] = []
    for k, directions in enumerate(weights):
        if k and dropout:
            x = F.dropout(x, dropout)
        state = None if hx is None else tuple(s[k * D : (k + 1) * D] for s in hx)
        x, final = run_layer(Layer(cell, rows, directions, state), x)
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
    directions = (weights,)
    run = _backend(cell, input, (directions,), rows, backend, capturing)
    layer = Layer(cell, rows, directions, hx)
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


def stack_sizes(
    cell: Cell, input: Tensor, weights: Sequence[Sequence[Weights]], rows: Rows
) -> StackSizes:
    """The sizes on which a choice of :mod:`fastrnn.dispatch` may depend."""
    w = weights[0][0]
    return StackSizes(
        len(weights),
        len(weights[0]),
        rows.B,
        input.shape[-1],
        w.hh.shape[:1].numel() // len(cell.gates),
        0 if w.hr is None else w.hr.shape[0],
        rows.batch_sizes is not None,
        rows.T == 1,
    )


def _backend(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    rows: Rows,
    backend: str | None,
    capturing: bool,
) -> Backend:
    """The backend of a call; see the table in :mod:`fastrnn.capture`."""
    if capturing:
        w = weights[0][0]
        if is_onnx_exporting():
            onnx.check(cell, w)
            # The exporter that traces knows the ONNX equivalents of torch's own operators.
            traced = is_jit_tracing() or not onnx.knows(cell)
            return load_backend("torch" if traced else "reference")
        proj_size = 0 if w.hr is None else w.hr.shape[0]
        layers = (len(weights), len(weights[0]), w.hh.shape[0] // len(cell.gates), proj_size)
        compiled = torch.compiler.is_compiling()
        return _captured_backend(
            cell.mode, input.dtype, input.device.type, backend, *layers, compiled
        )
    sizes = stack_sizes(cell, input, weights, rows) if sizes_matter(input.is_cpu) else None
    run = resolve_backend(cell, input.dtype, input.device, sizes, backend)
    # torch's own operators have no rule for vmap, and some have none for forward mode.
    return load_backend("reference") if run.kind == "stack" and is_transforming() else run


def _captured_backend(
    mode: str,
    dtype: torch.dtype,
    device: str,
    backend: str | None,
    layers: int,
    directions: int,
    hidden_size: int,
    proj_size: int,
    compiled: bool,
) -> Backend:
    """The choice where batch sizes and lengths may be symbols.

    A compiler does not trace into it, nor into the import of the reference.
    """
    load_layer_backend("reference")
    sizes = StackSizes(
        layers, directions, 1, hidden_size, hidden_size, proj_size, compiled=compiled
    )
    return resolve_backend(CELLS[mode], dtype, torch.device(device), sizes, backend)


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
        first = layers[0]
        leading = (len(layers) * first.D, first.rows.B)
        check_state(first.cell, hx, leading, first.weights[0], input)
