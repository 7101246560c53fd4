"""The tensors that the kernels read, and the threads that run them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from itertools import pairwise
from threading import Barrier
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
    plain,
    running,
)

__all__ = ["backward", "forward"]

ELEMENTS = {torch.float32: numba.float32, torch.float64: numba.float64}

WORTH_A_THREAD = 1 << 24
"""Floating-point operations: with fewer, waking a thread takes longer than its share."""

CACHED = 2 << 20
"""Bytes of weights that stay near a processor from one step to the next."""

_pool: tuple[int, ThreadPoolExecutor] | None = None
"""With the number of its threads."""


def _forget() -> None:
    """No thread survives a fork."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# Numba's own types take microseconds to hash.
@cache
def _kernels(dtype: torch.dtype) -> tuple[Any, Any]:
    found: tuple[Any, Any] = sequence.compiled(ELEMENTS[dtype])
    return found


@cache
def _cells(mode: str, dtype: torch.dtype) -> tuple[int, int]:
    forward, backward = cells.compiled(mode, ELEMENTS[dtype])
    return forward.address, backward.address


@cache
def _width(dtype: torch.dtype) -> int:
    """Columns of a panel."""
    columns: int = PANEL * Vector(ELEMENTS[dtype]).lanes
    return columns


def _at(tensor: Tensor | None, index: int = 0) -> int:
    """The address of an element; nobody looks at that of none."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.itemsize


def _arguments(
    fixed: Sequence[tuple[Any, ...]], scratch: Sequence[Tensor], d: int, begin: int, end: int
) -> tuple[Any, ...]:
    """Of a kernel, for sequences of a direction, up to the steps.

    Args:
        fixed: of each direction those that are the same for all sequences.
        scratch: tensors ``[D, B, *]``.
    """
    places = [_at(t, (d * t.shape[1] + begin) * t.shape[2]) for t in scratch]
    return (*fixed[d], *places, begin, end)


def _run(
    kernel: Any,
    sizes: Numbers,
    flops: int,
    steps: int,
    fixed: Sequence[tuple[Any, ...]],
    scratch: Sequence[Tensor],
) -> None:
    """All steps of a kernel on shares of the sequences, side by side; the last in this thread."""
    global _pool
    threads = min(torch.get_num_threads(), max(1, flops // WORTH_A_THREAD))
    parts = min(sizes.B, max(1, threads // sizes.D))
    bounds = [sizes.B * k // parts for k in range(parts + 1)] if parts else []
    shares = [(d, *pair) for d in range(sizes.D) for pair in pairwise(bounds)]
    calls = [(*_arguments(fixed, scratch, *share), 0, steps) for share in shares]
    others: list[Future[None]] = []
    try:
        if threads > 1 and len(calls) > 1:
            with suppress(RuntimeError):  # no thread can be started, as when the interpreter ends
                if _pool is None or _pool[0] < len(calls) - 1:
                    _pool = len(calls) - 1, _team(len(calls) - 1)
                for call in calls[:-1]:
                    others.append(_pool[1].submit(kernel, *call))
        for call in calls[len(others) :]:
            kernel(*call)
    finally:
        _finish(others)


def _team(count: int) -> ThreadPoolExecutor:
    """So many threads that run: a thread that fails to start later would leave its call behind.

    Raises:
        RuntimeError: they cannot be started.
    """
    team, all_here = ThreadPoolExecutor(count, "fastrnn-numba"), Barrier(count)
    try:
        here = [team.submit(all_here.wait) for _ in range(count)]
    except RuntimeError:
        all_here.abort()
        team.shutdown()
        raise
    wait(here)
    return team


def _finish(others: Sequence[Future[None]]) -> None:
    """Wait for kernels, whatever comes between: they write to memory that would else be freed."""
    interrupt: BaseException | None = None
    while not all(other.done() for other in others):
        try:
            wait(others)
        except BaseException as error:
            interrupt = error
    if interrupt:
        raise interrupt
    for other in others:
        other.result()


def _apart(sizes: Numbers, weights: Tensor) -> bool:
    """Whether torch's library of matrices multiplies by W_hh, a step at a time.

    It needs no panels, which do not pay for one step; and where each of its threads keeps a part of
    the weights, a single sequence has only one thread of ours.
    """
    alone = sizes.B * sizes.D == 1 and weights.nbytes > CACHED and torch.get_num_threads() > 1
    return sizes.T == 1 or alone


def _panels(w: Tensor) -> Tensor:
    """``w [K, columns]`` in panels ``[*, K, width]``; the last is filled up with zeros."""
    width = _width(w.dtype)
    K, columns = w.shape
    count = -(-columns // width)
    w = padded(w, count * width)
    panels: Tensor = w.reshape(K, count, width).transpose(0, 1).contiguous()
    return panels


def _columns(panels: Tensor) -> int:
    return panels.shape[0] * panels.shape[2]


def _rows(sizes: Numbers, batch_sizes: Tensor | None) -> tuple[list[int], Tensor | None]:
    """Of each step how many rows it has, and the first; the latter of a packed batch only.

    Raises:
        ValueError: the steps have not N rows together, or one has more than the one before.
    """
    if batch_sizes is None:
        return [sizes.B] * sizes.T, None
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
    return batch_sizes.tolist(), offsets


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
    G, projected = len(cell.gates), weights[0][4] is not None
    kept = cell.num_saved(projected)
    h, s = running(cell, state, sizes, x, x.dtype)
    *leading, _ = x.shape
    out = x.new_empty(*leading, D * P)
    saved = x.new_empty(D, N, kept, H) if save else None
    inputs = x.flatten(0, -2)
    gx = [F.linear(inputs, w_ih, b_ih) for w_ih, _, b_ih, _, _ in weights]
    if own_H != H:
        gx = [padded(g.view(N, G, own_H), H) for g in gx]
    w_hh = [padded_gates(cell, w, H, P).t() for _, w, *_ in weights]
    w_hr = [None if w is None else _panels(padded(plain(w), P, H).t()) for *_, w in weights]
    bias = [None if b is None else padded_gates(cell, b, H).contiguous() for *_, b, _ in weights]
    rows, offsets = _rows(sizes, batch_sizes)
    apart = _apart(sizes, w_hh[0])
    columns, columns_hr = G * H, 0 if w_hr[0] is None else _columns(w_hr[0])
    if not apart:
        w_hh = [_panels(w) for w in w_hh]
        columns = _columns(w_hh[0])
        bias = [x.new_zeros(columns) if b is None else padded(b, columns) for b in bias]
    zeros = x.new_zeros(columns_hr) if projected else None
    gh = x.new_empty(D, B, columns)
    scratch = x.new_empty(D, B, H + columns_hr + kept * H)
    step, _ = _cells(cell.mode, x.dtype)
    kernel, _ = _kernels(x.dtype)
    fixed = [
        (
            step, 0.0, _at(gx[d]), _at(w_hh[d]), _at(bias[d]), _at(w_hr[d]), _at(zeros),
            _at(offsets), _at(h, d * B * P), _at(s, d * B * H), _at(out, d * P),
            _at(saved, d * N * kept * H), T, B, H, P, D, own_H, own_P, G, len(cell.states), kept,
            columns, columns_hr, d == 1, offsets is not None, save, not apart,
        )
        for d in range(D)
    ]  # fmt: skip
    if not apart:
        _run(kernel, sizes, 2 * N * D * G * H * P, T, fixed, (gh, scratch))
    else:
        calls = [_arguments(fixed, (gh, scratch), d, 0, B) for d in range(D)]
        for k in range(T):
            for d, (call, w, b) in enumerate(zip(calls, w_hh, bias, strict=True)):
                n = rows[T - 1 - k if d else k]
                if b is None:
                    torch.mm(h[d, :n], w, out=gh[d, :n])
                else:
                    torch.addmm(b, h[d, :n], w, out=gh[d, :n])
                kernel(*call, k, k + 1)
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
    G, projected = len(cell.gates), weights[0][4] is not None
    kept = saved.shape[2]
    h0, _ = running(cell, None if state is None else state[:1], sizes, x, x.dtype)
    dh, ds = running(cell, dfinal, sizes, x, x.dtype)
    directions = out.dim() == 3 or batch_sizes is not None
    out = padded_rows(out, D, P)
    dout = None if dout is None else padded_rows(dout, D, P)
    dpre = x.new_empty(D, N, cell.num_preacts, H)
    dh_all = x.new_empty(D, N, P) if projected else None
    w_hh = [padded_gates(cell, w, H, P) for _, w, *_ in weights]
    w_hr = [None if w is None else _panels(padded(plain(w), P, H)) for *_, w in weights]
    rows, offsets = _rows(sizes, batch_sizes)
    apart = _apart(sizes, w_hh[0])
    columns, columns_hr = P, 0 if w_hr[0] is None else _columns(w_hr[0])
    if not apart:
        w_hh = [_panels(w) for w in w_hh]
        columns = _columns(w_hh[0])
    zeros = x.new_zeros(max(columns, columns_hr))
    scratch = [x.new_empty(D, B, n) for n in (G * H, columns, columns_hr)]
    _, step = _cells(cell.mode, x.dtype)
    _, kernel = _kernels(x.dtype)
    fixed = [
        (
            step, 0.0, _at(saved, d * N * kept * H), _at(out, d * P), _at(dout, d * P),
            _at(h0, d * B * P), _at(w_hh[d]), _at(w_hr[d]), _at(zeros), _at(offsets),
            _at(dh, d * B * P), _at(ds, d * B * H), _at(dpre, d * N * cell.num_preacts * H),
            _at(dh_all, d * N * P), T, B, H, P, D, own_H, own_P, G, cell.summed,
            len(cell.states), kept, columns, columns_hr, d == 1, offsets is not None,
            dout is not None, not apart,
        )
        for d in range(D)
    ]  # fmt: skip
    if not apart:
        _run(kernel, sizes, 2 * N * D * G * H * P, T + 1, fixed, scratch)
    else:
        calls = [_arguments(fixed, scratch, d, 0, B) for d in range(D)]
        dgh, back, _ = scratch
        for k in range(T + 1):
            for d, (call, w) in enumerate(zip(calls, w_hh, strict=True)):
                if k > 0:
                    n = rows[k - 1 if d else T - k]
                    torch.mm(dgh[d, :n], w, out=back[d, :n])
                kernel(*call, k, k + 1)
    dstate = own_states(dh, ds, sizes, x.dtype, directions)
    return dpre[..., :own_H], dstate, None if dh_all is None else dh_all[..., :own_P]
