"""One autograd Function behind every cell, direction and backend.

A backend does the recurrence. What is no recurrence is done here once, for all of them: with the
gradients of the pre-activations ``dgx`` and ``dgh`` of a whole sequence,

    dx    = dgx W_ih        dW_ih = dgx^T x         db_ih = sum dgx
    dW_hr = dh^T m          dW_hh = dgh^T h_before  db_hh = sum dgh
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn.backends import Backend, State, Weights
from fastrnn.cells import Cell
from fastrnn.rows import previous

__all__ = ["layer"]

PER_DIRECTION = len(Weights.__args__)  # type: ignore[attr-defined]
BEFORE_X = 5  # arguments of _Layer.forward


def layer(
    backend: Backend,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> tuple[Tensor, State]:
    """Run one layer; see :class:`fastrnn.backends.Backend` for the arguments.

    With no gradient to compute, no Function is entered and nothing is saved.
    """
    if _differentiable(x, weights, state):
        out, *final = _Layer.apply(  # type: ignore[no-untyped-call]
            backend, cell, batch_sizes, batch, len(weights), x, *chain(*weights), *(state or ())
        )
        return out, tuple(final)
    out, final_state, _ = backend.forward(cell, x, weights, state, batch_sizes, batch, save=False)
    return out, final_state


def _differentiable(x: Tensor, weights: Sequence[Weights], state: State | None) -> bool:
    # A dual tensor need not require grad; outside the Function its tangent would be lost unsaid.
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    for direction in weights:
        for w in direction:
            if w is not None and w.requires_grad:
                return True
    return state is not None and any(s.requires_grad for s in state)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        cell: Cell,
        batch_sizes: Tensor | None,
        batch: int,
        D: int,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, state = _unflatten(D, tensors)
        out, final, saved = backend.forward(cell, x, weights, state, batch_sizes, batch, save=True)
        ctx.backend, ctx.cell, ctx.batch_sizes = backend, cell, batch_sizes
        ctx.batch, ctx.D = batch, D
        ctx.save_for_backward(x, out, saved, *tensors)
        ctx.set_materialize_grads(False)
        return out, *final

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *dfinal: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            grads = _Layer._gradients(ctx, dout, dfinal)
        # With create_graph=True these would otherwise be constants to whoever differentiates again.
        if torch.is_grad_enabled():
            anchor = torch.empty(0, requires_grad=True)
            _, *grads = _Once.apply(anchor, *grads)  # type: ignore[no-untyped-call]
        return tuple(grads)

    @staticmethod
    def _gradients(
        ctx: Any, dout: Tensor | None, dfinal: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        x, out, saved, *tensors = ctx.saved_tensors
        cell, batch_sizes, batch, D = ctx.cell, ctx.batch_sizes, ctx.batch, ctx.D
        rows_x, rows_h = x.flatten(0, -2), out.flatten(0, -2)
        weights, state = _unflatten(D, tensors)
        need_x, *need = ctx.needs_input_grad[BEFORE_X:]
        if dout is None and all(g is None for g in dfinal):
            return (None,) * (BEFORE_X + 1 + len(tensors))
        dpre, dbias, dstate, dh = ctx.backend.backward(
            cell, weights, state, batch_sizes, batch, out, saved, dout, dfinal
        )
        G, shared, H = len(cell.gates), cell.shared, dpre.shape[-1]
        P = weights[0][1].shape[1]
        dx: Tensor | None = None
        grads: list[Tensor | None] = []
        matmul = ctx.backend.matmul
        for d, (w_ih, w_hh, _, _, w_hr) in enumerate(weights):
            slots = _direction(dpre, d, D, -1, cell.slots * H)
            dgx = _columns(slots, 0, G * H)
            need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = need[
                d * PER_DIRECTION : (d + 1) * PER_DIRECTION
            ]
            dw_ih = dw_hh = dw_hr = None
            if need_x:
                if dx is None:
                    dx = _like(x)
                matmul(dgx, w_ih, dx.view(rows_x.shape), d > 0)
            if need_w_ih:
                dw_ih = _like(w_ih)
                matmul(dgx.t(), rows_x, dw_ih)
            if need_w_hh:
                dw_hh = _like(w_hh)
                h0 = None if state is None else _direction(state[0], d, D, batch, P)
                h = _columns(rows_h, d * P, (d + 1) * P)
                before = _before(h, h0, batch_sizes, batch, d == 1)
                if not before:
                    dw_hh.zero_()
                for k, (first, last, h) in enumerate(before):
                    part = _rows(slots, first, last)
                    shared_part = _columns(part, 0, shared * H)
                    matmul(shared_part.t(), h, _rows(dw_hh, 0, shared * H), k > 0)
                    if shared < G:
                        matmul(part[:, G * H :].t(), h, dw_hh[shared * H :], k > 0)
            if need_w_hr and w_hr is not None and dh is not None:
                dw_hr = _like(w_hr)
                matmul(dh[d].t(), saved[d, :, -1], dw_hr)
            # Two tensors, not two views of one: each may become some parameter's .grad.
            db = _direction(dbias, d, D, cell.slots * H)
            db_ih = _rows(db, 0, G * H) if need_b_ih else None
            db_hh = None
            if need_b_hh:
                db_hh = db.clone() if shared == G else torch.cat([db[: shared * H], db[G * H :]])
            grads += [dw_ih, dw_hh, db_ih, db_hh, dw_hr]
        if state is not None:
            grads += [
                g if needed else None
                for g, needed in zip(dstate, need[D * PER_DIRECTION :], strict=True)
            ]
        return (*(None,) * BEFORE_X, dx, *grads)


class _Once(torch.autograd.Function):
    """Hands gradients on, and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Any, ...]:
        return anchor.view_as(anchor), *(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(
            "fastrnn's layers cannot be differentiated twice: double backward is not supported"
        )


def _unflatten(D: int, tensors: Sequence[Tensor]) -> tuple[list[Weights], State | None]:
    end = D * PER_DIRECTION
    weights = [
        cast(Weights, tuple(tensors[k : k + PER_DIRECTION])) for k in range(0, end, PER_DIRECTION)
    ]
    return weights, tuple(tensors[end:]) or None


def _before(
    h: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, batch: int, reverse: bool
) -> list[tuple[int, int, Tensor]]:
    """The h that the recurrent product read: for rows [first, last) their values.

    In a dense batch these are the rows of h one step away, so nothing is copied; a missing ``h0``
    is zero and adds nothing.
    """
    N = h.shape[0]
    if batch_sizes is not None:
        first = h.new_zeros(batch, h.shape[1]) if h0 is None else h0
        return [(0, N, previous(h, first, batch_sizes, reverse))]
    last = N - batch
    parts = []
    if last > 0:
        parts.append((0, last, h[batch:]) if reverse else (batch, N, h[:last]))
    if h0 is not None:
        parts.append((last, N, h0) if reverse else (0, batch, h0))
    return parts


# A view costs more than a small product: what is whole is not cut.


def _direction(t: Tensor, d: int, D: int, *shape: int) -> Tensor:
    return (t if D == 1 else t[d]).view(shape)


def _rows(t: Tensor, first: int, last: int) -> Tensor:
    return t if last - first == t.shape[0] else t[first:last]


def _columns(t: Tensor, first: int, last: int) -> Tensor:
    return t if last - first == t.shape[1] else t[:, first:last]


def _like(w: Tensor) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)
