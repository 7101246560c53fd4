"""What backends rely on, whoever calls: tensors that fit together.

Each function raises RuntimeError, or ValueError, that names what was expected and what came. The
modules check what their user passed first, and in torch's words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.cells import Cell, State, Weights

__all__ = ["check_batch_sizes", "check_layer", "check_like", "check_stack", "check_state"]


def check_layer(
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
        check_state(cell, state, (*directions, batch), weights[0], x)


def check_stack(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    hx: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> None:
    x = input
    for directions in weights:
        check_layer(cell, x, directions, None, batch_sizes, batch)
        x = input.new_empty(0, sum(w[1].shape[1] for w in directions))
    if hx is not None:
        check_state(cell, hx, (len(weights) * len(weights[0]), batch), weights[0][0], input)


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
    """A tensor with the input's dtype and device, and with strides."""
    if tensor.dtype is not x.dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"expected {name} of layout torch.strided, got {tensor.layout}")
    if tensor.device != x.device:
        raise RuntimeError(
            f"expected all tensors on the input's device {x.device}, got {name} on {tensor.device}"
        )


def check_state(
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
    """The number of sequences in a packed batch of N rows."""
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
