"""Layers of padded sizes, for kernels that work on whole vectors or tiles.

Such kernels see H and P rounded up to multiples of 16 (H_pad, P_pad). Rows then begin where several
elements can be read at once, and an odd size needs no code of its own. Units beyond H have weights
of zero. The kernels set their results to zero, since an infinite h times zero is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrnn.cells import State
from fastrnn.layer import Layer

__all__ = [
    "PaddedSizes",
    "own_rows",
    "own_states",
    "padded",
    "padded_gates",
    "padded_rows",
    "padded_sizes",
    "plain",
    "running_states",
]


class PaddedSizes(NamedTuple):
    """The sizes that kernels see, in the order of their parameters."""

    T: int
    N: int
    B: int
    H_pad: int
    P_pad: int
    D: int
    H: int
    P: int


def padded_sizes(layer: Layer) -> PaddedSizes:
    T, B, N, *_ = layer.rows
    H, P = layer.H, layer.P
    return PaddedSizes(T, N, B, -(-H // 16) * 16, -(-P // 16) * 16, layer.D, H, P)


def plain(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: torch may only have noted a minus sign, or zeros."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def padded(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor with zeros appended in its last dimensions, up to these sizes."""
    missing = [n - k for n, k in zip(sizes, tensor.shape[-len(sizes) :], strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [n for m in reversed(missing) for n in (0, m)])


def padded_gates(layer: Layer, weight: Tensor, H_pad: int, *columns: int) -> Tensor:
    """A weight or bias of all gates, ``[G * H_pad, *columns]``."""
    G, weight = layer.G, plain(weight)
    if weight.shape == (G * H_pad, *columns):
        return weight
    return padded(weight.unflatten(0, (G, -1)), H_pad, *columns).flatten(0, 1)


def padded_rows(rows: Tensor, sizes: PaddedSizes) -> Tensor:
    """Rows ``[*, D * P]`` of an output or its gradient as ``[*, D * P_pad]``."""
    rows = plain(rows)
    if rows.shape[-1] == sizes.D * sizes.P_pad:
        return rows.contiguous()
    return padded(rows.unflatten(-1, (sizes.D, -1)), sizes.P_pad).flatten(-2).contiguous()


def own_rows(rows: Tensor, sizes: PaddedSizes) -> Tensor:
    """The inverse of :func:`padded_rows`."""
    if sizes.P_pad == sizes.P:
        return rows
    own: Tensor = rows.unflatten(-1, (sizes.D, -1))[..., : sizes.P].flatten(-2).contiguous()
    return own


def running_states(
    layer: Layer,
    initial: Sequence[Tensor | None] | None,
    sizes: PaddedSizes,
    like: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h ``[D, B, P_pad]`` and the other states ``[S - 1, D, B, H_pad]``, which kernels update.

    They begin with the initial values, of which None stands for zero.
    """
    D, B, S = sizes.D, sizes.B, len(layer.cell.states)
    h = like.new_zeros(D, B, sizes.P_pad, dtype=dtype)
    s = like.new_empty(0, dtype=dtype)
    if S > 1:
        s = like.new_zeros(S - 1, D, B, sizes.H_pad, dtype=dtype)
    for into, value in zip((h, *s), initial or (), strict=False):
        if value is not None:
            into[..., : value.shape[-1]] = value.reshape(D, B, value.shape[-1])
    return h, s


def own_states(layer: Layer, h: Tensor, s: Tensor, sizes: PaddedSizes, dtype: torch.dtype) -> State:
    """Running states as results, shaped like the layer's state. ``h`` may become one of them.

    No returned tensor is a view, so callers may edit them in place.
    """
    form = torch.contiguous_format
    others = [r[..., : sizes.H].to(dtype, copy=True, memory_format=form) for r in s]
    if h.dtype != dtype or sizes.P_pad != sizes.P:
        h = h[..., : sizes.P].to(dtype, copy=True, memory_format=form)
    return tuple(r.squeeze_(0) if layer.rows.one_step else r for r in (h, *others))
