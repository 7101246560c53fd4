"""The reference backend: the definition of correct, in plain torch, for any dtype and device.

Only the first n rows of the running state are touched at a step with n rows, so a sequence that has
ended (or, in reverse, not begun) keeps its state, and one loop serves dense, packed and reverse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.backends import Gradients, Sizes
from fastrnn.backends.products import Recurrence, gradients, in_own_dtype
from fastrnn.cells import Cell, State, Weights
from fastrnn.rows import previous, steps

__all__ = [
    "CHECKS",
    "STACKS",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "missing",
    "refuses",
]

CHECKS = False
STACKS = False


def missing() -> str | None:
    return None


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None = None,
    automatic: bool = False,
) -> str | None:
    if not dtype.is_floating_point:
        return f"expected a real floating-point dtype, got {dtype}"
    return None


def empty_cache() -> None:
    pass


def describe() -> str:
    return "plain torch, one step at a time"


@in_own_dtype
def forward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
) -> tuple[Tensor, State, Tensor | None]:
    *leading, _ = x.shape
    x = x.flatten(0, -2)
    N, D, G, shared = x.shape[0], len(weights), len(cell.gates), cell.shared
    H, P = weights[0][1].shape[0] // G, weights[0][1].shape[1]
    projected = weights[0][4] is not None
    directions = (D,) if len(leading) == 2 or batch_sizes is not None else ()
    result = tuple(x.new_zeros(*directions, batch, H if k else P) for k in cell.state_range)
    if state is not None:
        for new, old in zip(result, state, strict=True):
            new.copy_(old)
    final = [s.view(D, batch, H if k else P) for k, s in enumerate(result)]
    out = x.new_empty(N, D, P)
    saved = x.new_empty(D, N, cell.saved_slots(projected), H) if save else None
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        gates_x = F.linear(x, w_ih, b_ih).view(N, G, H)
        for rows in steps(N, batch, batch_sizes, reverse=d == 1):
            running = [s[d, : rows.stop - rows.start] for s in final]
            gx = gates_x[rows].unbind(1)
            gh = F.linear(running[0], w_hh, b_hh).view(-1, G, H).unbind(1)
            both = [a + b for a, b in zip(gx[:shared], gh[:shared], strict=True)]
            y, v = cell.forward([*both, *gx[shared:], *gh[shared:]], running)
            if saved is not None:
                for k, value in enumerate([*v, *running[1:], *y[:projected]]):
                    saved[d, rows, k] = value
            h = y[0] if w_hr is None else F.linear(y[0], w_hr)
            out[rows, d] = h
            for old, new in zip(running, (h, *y[1:]), strict=True):
                old.copy_(new)
    # In place: no view, which could not be edited after no_grad.
    return out.resize_(*leading, D * P), result, saved


@in_own_dtype
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
    needed: Sequence[bool],
) -> Gradients:
    (D, N, _, H), G, shared = saved.shape, len(cell.gates), cell.shared
    P = weights[0][1].shape[1]
    projected = weights[0][4] is not None
    directions = (D,) if out.dim() == 3 or batch_sizes is not None else ()
    out = out.view(N, D, P)
    dout = out.new_zeros(N, D, P) if dout is None else dout.reshape(N, D, P)
    result = tuple(
        out.new_zeros(*directions, batch, H if k else P)
        if g is None
        else g.clone(memory_format=torch.contiguous_format)
        for k, g in enumerate(dfinal)
    )
    dstate = [g.view(D, batch, H if k else P) for k, g in enumerate(result)]
    dpre = saved.new_empty(D, N, cell.slots, H)
    dh = saved.new_empty(D, N, P) if projected else None
    for d, (_, w_hh, _, _, w_hr) in enumerate(weights):
        h0 = out.new_zeros(batch, P) if state is None else state[0].view(D, batch, P)[d]
        h_before = previous(out[:, d], h0, batch_sizes, reverse=d == 1)
        for rows in reversed(steps(N, batch, batch_sizes, reverse=d == 1)):
            running = [s[d, : rows.stop - rows.start] for s in dstate]
            dh_step = dout[rows, d] + running[0]
            if dh is not None:
                dh[d, rows] = dh_step
            dm = dh_step if w_hr is None else dh_step @ w_hr
            slots = saved[d, rows].unbind(1)
            v, s = slots[: len(cell.saved)], slots[len(cell.saved) :]
            dslots, ds = cell.backward(
                v, (h_before[rows], *s[: len(cell.states) - 1]), out[rows, d], (dm, *running[1:])
            )
            for k, value in enumerate(dslots):
                dpre[d, rows, k] = value
            dgh = torch.stack([*dslots[:shared], *dslots[G:]], 1).flatten(1)
            running[0].copy_(dgh @ w_hh)
            if ds[0] is not None:
                running[0].add_(ds[0])
            for old, new in zip(running[1:], ds[1:], strict=True):
                old.zero_() if new is None else old.copy_(new)
    recurrence = Recurrence(dpre, result, dh)
    return gradients(cell, x, weights, state, batch_sizes, batch, out, saved, needed, recurrence)
