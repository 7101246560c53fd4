"""Padded batches of sequences of different lengths: ``layer(input, hx, lengths)``.

The steps of all sequences are packed into time-major rows, which every backend runs without
padding. Sequences without a step keep their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import functional
from fastrnn.capture import is_transforming, unwrapped
from fastrnn.cells import Cell, State
from fastrnn.layer import Weights, check_like, check_strided

__all__ = ["checked_lengths", "rnn_with_lengths"]


def checked_lengths(lengths: Any, T: int, B: int) -> Tensor:
    """``lengths`` as an int64 tensor on the CPU, where packing expects them."""
    try:
        # A list would become a tensor on the default device.
        counts = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected lengths to be a tensor or a list of integers: {error}") from None
    if is_transforming():
        counts = unwrapped("lengths", counts)
    if counts.is_meta or counts.layout is not torch.strided:
        got = "a meta tensor" if counts.is_meta else f"a tensor of layout {counts.layout}"
        raise TypeError(f"expected lengths to be a dense tensor with values, got {got}")
    dtype = counts.dtype
    if counts.numel() and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise TypeError(f"expected lengths of integers, got {dtype}")
    if counts.shape != (B,):
        raise ValueError(f"expected lengths of shape [{B}], got {list(counts.shape)}")
    counts = counts.to("cpu", torch.int64)
    if B and not 0 <= int(counts.min()) <= int(counts.max()) <= T:
        raise ValueError(f"expected lengths from 0 to {T}, got {counts.tolist()}")
    return counts


def pack_indices(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The packed batch inside a padded one of T steps.

    Returns:
        The active sequences, which have a step, longest first; ``batch_sizes``; and for each packed
        row the index of its row in the padded batch, ``[T * B]`` or ``[B * T]``.
    """
    ends, order = lengths.sort(descending=True, stable=True)
    t = torch.arange(T, device="cpu").unsqueeze(1)
    inside = t < ends
    B = len(lengths)
    index = torch.add(t, order, alpha=T) if batch_first else torch.add(order, t, alpha=B)
    batch_sizes = inside.sum(1)[: int(ends[0])]
    return order[: int(batch_sizes[0])], batch_sizes, index.masked_select(inside)


def rnn_with_lengths(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    hx: State | None,
    lengths: Tensor,
    *,
    batch_first: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, State]:
    """As :func:`fastrnn.functional.rnn`, for ``[T, B, I]``, or ``[B, T, I]`` if ``batch_first``.

    The output is zero after the end of a sequence.

    Args:
        lengths: as :func:`checked_lengths` returns them.
    """
    # The backend checks active sequences only.
    check_strided("input", input)
    dtype = functional.autocast_dtype(input)
    for s in () if dtype or hx is None else hx:
        check_like("initial state", s, input)
    B, T = input.shape[:2] if batch_first else input.shape[1::-1]
    D, w = len(weights[0]), weights[0][0]
    H, P = w.hh.shape[0] // len(cell.gates), w.hh.shape[1]
    rows = input.flatten(0, 1)
    final = hx or cell.zero_state(input, (len(weights) * D, B), H, P)
    if lengths.any():
        active, batch_sizes, row_index = pack_indices(lengths, T, batch_first)
        active, row_index = active.to(input.device), row_index.to(input.device)
        packed, new = functional.rnn(
            cell,
            rows.index_select(0, row_index),
            weights,
            None if hx is None else tuple(s.index_select(1, active) for s in hx),
            batch_sizes=batch_sizes,
            dropout=dropout,
            training=training,
        )
        final = tuple(
            s.to(n.dtype).index_copy(1, active, n) for s, n in zip(final, new, strict=True)
        )
        output = packed.new_zeros(T * B, D * P).index_copy_(0, row_index, packed)
    else:
        output = rows.new_zeros(T * B, D * P, dtype=dtype)
        final = tuple(s.to(output.dtype, copy=True) for s in final)
        # Keep every input in the graph, so that it gets a gradient of zero and not None.
        for t in (input, *(w for layer in weights for each in layer for w in each)):
            if t is None:
                continue
            if not dtype:
                check_like("weights", t, input)
            output = output + t.flatten()[:0].sum().to(output.dtype)
    return output.unflatten(0, input.shape[:2]), final
