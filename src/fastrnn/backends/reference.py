"""The reference backend: the definition of correct, in plain torch, for any dtype and device.

A step with n rows only changes the first n rows of the running state. A sequence that has ended
(or, in the reverse direction, not begun) keeps its state, and one loop serves dense batches, packed
batches and both directions.

``forward`` writes nothing in place, so that torch can differentiate and transform it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.backends import Gradients, StackSizes
from fastrnn.backends.products import (
    HALF_DTYPES,
    Recurrence,
    backward_in_float32,
    check_saved,
    forward_in_float32,
    gradients,
    in_own_dtype,
    saved_dtype,
)
from fastrnn.cells import Cell, State
from fastrnn.layer import Layer

__all__ = [
    "VALIDATES",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "kind",
    "missing",
    "refuses",
    "saved_spec",
]

kind: Literal["layer"] = "layer"
VALIDATES = False


def missing() -> str | None:
    return None


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: StackSizes | None = None,
    automatic: bool = False,
) -> str | None:
    if not dtype.is_floating_point:
        return f"expected a real floating-point dtype, got {dtype}"
    return None


def empty_cache() -> None:
    pass


def describe() -> str:
    return "plain torch, one step at a time"


def saved_spec(layer: Layer, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return layer.saved_shape(layer.H), saved_dtype(dtype)


@in_own_dtype
def forward(layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
    if x.dtype in HALF_DTYPES:
        return forward_in_float32(forward, layer, x, save)
    *leading, _ = x.shape
    x = x.flatten(0, -2)
    cell, rows, N = layer.cell, layer.rows, x.shape[0]
    G, H, P, summed = layer.G, layer.H, layer.P, cell.summed
    state = layer.zero_state(x) if layer.state is None else layer.state
    outs, finals, saved = [], [], []
    for d, w in enumerate(layer.weights):
        gates_x = F.linear(x, w.ih, w.bias_ih).view(N, G, H)
        now = [s if rows.one_step else s[d] for s in state]
        out_of_step, saved_of_step = [], []
        for step in rows.steps(reverse=d == 1):
            n = step.stop - step.start
            running = [s[:n] for s in now]
            gx = gates_x[step].unbind(1)
            gh = F.linear(running[0], w.hh, w.bias_hh).view(n, G, H).unbind(1)
            sums = [a + b for a, b in zip(gx[:summed], gh[:summed], strict=True)]
            y, v = cell.forward([*sums, *gx[summed:], *gh[summed:]], running)
            h = y[0] if w.hr is None else F.linear(y[0], w.hr)
            new = (h, *y[1:])
            ended = [s[n:] for s in now] if n < rows.B else ()
            now = [torch.cat(s) for s in zip(new, ended, strict=True)] if ended else list(new)
            out_of_step.append(h)
            if save:
                values = [*v, *running[1:], *y[: layer.projected]]
                saved_of_step.append(torch.stack(values, 1) if values else h.new_empty(n, 0, H))
        order = slice(None, None, -1 if d == 1 else 1)
        outs.append(torch.cat([x.new_empty(0, P), *out_of_step[order]]).view(*leading, P))
        finals.append(now)
        if save:
            empty = x.new_empty(0, cell.num_saved(layer.projected), H)
            saved.append(torch.cat([empty, *saved_of_step[order]]))
    out = torch.cat(outs, -1)  # not a view, which could not be edited after no_grad
    final = tuple(
        s[0].clone() if rows.one_step else torch.stack(s) for s in zip(*finals, strict=True)
    )
    return out, final, torch.stack(saved) if save else None


@in_own_dtype
def backward(
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Gradients:
    if x.dtype in HALF_DTYPES:
        return backward_in_float32(backward, layer, x, out, saved, dout, dfinal, needed)
    check_saved(layer, x, out, saved, saved_spec(layer, x.dtype)[0])
    cell, rows, G, P, summed = layer.cell, layer.rows, layer.G, layer.P, layer.cell.summed
    B = rows.B
    D, N, _, H = saved.shape
    h = out.view(N, D, P)
    dout = h.new_zeros(N, D, P) if dout is None else dout.reshape(N, D, P)
    dstate = tuple(
        h.new_zeros(*layer.leading, H if k else P)
        if g is None
        else g.clone(memory_format=torch.contiguous_format)
        for k, g in enumerate(dfinal)
    )
    by_direction = [g.view(D, B, H if k else P) for k, g in enumerate(dstate)]
    dpre = saved.new_empty(D, N, cell.num_preacts, H)
    dh = saved.new_empty(D, N, P) if layer.projected else None
    for d, w in enumerate(layer.weights):
        h0 = h.new_zeros(B, P) if layer.state is None else layer.state[0].view(D, B, P)[d]
        h_before = rows.previous(h[:, d], h0, reverse=d == 1)
        for step in reversed(rows.steps(reverse=d == 1)):
            running = [g[d, : step.stop - step.start] for g in by_direction]
            dh_step = dout[step, d] + running[0]
            if dh is not None:
                dh[d, step] = dh_step
            dh_cell = dh_step if w.hr is None else dh_step @ w.hr
            values = saved[d, step].unbind(1)
            v, s = values[: len(cell.saved)], values[len(cell.saved) :]
            dvalues, ds = cell.backward(
                v,
                (h_before[step], *s[: len(cell.states) - 1]),
                h[step, d],
                (dh_cell, *running[1:]),
            )
            for k, value in enumerate(dvalues):
                dpre[d, step, k] = value
            dgh = torch.stack([*dvalues[:summed], *dvalues[G:]], 1).flatten(1)
            running[0].copy_(dgh @ w.hh)
            if ds[0] is not None:
                running[0].add_(ds[0])
            for old, new in zip(running[1:], ds[1:], strict=True):
                old.zero_() if new is None else old.copy_(new)
    return gradients(layer, x, out, saved, needed, Recurrence(dpre, dstate, dh))
