"""One autograd Function behind every cell, direction and backend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn.backends import Backend
from fastrnn.cells import Cell, State, Weights

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
        needed = ctx.needs_input_grad[BEFORE_X:]
        grads: Sequence[Tensor | None] = (None,) * len(needed)
        if dout is not None or any(g is not None for g in dfinal):
            x, out, saved, *tensors = ctx.saved_tensors
            weights, state = _unflatten(ctx.D, tensors)
            try:
                with torch.no_grad():
                    grads = ctx.backend.backward(
                        ctx.cell,
                        x,
                        weights,
                        state,
                        ctx.batch_sizes,
                        ctx.batch,
                        out,
                        saved,
                        dout,
                        dfinal,
                        needed,
                    )
            except (ValueError, RuntimeError):
                _refuse_batched(dout, *dfinal)
                raise
        # With create_graph=True these would otherwise be constants to whoever differentiates again.
        if torch.is_grad_enabled():
            anchor = torch.empty(0, requires_grad=True)
            _, *grads = _Once.apply(anchor, *grads)  # type: ignore[no-untyped-call]
        return (*(None,) * BEFORE_X, *grads)


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


def _refuse_batched(*grads: Tensor | None) -> None:
    """No backend knows the tensors of ``is_grads_batched=True``; each fails in its own words."""
    if any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in grads):
        raise RuntimeError("fastrnn's layers have no batched gradients (is_grads_batched=True)")


def _unflatten(D: int, tensors: Sequence[Tensor]) -> tuple[list[Weights], State | None]:
    end = D * PER_DIRECTION
    weights = [
        cast(Weights, tuple(tensors[k : k + PER_DIRECTION])) for k in range(0, end, PER_DIRECTION)
    ]
    return weights, tuple(tensors[end:]) or None
