"""The tensors that the kernels read, and the threads that run them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from itertools import pairwise
from threading import Barrier
from typing import Any, TypeVar

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.cells import State
from fastrnn.kernels.numba import cells, sequence
from fastrnn.kernels.numba.simd import PANEL, Vector
from fastrnn.kernels.padding import (
    PaddedSizes,
    own_rows,
    own_states,
    padded,
    padded_gates,
    padded_rows,
    padded_sizes,
    plain,
    running_states,
)
from fastrnn.layer import Layer, Rows

__all__ = ["backward", "forward"]

ELEMENTS = {torch.float32: numba.float32, torch.float64: numba.float64}

WORTH_A_THREAD = 1 << 24
"""Floating-point operations per thread, below which waking a thread costs more than it saves."""

CACHED = 2 << 20
"""Bytes of weights that stay in a processor's own caches from one step to the next."""

_pool: tuple[int, ThreadPoolExecutor] | None = None
"""The number of threads, and their pool."""


def _forget() -> None:
    """Drop the pool after a fork, which its threads do not survive."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# Hashing a Numba type takes microseconds.
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
    """The address of an element; 0, which no kernel reads, without a tensor."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.itemsize


_Arguments = TypeVar("_Arguments", sequence.ForwardArguments, sequence.BackwardArguments)


def _share(
    arguments: _Arguments, scratch: Mapping[str, Tensor], d: int, begin: int, end: int
) -> _Arguments:
    """The arguments of a kernel for sequences ``begin`` to ``end`` of a direction.

    Args:
        scratch: tensors ``[D, B, *]`` by parameter.
    """
    addresses = {n: _at(t, (d * t.shape[1] + begin) * t.shape[2]) for n, t in scratch.items()}
    return arguments._replace(**addresses, begin=begin, end=end)


def _over_steps(arguments: _Arguments, first: int, end: int) -> tuple[Any, ...]:
    """The arguments with a range of steps or turns, the last two parameters."""
    return (*arguments[:-2], first, end)


