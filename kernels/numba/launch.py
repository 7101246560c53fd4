"""The tensors that the kernels read, and the threads that run them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.numba import cells, sequence
from fastrnn.kernels.numba.simd import PANEL, Vector
from fastrnn.kernels.padding import (
    Numbers,
    numbers,
    own_rows,
    own_states,
    padded,
    padded_gates,
    padded_rows,
    running,
)

__all__ = ["backward", "forward", "in_a_child"]

ELEMENTS = {torch.float32: numba.float32, torch.float64: numba.float64}

WORTH_A_THREAD = 1 << 21
"""Floating-point operations: with fewer, waking a thread takes longer than its share."""

_pool: ThreadPoolExecutor | None = None

in_a_child = False
"""Whether this process was forked from one that had imported this: no thread survives that."""


def _forget() -> None:
    global _pool, in_a_child
    _pool, in_a_child = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _run(
    kernel: Any, sizes: Numbers, flops: int, arguments: Callable[[int, int, int], tuple[Any, ...]]
) -> None:
    """A kernel on shares of the sequences, side by side; the last in this thread.

    Args:
        arguments: of a direction and the sequences from one to another; the kernel takes the
            addresses of tensors.
    """
    global _pool
    threads = min(torch.get_num_threads(), max(1, flops // WORTH_A_THREAD))
    parts = min(sizes.B, -(-threads // sizes.D))
    bounds = [sizes.B * k // parts for k in range(parts + 1)] if parts else []
    shares = [arguments(d, begin, end) for d in range(sizes.D) for begin, end in pairwise(bounds)]
    calls = [[a.data_ptr() if isinstance(a, Tensor) else a for a in share] for share in shares]
    others = []
    if threads > 1 and len(calls) > 1:
        if _pool is None or _pool._max_workers < len(calls) - 1:
            _pool = ThreadPoolExecutor(len(calls) - 1, "fastrnn-numba")
        others = [_pool.submit(kernel, *call) for call in calls[:-1]]
    for call in calls[len(others) :]:
        kernel(*call)
    for other in others:
        other.result()


def _panels(w: Tensor) -> Tensor:
    """``w [K, columns]`` in panels ``[*, K, width]``; the last is filled up with zeros."""
    width = PANEL * Vector(ELEMENTS[w.dtype]).lanes
    K, columns = w.shape
    count = -(-columns // width)
    w = padded(w, count * width)
    panels: Tensor = w.reshape(K, count, width).transpose(0, 1).contiguous()
    return panels


def _columns(panels: Tensor) -> int:
    return panels.shape[0] * panels.shape[2]


def _offsets(sizes: Numbers, batch_sizes: Tensor | None) -> Tensor:
    """The first row of each step, and where the last ends.

    Raises:
        ValueError: the steps have not N rows together, or one has more than the one before.
    """
    if batch_sizes is None:
        dense: Tensor = torch.arange(sizes.T + 1, device="cpu") * sizes.B
        return dense
    offsets = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
    allowed = torch.cat([batch_sizes.new_full((1,), sizes.B), batch_sizes[:-1]])
    if (
        batch_sizes.dtype != torch.int64
        or offsets[-1] != sizes.N
        or ((batch_sizes > allowed) | (batch_sizes < 0)).any()
    ):
        raise ValueError(
            f"expected batch_sizes of at most {sizes.B}, never more than the one before, of "
            f"{sizes.N} rows together, got {batch_sizes.tolist()}"
        )
    return offsets


def forward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
) -> tuple[Tensor, State, Tensor | None]:
    """As ``fastrnn.backends.Backend.forward``; ``saved`` has ``Numbers.H`` units."""
    sizes = numbers(cell, x, weights, batch_sizes, batch)
    T, N, B, H, P, D, own_H, own_P = sizes
    G = len(cell.gates)
    projected = weights[0][4] is not None
    kept = cell.saved_slots(projected)
    h, s = running(cell, state, sizes, x, x.dtype)
    *leading, _ = x.shape
    out = x.new_empty(*leading, D * P)
    saved = x.new_empty(D, N, kept, H) if save else None
    rows = x.flatten(0, -2)
    gx = [
        padded(F.linear(rows, w_ih, b_ih).view(N, G, own_H), H) for w_ih, _, b_ih, _, _ in weights
    ]
    w_hh = [_panels(padded_gates(cell, w, H, P).t()) for _, w, *_ in weights]
    w_hr = [None if w is None else _panels(padded(w, P, H).t()) for *_, w in weights]
    columns, columns_hr = (0 if w[0] is None else _columns(w[0]) for w in (w_hh, w_hr))
    bias = [
        x.new_zeros(columns) if b is None else padded(padded_gates(cell, b, H), columns)
        for *_, b, _ in weights
    ]
    zeros, offsets = x.new_zeros(columns_hr), _offsets(sizes, batch_sizes)
    kernel, _ = sequence.compiled(ELEMENTS[x.dtype])
    step, _ = cells.compiled(cell.mode, ELEMENTS[x.dtype])
    numbers_ = (T, B, H, P, D, own_H, own_P, G, len(cell.states), kept, columns, columns_hr)

    def arguments(d: int, begin: int, end: int) -> tuple[Any, ...]:
        scratch = x.new_empty(end - begin + 1, columns + kept * H + columns_hr)
        of_direction = (gx[d], w_hh[d], bias[d], zeros if w_hr[d] is None else w_hr[d], zeros)
        state_of = (h[d], s[:, d], out[..., d * P :], zeros if saved is None else saved[d])
        return (
            step, 0.0, *of_direction, offsets, *state_of, scratch, *numbers_, d == 1, save,
            begin, end,
        )  # fmt: skip

    _run(kernel, sizes, 2 * N * D * G * H * P, arguments)
    directions = len(leading) == 2 or batch_sizes is not None
    return own_rows(out, D, own_P), own_states(h, s, sizes, x.dtype, directions), saved


def backward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
) -> tuple[Tensor, State, Tensor | None]:
    """The recurrence in reverse: the fields of ``backends.products.Recurrence``."""
    sizes = numbers(cell, x, weights, batch_sizes, batch)
    T, N, B, H, P, D, own_H, own_P = sizes
    G = len(cell.gates)
    projected = weights[0][4] is not None
    h0, _ = running(cell, None if state is None else state[:1], sizes, x, x.dtype)
    dh, ds = running(cell, dfinal, sizes, x, x.dtype)
    directions = out.dim() == 3 or batch_sizes is not None
    out = padded_rows(out, D, P)
    dout = None if dout is None else padded_rows(dout, D, P)
    dpre = x.new_empty(D, N, cell.slots, H)
    dh_all = x.new_empty(D, N, P) if projected else None
    w_hh = [_panels(padded_gates(cell, w, H, P)) for _, w, *_ in weights]
    w_hr = [None if w is None else _panels(padded(w, P, H)) for *_, w in weights]
    columns, columns_hr = (0 if w[0] is None else _columns(w[0]) for w in (w_hh, w_hr))
    zeros, offsets = x.new_zeros(max(columns, columns_hr)), _offsets(sizes, batch_sizes)
    _, kernel = sequence.compiled(ELEMENTS[x.dtype])
    _, step = cells.compiled(cell.mode, ELEMENTS[x.dtype])
    numbers_ = (
        T,
        B,
        H,
        P,
        D,
        own_H,
        own_P,
        G,
        cell.shared,
        len(cell.states),
        saved.shape[2],
        columns,
    )

    def arguments(d: int, begin: int, end: int) -> tuple[Any, ...]:
        scratch = x.new_empty(end - begin, G * H + columns + columns_hr)
        rows = (saved[d], out[..., d * P :], zeros if dout is None else dout[..., d * P :], h0[d])
        of_direction = (w_hh[d], zeros if w_hr[d] is None else w_hr[d], zeros)
        results = (dh[d], ds[:, d], dpre[d], zeros if dh_all is None else dh_all[d])
        return (
            step, 0.0, *rows, *of_direction, offsets, *results, scratch, *numbers_, columns_hr,
            d == 1, dout is not None, begin, end,
        )  # fmt: skip

    _run(kernel, sizes, 2 * N * D * G * H * P, arguments)
    dstate = own_states(dh, ds, sizes, x.dtype, directions)
    return dpre[..., :own_H], dstate, None if dh_all is None else dh_all[..., :own_P]
