"""What backends written in Python share: above all the non-recurrent gradients.

With the gradients ``dgx`` and ``dgh`` of the two products of all rows,

    dx    = dgx W_ih        dW_ih = dgx^T x         db_ih = sum dgx
    dW_hr = dh^T h_cell     dW_hh = dgh^T h_before  db_hh = sum dgh
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrnn.backends import Gradients
from fastrnn.cells import State
from fastrnn.layer import Layer, to_dtype

__all__ = [
    "HALF_DTYPES",
    "Recurrence",
    "backward_in_float32",
    "check_saved",
    "forward_in_float32",
    "gradients",
    "in_own_dtype",
    "saved_dtype",
]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_own_dtype(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Disable autocast inside a backend's function, whose second argument is x.

    It would lower the precision of the products, and change the definition of correct.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = args[1].device.type  # type: ignore[attr-defined]  # x
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            return function(*args, **kwargs)

    return run


HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})
"""The dtypes that a CPU computes in float32. Only results are rounded; saved tensors are not."""


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the saved tensor on a CPU."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


def forward_in_float32(
    forward: Callable[..., tuple[Tensor, State, Tensor | None]],
    layer: Layer,
    x: Tensor,
    save: bool,
) -> tuple[Tensor, State, Tensor | None]:
    """A backend's ``forward`` of 16-bit tensors."""
    out, final, saved = forward(layer.to(torch.float32), x.float(), save=save)
    return out.to(x.dtype), to_dtype(x.dtype, final), saved


def backward_in_float32(
    backward: Callable[..., Gradients],
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Gradients:
    """A backend's ``backward`` of 16-bit tensors."""
    grads = backward(
        layer.to(torch.float32),
        x.float(),
        out.float(),
        saved,
        None if dout is None else dout.float(),
        to_dtype(torch.float32, dfinal),
        needed,
    )
    return to_dtype(x.dtype, grads)


class Recurrence(NamedTuple):
    """The result of running the steps backward.

    Attributes:
        dpre: gradient of the pre-activations, ``[D, N, num_preacts, H]``.
        dstate: gradient of the initial state, shaped like it.
        dh: the whole gradient of the projected h, ``[D, N, P]``; None without projection.
        live: the rows of each direction outside which ``dpre`` and ``dh`` are zero; None for all.
    """

    dpre: Tensor
    dstate: State
    dh: Tensor | None
    live: Sequence[slice] | None = None


def check_saved(
    layer: Layer, x: Tensor, out: Tensor, saved: Tensor, shape: tuple[int, ...]
) -> None:
    """Check the saved tensors of a backward pass; ``shape`` is that of the saved activations.

    Hooks of saved tensors, and users of ``.data``, may return something else.

    Raises:
        RuntimeError: sizes, dtypes or strides are not those of the forward pass.
    """
    gate_size, P = layer.weights[0].hh.shape
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("the saved activations", saved, shape),
        ("the output", out, (*x.shape[:-1], layer.D * P)),
    ]
    for w in layer.weights:
        expected += [
            ("weight_ih", w.ih, (gate_size, x.shape[-1])),
            ("weight_hh", w.hh, (gate_size, P)),
        ]
        if w.bias_hh is not None:
            expected.append(("bias_hh", w.bias_hh, (gate_size,)))
        if w.hr is not None:
            expected.append(("weight_hr", w.hr, (P, layer.H)))
    for name, tensor, size in expected:
        if tensor.shape != size or tensor.dtype != x.dtype or tensor.device != x.device:
            raise RuntimeError(
                f"backward: expected {name} of shape {list(size)}, {x.dtype} on {x.device} as in "
                f"the forward pass, got {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
            )
    if not saved.is_contiguous():
        raise RuntimeError("backward: expected contiguous saved activations, as in forward")


ROWS = 128
"""The number of rows that a product sums before it adds the sum to the others."""

MAX_ROWS = 16 * ROWS
"""With more rows, torch.nn's sum over the steps has as long a chain of roundings as a product's."""


def _sum_over_rows(d: Tensor, a: Tensor) -> Tensor:
    """``d^T a``. MKL sums some 400 rows in float32 in one chain: more than a step has."""
    if d.dtype != torch.float32 or not d.is_cpu or not ROWS < len(d) <= MAX_ROWS:
        return d.t() @ a
    total = d[:ROWS].t() @ a[:ROWS]
    for k in range(ROWS, len(d), ROWS):
        total.addmm_(d[k : k + ROWS].t(), a[k : k + ROWS])
    return total


def gradients(
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    needed: Sequence[bool],
    recurrence: Recurrence,
) -> Gradients:
    """The result of a backend's ``backward``; arguments as there."""
    dpre, dstate, dh, live = recurrence
    D, N = dpre.shape[:2]
    G, summed, P = layer.G, layer.cell.summed, layer.P
    h = out.view(N, D, P)
    dx: Tensor | None = None
    needed_x, *flags = needed
    results: list[Tensor | None] = []
    for d, w in enumerate(layer.weights):
        need = dict(zip(w._fields, flags[d * len(w) : (d + 1) * len(w)], strict=True))
        rows = slice(0, N) if live is None else live[d]
        dgx = dpre[d, rows, :G].flatten(1)
        dgh = dgx
        if summed < G:
            dgh = torch.cat([dpre[d, rows, :summed], dpre[d, rows, G:]], 1).flatten(1)
        if needed_x:
            part = dgx @ w.ih
            if len(part) < N:
                part = pad(part, (0, 0, rows.start, N - rows.stop))
            dx = part if dx is None else dx + part
        dw_hh = db_hh = dw_hr = None
        if need["hh"]:
            if layer.state is None:
                h0 = h.new_zeros(layer.rows.B, P)
            else:
                h0 = layer.state[0].view(D, layer.rows.B, P)[d]
            dw_hh = _sum_over_rows(dgh, layer.rows.previous(h[:, d], h0, reverse=d == 1)[rows])
        db_ih = dgx.sum(0) if need["bias_ih"] else None
        if need["bias_hh"]:
            db_hh = dgh.sum(0) if dgh is not dgx or db_ih is None else db_ih.clone()
        if need["hr"] and dh is not None:
            dw_hr = _sum_over_rows(dh[d, rows], saved[d, rows, -1])
        dw_ih = _sum_over_rows(dgx, x.flatten(0, -2)[rows]) if need["ih"] else None
        results += [dw_ih, dw_hh, db_ih, db_hh, dw_hr]
    if layer.state is not None:
        results += [
            g if need else None for g, need in zip(dstate, needed[-len(dstate) :], strict=True)
        ]
    return (None if dx is None else dx.view(x.shape), *results)
