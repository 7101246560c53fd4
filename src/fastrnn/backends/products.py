"""What backends written in Python share: above all the part of a gradient that is no recurrence.

With the gradients ``dgx`` and ``dgh`` of the two products of all rows,

    dx    = dgx W_ih        dW_ih = dgx^T x         db_ih = sum dgx
    dW_hr = dh^T m          dW_hh = dgh^T h_before  db_hh = sum dgh
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastrnn.backends import Gradients
from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.padding import numbers
from fastrnn.rows import previous

__all__ = [
    "NARROW",
    "Recurrence",
    "backward_in_float32",
    "check_saved",
    "forward_in_float32",
    "gradients",
    "in_own_dtype",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_own_dtype(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Autocast would lower the precision of the products, and the definition's with it."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = args[1].device.type  # type: ignore[attr-defined]  # x
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            return function(*args, **kwargs)

    return run


NARROW = frozenset({torch.float16, torch.bfloat16})
"""What a CPU computes in float32, rounding only the results; what is saved stays as it is."""


def forward_in_float32(
    forward: Callable[..., tuple[Tensor, State, Tensor | None]], cell: Cell, x: Tensor, *rest: Any
) -> tuple[Tensor, State, Tensor | None]:
    """A backend's ``forward`` of 16-bit tensors."""
    out, final, saved = forward(cell, x.float(), *_to(torch.float32, rest))
    return out.to(x.dtype), _to(x.dtype, final), saved


def backward_in_float32(
    backward: Callable[..., Gradients], cell: Cell, x: Tensor, *rest: Any
) -> Gradients:
    """A backend's ``backward`` of 16-bit tensors."""
    gradients: Gradients = _to(x.dtype, backward(cell, x.float(), *_to(torch.float32, rest)))
    return gradients


def _to(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return tuple([_to(dtype, v) for v in value])
    return value


class Recurrence(NamedTuple):
    """What running the steps in reverse leaves.

    Attributes:
        dpre: gradient of the pre-activations, ``[D, N, slots, H]``.
        dstate: gradient of the initial state, shaped like it.
        dh: the whole gradient of the projected h, ``[D, N, P]``; None without projection.
    """

    dpre: Tensor
    dstate: State
    dh: Tensor | None


def check_saved(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    out: Tensor,
    saved: Tensor,
) -> None:
    """Hooks of saved tensors, and users of ``.data``, may hand back something else.

    Raises:
        RuntimeError: sizes, dtypes or strides are not those of the forward pass.
    """
    G, (rows, P) = len(cell.gates), weights[0][1].shape
    sizes = numbers(cell, x, weights, batch_sizes, batch)
    kept = cell.saved_slots(weights[0][4] is not None)
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("what forward saved", saved, (sizes.D, sizes.N, kept, sizes.H)),
        ("the output", out, (*x.shape[:-1], sizes.D * P)),
    ]
    for w_ih, w_hh, _, b_hh, w_hr in weights:
        expected += [("weight_ih", w_ih, (rows, x.shape[-1])), ("weight_hh", w_hh, (rows, P))]
        if b_hh is not None:
            expected.append(("bias_hh", b_hh, (rows,)))
        if w_hr is not None:
            expected.append(("weight_hr", w_hr, (P, rows // G)))
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise RuntimeError(
                f"backward: expected {name} of shape {list(shape)}, {x.dtype} on {x.device} as in "
                f"the forward pass, got {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
    if not saved.is_contiguous():
        raise RuntimeError("backward: expected what forward saved to be contiguous, as it was")


ROWS = 128
"""A product sums so many rows before it adds them to the others."""

MOST_ROWS = 16 * ROWS
"""With more rows, torch.nn's sum over the steps has as long a chain of roundings as a product's."""


def _of_all_rows(d: Tensor, a: Tensor) -> Tensor:
    """``d^T a``. MKL sums some 400 rows in float32 one after the other: more than a step has."""
    if d.dtype != torch.float32 or not d.is_cpu or not ROWS < len(d) <= MOST_ROWS:
        return d.t() @ a
    total = d[:ROWS].t() @ a[:ROWS]
    for k in range(ROWS, len(d), ROWS):
        total.addmm_(d[k : k + ROWS].t(), a[k : k + ROWS])
    return total


def gradients(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    out: Tensor,
    saved: Tensor,
    needed: Sequence[bool],
    recurrence: Recurrence,
) -> Gradients:
    """What a backend's ``backward`` returns; arguments as there."""
    dpre, dstate, dh = recurrence
    D, N = dpre.shape[:2]
    G, shared, P = len(cell.gates), cell.shared, weights[0][1].shape[1]
    h = out.view(N, D, P)
    dx: Tensor | None = None
    results: list[Tensor | None] = []
    for d, (w_ih, _, _, _, w_hr) in enumerate(weights):
        need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needed[
            1 + d * len(weights[d]) : 1 + (d + 1) * len(weights[d])
        ]
        dgx = dpre[d, :, :G].flatten(1)
        dgh = dgx
        if shared < G:
            dgh = torch.cat([dpre[d, :, :shared], dpre[d, :, G:]], 1).flatten(1)
        if needed[0]:
            part = dgx @ w_ih
            dx = part if dx is None else dx + part
        dw_hh = dw_hr = None
        if need_w_hh:
            h0 = h.new_zeros(batch, P) if state is None else state[0].view(D, batch, P)[d]
            dw_hh = _of_all_rows(dgh, previous(h[:, d], h0, batch_sizes, d == 1))
        db_ih = dgx.sum(0) if need_b_ih else None
        db_hh = None
        if need_b_hh:
            db_hh = dgh.sum(0) if dgh is not dgx or db_ih is None else db_ih.clone()
        if need_w_hr and w_hr is not None and dh is not None:
            dw_hr = _of_all_rows(dh[d], saved[d, :, -1])
        results += [
            _of_all_rows(dgx, x.flatten(0, -2)) if need_w_ih else None,
            dw_hh,
            db_ih,
            db_hh,
            dw_hr,
        ]
    if state is not None:
        results += [
            g if need else None for g, need in zip(dstate, needed[-len(dstate) :], strict=True)
        ]
    return (None if dx is None else dx.view(x.shape), *results)
