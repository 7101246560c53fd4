"""Layers of padded sizes, for kernels that take whole vectors or tiles.

Such kernels see H and P as multiples of 16, so that rows begin where several elements can be read
at once, and an odd size needs no code of its own. Units beyond those of the layer have weights of
zero, and what they leave is zeroed by the kernel, since an infinite h times zero is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrnn.cells import Cell, State, Weights

__all__ = [
    "Numbers",
    "numbers",
    "own_rows",
    "own_states",
    "padded",
    "padded_gates",
    "padded_rows",
    "plain",
    "running",
]


class Numbers(NamedTuple):
    """The sizes that kernels see, in their order."""

    T: int
    N: int
    B: int
    H: int
    P: int
    D: int
    own_H: int
    own_P: int


def _sizes(cell: Cell, weights: Sequence[Weights]) -> tuple[int, int]:
    """H and P of a layer."""
    w_hh = weights[0][1]
    return w_hh.shape[0] // len(cell.gates), w_hh.shape[1]


def numbers(
    cell: Cell, x: Tensor, weights: Sequence[Weights], batch_sizes: Tensor | None, batch: int
) -> Numbers:
    own = _sizes(cell, weights)
    H, P = (-(-n // 16) * 16 for n in own)
    T = len(batch_sizes) if batch_sizes is not None else x.shape[0] if x.dim() == 3 else 1
    return Numbers(T, x.shape[:-1].numel(), batch, H, P, len(weights), *own)


def plain(tensor: Tensor) -> Tensor:
    """With all of its numbers in memory: torch may only have noted a minus sign, or zeros."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def padded(tensor: Tensor, *sizes: int) -> Tensor:
    """With zeros after the last element of each of its last dimensions, up to these sizes."""
    missing = [n - k for n, k in zip(sizes, tensor.shape[-len(sizes) :], strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [n for m in reversed(missing) for n in (0, m)])


def padded_gates(cell: Cell, rows: Tensor, H: int, *columns: int) -> Tensor:
    """A weight or bias of all gates, ``[G * H, *columns]``."""
    G, rows = len(cell.gates), plain(rows)
    if rows.shape == (G * H, *columns):
        return rows
    return padded(rows.unflatten(0, (G, -1)), H, *columns).flatten(0, 1)


def padded_rows(rows: Tensor, D: int, P: int) -> Tensor:
    """Rows ``[*, D * P]`` of an output or its gradient."""
    rows = plain(rows)
    if rows.shape[-1] == D * P:
        return rows.contiguous()
    return padded(rows.unflatten(-1, (D, -1)), P).flatten(-2).contiguous()


def own_rows(rows: Tensor, D: int, P: int) -> Tensor:
    """The layer's own elements of such rows."""
    if rows.shape[-1] == D * P:
        return rows
    own: Tensor = rows.unflatten(-1, (D, -1))[..., :P].flatten(-2).contiguous()
    return own


def running(
    cell: Cell,
    given: Sequence[Tensor | None] | None,
    sizes: Numbers,
    like: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h ``[D, B, P]`` and the other states ``[S - 1, D, B, H]``, to be changed; None is zero."""
    B, H, P, D = sizes.B, sizes.H, sizes.P, sizes.D
    S = len(cell.states)
    h = like.new_zeros(D, B, P, dtype=dtype)
    s = like.new_zeros(S - 1, D, B, H, dtype=dtype) if S > 1 else like.new_empty(0, dtype=dtype)
    for into, value in zip((h, *s), given or (), strict=False):
        if value is not None:
            into[..., : value.shape[-1]] = value.reshape(D, B, value.shape[-1])
    return h, s


def own_states(h: Tensor, s: Tensor, sizes: Numbers, dtype: torch.dtype, directions: bool) -> State:
    """States as results, of which there may be one more dimension; nobody else may have ``h``.

    None is a view: those cannot be edited in place.
    """
    form = torch.contiguous_format
    found = [r[..., : sizes.own_H].to(dtype, copy=True, memory_format=form) for r in s]
    if h.dtype != dtype or sizes.own_P != sizes.P:
        h = h[..., : sizes.own_P].to(dtype, copy=True, memory_format=form)
    return tuple(r if directions else r.squeeze_(0) for r in (h, *found))
