"""Layers as functions of their weights: the stack of layers and directions, and one cell step.

The modules check what their user passed and in torch's words; what is checked here is what backends
rely on, whoever calls.
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
from fastrnn.dispatch import load, pick, sizes_matter
from fastrnn.operators import recording, tracing

__all__ = ["autocast_dtype", "check_batch_sizes", "check_like", "rnn", "sizes_of", "step"]


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
            _check_stack(cell, input, weights, hx, batch_sizes, batch)
        return cast(Stacks, run).rnn(
            cell, input, weights, hx, batch_sizes, batch, dropout, training
        )
    run = cast(Backend, run)
    if len(weights) == 1:
        return _layer(run, cell, input, weights[0], hx, batch_sizes, batch)
    D = len(weights[0])
    if hx is not None:
        _check_state(cell, hx, (len(weights) * D, batch), weights[0][0], input)
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
            _check(cell, input, (weights,), hx, None, batch)
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
        return _recorded(cell.mode, input.dtype, input.device.type, backend, *layers)
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
) -> Backend | Stacks:
    """The choice where batches and times may be symbols; no compiler need see how it is made."""
    load("reference")  # the same goes for its import
    sizes = Sizes(layers, directions, 1, hidden_size, hidden_size, proj_size)
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
        _check(cell, x, weights, state, batch_sizes, batch)
    try:
        return layer(run, cell, x.contiguous(), weights, state, batch_sizes, batch)
    except (ValueError, IndexError):
        _check(cell, x, weights, state, batch_sizes, batch)  # says it in the words of our caller
        raise


def _check(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> None:
    check_like("input", x, x)
    for direction in weights:
        _check_weights(cell, x, direction, weights[0])
    if state is not None:
        directions = (len(weights),) if x.dim() == 3 or batch_sizes is not None else ()
        _check_state(cell, state, (*directions, batch), weights[0], x)


def _check_stack(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    hx: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> None:
    x = input
    for directions in weights:
        _check(cell, x, directions, None, batch_sizes, batch)
        x = input.new_empty(0, sum(w[1].shape[1] for w in directions))
    if hx is not None:
        _check_state(cell, hx, (len(weights) * len(weights[0]), batch), weights[0][0], input)


def _check_weights(cell: Cell, x: Tensor, weights: Weights, first: Weights) -> None:
    if first[1].dim() != 2:
        raise RuntimeError(f"{cell.mode}: expected weight_hh of 2 dimensions, got {first[1].dim()}")
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    rows, P = map(int, first[1].shape)  # torch.jit.trace may make tensors of them
    G = len(cell.gates)
    H, rest = divmod(rows, G)
    if H == 0:
        raise RuntimeError(f"{cell.mode}: expected hidden_size above 0, got {H}")
    if rest:
        raise RuntimeError(f"{cell.mode}: expected weight_hh of {G} x hidden_size rows, got {rows}")
    _check_weight(cell, "weight_ih", w_ih, (rows, x.shape[-1]), x)
    _check_weight(cell, "weight_hh", w_hh, (rows, P), x)
    if w_hr is not None:
        if not cell.projectable:
            raise RuntimeError(
                f"{cell.mode}: this cell cannot be projected, but weight_hr was given"
            )
        _check_weight(cell, "weight_hr", w_hr, (P, H), x)
    elif P != H:
        raise RuntimeError(
            f"{cell.mode}: expected weight_hh of shape {[rows, H]} without projection, "
            f"got {[rows, P]}"
        )
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError(f"{cell.mode}: expected both bias_ih and bias_hh or neither")
    if b_ih is not None and b_hh is not None:
        _check_weight(cell, "bias_ih", b_ih, (rows,), x)
        _check_weight(cell, "bias_hh", b_hh, (rows,), x)


def _check_weight(cell: Cell, name: str, w: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if w.shape != shape:
        raise RuntimeError(
            f"{cell.mode}: expected {name} of shape {list(shape)}, got {list(w.shape)}"
        )
    check_like(name, w, x)


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """A tensor with the input's dtype and device, and with strides; raises as :func:`rnn`."""
    if tensor.dtype is not x.dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"expected {name} of layout torch.strided, got {tensor.layout}")
    if tensor.device != x.device:
        raise RuntimeError(
            f"expected all tensors on the input's device {x.device}, got {name} on {tensor.device}"
        )


def _check_state(
    cell: Cell, hx: State, leading: tuple[int, ...], weights: Weights, x: Tensor
) -> None:
    if len(hx) != len(cell.states):
        raise RuntimeError(
            f"{cell.mode}: expected {len(cell.states)} initial states "
            f"({', '.join(cell.states)}), got {len(hx)}"
        )
    rows, P = weights[1].shape
    for k, s in enumerate(hx):
        shape = (*leading, rows // len(cell.gates) if k else P)
        if s.shape != shape:
            raise RuntimeError(
                f"{cell.mode}: expected initial {cell.states[k]} of shape {list(shape)}, "
                f"got {list(s.shape)}"
            )
        check_like("initial state", s, x)


def check_batch_sizes(batch_sizes: Tensor, N: int) -> int:
    """The number of sequences in a packed batch of N rows; raises as :func:`rnn`."""
    if batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu":
        raise ValueError(
            "expected batch_sizes of dtype torch.int64 on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN, "
            f"got batch_sizes of shape {list(batch_sizes.shape)}"
        )
    if (batch_sizes[1:] > batch_sizes[:-1]).any() or int(batch_sizes[-1]) <= 0:
        raise RuntimeError("expected batch_sizes that never increase and are above 0")
    batch, total = int(batch_sizes[0]), int(batch_sizes.sum())
    # A sum can overflow back to N; its first term then cannot be that small.
    if total != N or batch > N:
        raise RuntimeError(
            f"expected as many packed rows as batch_sizes add up to, {total}, got {N}"
        )
    return batch
