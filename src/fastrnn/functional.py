"""Layers as functions of their weights: the stack of layers and directions, and one cell step.

The modules check what their user passed and in torch's words; what backends rely on is checked
here, whoever calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn import onnx
from fastrnn.autograd import layer, transformed
from fastrnn.backends import Backend, Sizes, Stacks
from fastrnn.cells import CELLS, Cell, State, Weights
from fastrnn.checks import check_batch_sizes, check_layer, check_stack, check_state
from fastrnn.dispatch import load, pick, sizes_matter
from fastrnn.operators import recording, tracing

__all__ = ["autocast_dtype", "rnn", "sizes_of", "step"]


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
        weights: ``weights[layer][direction]``, each ``(w_ih, w_hh, b_ih, b_hh, w_hr)`` with shapes
            ``[G*H, I]``, ``[G*H, P]``, ``[G*H]``, ``[G*H]``, ``[P, H]``, G being the number of
            gates; no biases and no projection are None.
        hx: the initial state, one tensor per state of the cell: h ``[L*D, B, P]``, the others
            ``[L*D, B, H]``, for L layers of D directions. None is zero.
        batch_sizes: as in :class:`torch.nn.utils.rnn.PackedSequence`: int64, on the CPU.
        dropout: probability with which an element of the output of every layer but the last is
            zeroed, if ``training``.
        backend: name of the backend; None for the choice of :mod:`fastrnn.dispatch`.

    Under autocast all of real floating-point dtypes but float64 is first cast to autocast's dtype.

    Returns:
        The output ``[T, B, D*P]`` (packed: ``[N, D*P]``) and the final state, shaped like ``hx``.

    Raises:
        ValueError: the rank of the input or the dtype of batch_sizes is wrong, or the backend is
            unknown.
        RuntimeError: sizes, dtypes or devices do not fit together, or T = 0.
        fastrnn.BackendError: the backend that was asked for cannot run this.
    """
    if (dtype := autocast_dtype(input)) is not None:
        weights = [[_to(dtype, direction) for direction in layer] for layer in weights]
        input, hx = input.to(dtype), None if hx is None else _to(dtype, hx)
    if batch_sizes is None:
        if input.dim() != 3:
            raise ValueError(f"expected an input of 3 dimensions [T, B, I], got {input.dim()}")
        T, batch, _ = input.shape
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got 0")
    else:
        if input.dim() != 2:
            raise ValueError(f"expected packed rows of 2 dimensions [N, I], got {input.dim()}")
        batch = check_batch_sizes(batch_sizes, input.shape[0])
        T = len(batch_sizes)
    run = _pick(cell, input, weights, batch, T, batch_sizes is not None, backend)
    if run.STACKS:
        if not onnx.exporting():  # where sizes are tensors
            check_stack(cell, input, weights, hx, batch_sizes, batch)
        return cast(Stacks, run).rnn(
            cell, input, weights, hx, batch_sizes, batch, dropout, training
        )
    run = cast(Backend, run)
    if len(weights) == 1:
        return _layer(run, cell, input, weights[0], hx, batch_sizes, batch)
    D = len(weights[0])
    if hx is not None:
        check_state(cell, hx, (len(weights) * D, batch), weights[0][0], input)
    x = input
    finals: list[State] = []
    for k, directions in enumerate(weights):
        if k and dropout:
            x = F.dropout(x, dropout, training)
        state = None if hx is None else tuple(s[k * D : (k + 1) * D] for s in hx)
        x, final = _layer(run, cell, x, directions, state, batch_sizes, batch)
        finals.append(final)
    return x, tuple(map(torch.cat, zip(*finals, strict=True)))


