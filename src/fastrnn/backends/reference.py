"""The reference backend: the definition of correct, in plain torch, for any dtype and device.

Only the first n rows of the running state are touched at a step with n rows, so a sequence that has
ended (or, in reverse, not begun) keeps its state, and one loop serves dense, packed and reverse.

``forward`` writes nothing in place: torch can differentiate it, and transform it, as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.backends import Gradients, Sizes
from fastrnn.backends.products import (
    NARROW,
    Recurrence,
    backward_in_float32,
    forward_in_float32,
    gradients,
    in_own_dtype,
)
from fastrnn.cells import Cell, State, Weights
from fastrnn.rows import previous, steps

__all__ = [
    "CHECKS",
    "MULTIPLE",
    "STACKS",
    "WIDE",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "missing",
    "refuses",
]

CHECKS = False
MULTIPLE = 1
STACKS = False
WIDE = True


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
    if x.dtype in NARROW:
        return forward_in_float32(forward, cell, x, weights, state, batch_sizes, batch, save)
    *leading, _ = x.shape
    x = x.flatten(0, -2)
    N, D, G, shared = x.shape[0], len(weights), len(cell.gates), cell.shared
    H, P = weights[0][1].shape[0] // G, weights[0][1].shape[1]
    projected = weights[0][4] is not None
    directions = len(leading) == 2 or batch_sizes is not None
    if state is None:
        state = cell.zero_state(x, (D, batch) if directions else (batch,), H, P)
    outs, finals, kept = [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        gates_x = F.linear(x, w_ih, b_ih).view(N, G, H)
        now = [s[d] if directions else s for s in state]
        out_of_step, kept_of_step = [], []
        for rows in steps(N, batch, batch_sizes, reverse=d == 1):
            n = rows.stop - rows.start
            running = [s[:n] for s in now]
            gx = gates_x[rows].unbind(1)
            gh = F.linear(running[0], w_hh, b_hh).view(n, G, H).unbind(1)
            both = [a + b for a, b in zip(gx[:shared], gh[:shared], strict=True)]
            y, v = cell.forward([*both, *gx[shared:], *gh[shared:]], running)
            h = y[0] if w_hr is None else F.linear(y[0], w_hr)
            new = (h, *y[1:])
            ended = [s[n:] for s in now] if n < batch else ()
            now = [torch.cat(s) for s in zip(new, ended, strict=True)] if ended else list(new)
            out_of_step.append(h)
            values = [*v, *running[1:], *y[:projected]]
            kept_of_step.append(torch.stack(values, 1) if values else h.new_empty(n, 0, H))
        order = slice(None, None, -1 if d == 1 else 1)
        outs.append(torch.cat([x.new_empty(0, P), *out_of_step[order]]).view(*leading, P))
        finals.append(now)
        if save:
            empty = x.new_empty(0, cell.saved_slots(projected), H)
            kept.append(torch.cat([empty, *kept_of_step[order]]))
    out = torch.cat(outs, -1)  # no view, which could not be edited after no_grad
    final = tuple(torch.stack(s) if directions else s[0].clone() for s in zip(*finals, strict=True))
    return out, final, torch.stack(kept) if save else None


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
    if x.dtype in NARROW:
        return backward_in_float32(
            backward, cell, x, weights, state, batch_sizes, batch, out, saved, dout, dfinal, needed
        )
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