def _run(
    kernel: Any,
    sizes: PaddedSizes,
    flops: int,
    steps: int,
    arguments: Sequence[_Arguments],
    scratch: Mapping[str, Tensor],
) -> None:
    """Run all steps of a kernel on shares of the sequences in parallel, one in this thread."""
    global _pool
    threads = min(torch.get_num_threads(), max(1, flops // WORTH_A_THREAD))
    parts = min(sizes.B, max(1, threads // sizes.D))
    bounds = [sizes.B * k // parts for k in range(parts + 1)] if parts else []
    shares = [(d, pair) for d in range(sizes.D) for pair in pairwise(bounds)]
    calls = [_over_steps(_share(arguments[d], scratch, d, *pair), 0, steps) for d, pair in shares]
    others: list[Future[None]] = []
    try:
        if threads > 1 and len(calls) > 1:
            with suppress(RuntimeError):  # no thread can be started while the interpreter exits
                if _pool is None or _pool[0] < len(calls) - 1:
                    _pool = len(calls) - 1, _team(len(calls) - 1)
                for call in calls[:-1]:
                    others.append(_pool[1].submit(kernel, *call))
        for call in calls[len(others) :]:
            kernel(*call)
    finally:
        _finish(others)


def _team(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run: one that failed to start later would never finish its call.

    Raises:
        RuntimeError: they cannot be started.
    """
    team, started = (
        ThreadPoolExecutor(count, "fastrnn-numba", torch.set_flush_denormal, (True,)),
        Barrier(count),
    )
    try:
        waiting = [team.submit(started.wait) for _ in range(count)]
    except RuntimeError:
        started.abort()
        team.shutdown()
        raise
    wait(waiting)
    return team


def _finish(others: Sequence[Future[None]]) -> None:
    """Wait for kernels, even when interrupted: their memory must not be freed before."""
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


def _uses_blas(sizes: PaddedSizes, w_hh: Tensor) -> bool:
    """Whether torch's library multiplies by W_hh, one step at a time, and not the kernel.

    torch needs no panels, whose packing does not pay for one step. Where a single sequence reads
    more weights than one processor caches, torch's threads share them; the kernel has one thread.
    """
    threads_share = sizes.B * sizes.D == 1 and w_hh.nbytes > CACHED and torch.get_num_threads() > 1
    return sizes.T == 1 or threads_share


def _panels(w: Tensor) -> Tensor:
    """``w [K, columns]`` in panels ``[*, K, width]``; the last is padded with zeros."""
    width = _width(w.dtype)
    K, columns = w.shape
    count = -(-columns // width)
    w = padded(w, count * width)
    panels: Tensor = w.reshape(K, count, width).transpose(0, 1).contiguous()
    return panels


def _columns(panels: Tensor) -> int:
    return panels.shape[0] * panels.shape[2]


def _row_counts(rows: Rows) -> tuple[list[int], Tensor | None]:
    """The number of rows in each step and, for a packed batch, the first row of each step.

    The kernels read by address, so that the batch sizes are checked here once more.

    Raises:
        ValueError: the steps do not have N rows in total, or a step has more than the one before.
    """
    sizes = rows.batch_sizes
    if sizes is None:
        return [rows.B] * rows.T, None
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    allowed = torch.cat([sizes.new_full((1,), rows.B), sizes[:-1]])
    if (
        sizes.dtype != torch.int64
        or offsets[-1] != rows.N
        or ((sizes > allowed) | (sizes < 0)).any()
    ):
        raise ValueError(
            f"expected batch_sizes that start with at most {rows.B}, never increase, and add up "
            f"to {rows.N}, got {sizes.tolist()}"
        )
    return sizes.tolist(), offsets


def _common(layer: Layer, sizes: PaddedSizes) -> dict[str, Any]:
    """The arguments that both passes have, and that are the same for both directions."""
    common = {"zero": 0.0, "G": layer.G, "states": len(layer.cell.states), **sizes._asdict()}
    del common["N"]
    return common


def forward(layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
    """As ``fastrnn.backends.LayerBackend.forward``."""
    sizes = padded_sizes(layer)
    T, N, B, H_pad, P_pad, D, H, P = sizes
    cell, G, projected = layer.cell, layer.G, layer.projected
    num_saved = cell.num_saved(projected)
    h, s = running_states(layer, layer.state, sizes, x, x.dtype)
    out = x.new_empty(*x.shape[:-1], D * P_pad)
    saved = x.new_empty(layer.saved_shape(H_pad)) if save else None
    inputs = x.flatten(0, -2)
    gx = [F.linear(inputs, w.ih, w.bias_ih) for w in layer.weights]
    if H_pad != H:
        gx = [padded(g.view(N, G, H), H_pad) for g in gx]
    w_hh = [padded_gates(layer, w.hh, H_pad, P_pad).t() for w in layer.weights]
    w_hr = [
        None if w.hr is None else _panels(padded(plain(w.hr), P_pad, H_pad).t())
        for w in layer.weights
    ]
    bias = [
        None if w.bias_hh is None else padded_gates(layer, w.bias_hh, H_pad).contiguous()
        for w in layer.weights
    ]
    counts, offsets = _row_counts(layer.rows)
    uses_blas = _uses_blas(sizes, w_hh[0])
    columns, columns_hr = G * H_pad, 0 if w_hr[0] is None else _columns(w_hr[0])
    if not uses_blas:
        w_hh = [_panels(w) for w in w_hh]
        columns = _columns(w_hh[0])
        bias = [x.new_zeros(columns) if b is None else padded(b, columns) for b in bias]
    zeros = x.new_zeros(columns_hr) if projected else None
    gh = x.new_empty(D, B, columns)
    scratch = x.new_empty(D, B, H_pad + columns_hr + num_saved * H_pad)
    step, _ = _cells(cell.mode, x.dtype)
    kernel, _ = _kernels(x.dtype)
    common = _common(layer, sizes)
    arguments = [
        sequence.ForwardArguments(
            cell=step,
            **common,
            gx=_at(gx[d]),
            w_hh=_at(w_hh[d]),
            bias=_at(bias[d]),
            w_hr=_at(w_hr[d]),
            zeros=_at(zeros),
            offsets=_at(offsets),
            h=_at(h, d * B * P_pad),
            s=_at(s, d * B * H_pad),
            out=_at(out, d * P_pad),
            saved=_at(saved, d * N * num_saved * H_pad),
            num_saved=num_saved,
            columns=columns,
            columns_hr=columns_hr,
            reverse=d == 1,
            packed=offsets is not None,
            save=save,
            multiply=not uses_blas,
        )
        for d in range(D)
    ]
    buffers = {"gh": gh, "scratch": scratch}
    if not uses_blas:
        _run(kernel, sizes, 2 * N * D * G * H_pad * P_pad, T, arguments, buffers)
    else:
        calls = [_share(a, buffers, d, 0, B) for d, a in enumerate(arguments)]
        for k in range(T):
            for d, (call, w, b) in enumerate(zip(calls, w_hh, bias, strict=True)):
                n = counts[T - 1 - k if d else k]
                if b is None:
                    torch.mm(h[d, :n], w, out=gh[d, :n])
                else:
                    torch.addmm(b, h[d, :n], w, out=gh[d, :n])
                kernel(*_over_steps(call, k, k + 1))
    return own_rows(out, sizes), own_states(layer, h, s, sizes, x.dtype), saved


def backward(
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
) -> tuple[Tensor, State, Tensor | None, list[slice]]:
    """The recurrence backward: the fields of ``backends.products.Recurrence``."""
    sizes = padded_sizes(layer)
    T, N, B, H_pad, P_pad, D, H, P = sizes
    cell, G, projected = layer.cell, layer.G, layer.projected
    num_saved, num_preacts = saved.shape[2], cell.num_preacts
    h0, _ = running_states(layer, layer.state and layer.state[:1], sizes, x, x.dtype)
    dh, ds = running_states(layer, dfinal, sizes, x, x.dtype)
    out = padded_rows(out, sizes)
    dout = None if dout is None else padded_rows(dout, sizes)
    dpre = x.new_empty(D, N, num_preacts, H_pad)
    dh_all = x.new_empty(D, N, P_pad) if projected else None
    w_hh = [padded_gates(layer, w.hh, H_pad, P_pad) for w in layer.weights]
    w_hr = [
        None if w.hr is None else _panels(padded(plain(w.hr), P_pad, H_pad)) for w in layer.weights
    ]
    counts, offsets = _row_counts(layer.rows)
    uses_blas = _uses_blas(sizes, w_hh[0])
    columns, columns_hr = P_pad, 0 if w_hr[0] is None else _columns(w_hr[0])
    if not uses_blas:
        w_hh = [_panels(w) for w in w_hh]
        columns = _columns(w_hh[0])
    zeros = x.new_zeros(max(columns, columns_hr))
    dgh, dh_product = x.new_empty(D, B, G * H_pad), x.new_empty(D, B, columns)
    # Of each share of the sequences, at its first: see the kernel. T + 1 and -1 are unknown.
    ending = torch.tensor([T + 1, -1], device="cpu").repeat(D, max(B, 1), 1)
    buffers = {
        "dgh": dgh,
        "dh_product": dh_product,
        "scratch": x.new_empty(D, B, columns_hr),
        "ending": ending,
    }
    _, step = _cells(cell.mode, x.dtype)
    _, kernel = _kernels(x.dtype)
    common = _common(layer, sizes)
    arguments = [
        sequence.BackwardArguments(
            cell=step,
            **common,
            saved=_at(saved, d * N * num_saved * H_pad),
            out=_at(out, d * P_pad),
            dout=_at(dout, d * P_pad),
            h0=_at(h0, d * B * P_pad),
            w_hh=_at(w_hh[d]),
            w_hr=_at(w_hr[d]),
            zeros=_at(zeros),
            offsets=_at(offsets),
            dh=_at(dh, d * B * P_pad),
            ds=_at(ds, d * B * H_pad),
            dpre=_at(dpre, d * N * num_preacts * H_pad),
            dh_all=_at(dh_all, d * N * P_pad),
            summed=cell.summed,
            num_saved=num_saved,
            columns=columns,
            columns_hr=columns_hr,
            reverse=d == 1,
            packed=offsets is not None,
            has_dout=dout is not None,
            multiply=not uses_blas,
        )
        for d in range(D)
    ]
    if not uses_blas:
        _run(kernel, sizes, 2 * N * D * G * H_pad * P_pad, T + 1, arguments, buffers)
    else:
        calls = [_share(a, buffers, d, 0, B) for d, a in enumerate(arguments)]
        first_steps = ending[:, 0, 0].numpy()
        for k in range(T + 1):
            for d, (call, w) in enumerate(zip(calls, w_hh, strict=True)):
                if first_steps[d] <= T:
                    continue
                if k > 0:
                    n = counts[k - 1 if d else T - k]
                    torch.mm(dgh[d, :n], w, out=dh_product[d, :n])
                kernel(*_over_steps(call, k, k + 1))
    dstate = own_states(layer, dh, ds, sizes, x.dtype)
    live = []
    for d, first in enumerate(ending[:, :, 0].amin(1).clamp(max=T).tolist()):
        live.append(slice(0, sum(counts[: T - first])) if d else slice(sum(counts[:first]), N))
    return dpre[..., :H], dstate, None if dh_all is None else dh_all[..., :P], live