def step(
    cell: Cell, input: Tensor, hx: State | None, weights: Weights, *, backend: str | None = None
) -> State:
    """Run one step of one cell: the time loop at T = 1.

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
    if (dtype := autocast_dtype(input)) is not None:
        weights = _to(dtype, weights)
        input, hx = input.to(dtype), None if hx is None else _to(dtype, hx)
    if input.dim() != 2:
        raise ValueError(f"expected an input of 2 dimensions [B, I], got {input.dim()}")
    batch = input.shape[0]
    run = _pick(cell, input, ((weights,),), batch, 1, False, backend)
    if run.STACKS:
        if not onnx.exporting():
            check_layer(cell, input, (weights,), hx, None, batch)
        return cast(Stacks, run).step(cell, input, hx, weights)
    return _layer(cast(Backend, run), cell, input, (weights,), hx, None, input.shape[0])[1]


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast runs a layer in, here and now; None if it leaves the input as it is."""
    if not torch._C._is_any_autocast_enabled() or not _castable(input):
        return None
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _castable(t: Tensor) -> bool:
    return t.dtype.is_floating_point and t.dtype is not torch.float64


def _to(dtype: torch.dtype, tensors: Sequence[Any]) -> Any:
    return tuple([t.to(dtype) if t is not None and _castable(t) else t for t in tensors])


def sizes_of(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    batch: int,
    steps: int = 1,
    packed: bool = False,
) -> Sizes:
    """The sizes of a stack that :mod:`fastrnn.dispatch` may ask for."""
    w_hh, w_hr = weights[0][0][1], weights[0][0][4]
    return Sizes(
        len(weights),
        len(weights[0]),
        batch,
        input.shape[-1],
        w_hh.shape[:1].numel() // len(cell.gates),
        0 if w_hr is None else w_hr.shape[0],
        packed,
        steps == 1,
    )


def _pick(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    batch: int,
    steps: int,
    packed: bool,
    backend: str | None,
) -> Backend | Stacks:
    if recording():
        if onnx.exporting():
            onnx.check(weights[0][0])
            # A trace has torch's operators, of which its exporter knows the ONNX ones.
            traced = tracing() or not onnx.knows(cell)
            return cast("Backend | Stacks", load("torch" if traced else "reference"))
        w_hh, w_hr = weights[0][0][1], weights[0][0][4]
        proj_size = 0 if w_hr is None else w_hr.shape[0]
        layers = (len(weights), len(weights[0]), w_hh.shape[0] // len(cell.gates), proj_size)
        compiled = torch.compiler.is_compiling()
        return _recorded(cell.mode, input.dtype, input.device.type, backend, *layers, compiled)
    sizes = None
    if sizes_matter(input.is_cpu):
        sizes = sizes_of(cell, input, weights, batch, steps, packed)
    run = pick(cell, input.dtype, input.device, sizes, backend)
    # torch's own operators have no rule for vmap, and not all of them one for forward mode.
    return cast(Backend, load("reference")) if run.STACKS and transformed() else run


def _recorded(
    mode: str,
    dtype: torch.dtype,
    device: str,
    backend: str | None,
    layers: int,
    directions: int,
    hidden_size: int,
    proj_size: int,
    compiled: bool,
) -> Backend | Stacks:
    """The choice where batches and times may be symbols; no compiler need see how it is made."""
    load("reference")  # the same goes for its import
    sizes = Sizes(layers, directions, 1, hidden_size, hidden_size, proj_size, compiled=compiled)
    return pick(CELLS[mode], dtype, torch.device(device), sizes, backend)


# As torch.compiler.assume_constant_result, which imports the compiler.
_recorded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _layer(
    run: Backend,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> tuple[Tensor, State]:
    if not run.CHECKS or x.layout is not torch.strided or x.dtype.itemsize == 2:
        check_layer(cell, x, weights, state, batch_sizes, batch)
    try:
        return layer(run, cell, x.contiguous(), weights, state, batch_sizes, batch)
    except (ValueError, IndexError):
        # It says it in the words of our caller.
        check_layer(cell, x, weights, state, batch_sizes, batch)
        raise
