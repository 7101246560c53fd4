"""The Numba backend: kernels/numba/, float32 and float64 on a CPU, with no compiler and no wheel.

What is compiled is kept in files, so that a second process starts without compiling.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastrnn.backends import Gradients, Sizes, installed, one_thread_in_a_child
from fastrnn.backends.products import (
    NARROW,
    Recurrence,
    backward_in_float32,
    check_saved,
    forward_in_float32,
    gradients,
    in_own_dtype,
)
from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.numba import MODES

__all__ = [
    "CHECKS",
    "MULTIPLE",
    "STACKS",
    "WIDE",
    "backward",
    "broken",
    "describe",
    "empty_cache",
    "forward",
    "missing",
    "refuses",
]

CHECKS = False
MULTIPLE = 16
STACKS = False
WIDE = True

MOST_UNITS, MOST_HIDDEN = 512, 32
"""Of all sequences together, and of each, where torch has oneDNN's LSTM (docs/performance.md)."""


def missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    found = installed("numba")
    if found is not None and found < (0, 61):
        return f"expected numba 0.61 or newer, got {'.'.join(map(str, found))}"
    return None


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None = None,
    automatic: bool = False,
) -> str | None:
    if device.type != "cpu":
        return f"expected tensors on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64, *NARROW):
        return f"expected 16-bit numbers, torch.float32 or torch.float64, got {dtype}"
    if cell.mode not in MODES:
        return f"there is no kernel for the cell {cell.mode}"
    if automatic and sizes is not None and not sizes.compiled:
        if sizes.one_step:
            return "one step is two products and a few operators in torch"
        dense = not sizes.packed and not sizes.proj_size
        if cell.mode == "LSTM" and dtype is torch.float32 and dense:
            units = sizes.batch * sizes.hidden_size
            if units > MOST_UNITS or sizes.hidden_size > MOST_HIDDEN:
                return (
                    f"torch's oneDNN is mostly faster at dense float32 LSTMs of more than "
                    f"{MOST_HIDDEN} units, or {MOST_UNITS} in a batch"
                )
    return broken()


def empty_cache() -> None:
    pass


def describe() -> str:
    threads = torch.get_num_threads()
    return f"fused Numba, {threads} thread{'s' if threads > 1 else ''}"


def _launch() -> ModuleType:
    """kernels/numba/launch.py, with threads of torch's that are there."""
    from fastrnn.kernels.numba import launch

    one_thread_in_a_child()
    module: ModuleType = launch
    return module


@cache
def broken() -> str | None:
    """Why Numba cannot be used after all; the answer takes its import."""
    try:
        from fastrnn.kernels.numba import launch  # noqa: F401
    except Exception as error:  # of Numba's own, about whatever it does not like here
        return f"numba cannot be used: {error}"
    return None


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
    result: tuple[Tensor, State, Tensor | None] = _launch().forward(
        cell, x, weights, state, batch_sizes, batch, save
    )
    return result


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
    layer = (cell, x, weights, state, batch_sizes, batch, out)
    check_saved(*layer, saved)
    recurrence = Recurrence(*_launch().backward(*layer, saved, dout, dfinal))
    own = saved[..., : recurrence.dpre.shape[-1]]
    return gradients(*layer, own, needed, recurrence)
