"""The Numba backend: kernels/numba/, float32 and float64 on a CPU, with no compiler and no wheel.

What is compiled is kept in files, so that a second process starts without compiling.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastrnn.backends import Gradients, Sizes
from fastrnn.backends.products import Recurrence, gradients, in_own_dtype
from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.numba import MODES

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

MOST_UNITS = 512
"""Of all sequences together, where torch has oneDNN's LSTM; as measured in docs/performance.md."""


def missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
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
    if dtype not in (torch.float32, torch.float64):
        return f"expected torch.float32 or torch.float64, got {dtype}"
    if cell.mode not in MODES:
        return f"there is no kernel for the cell {cell.mode}"
    if automatic and sizes is not None:
        if sizes.one_step:
            return "one step is two products and a few operators in torch"
        dense = not sizes.packed and not sizes.proj_size
        if cell.mode == "LSTM" and dtype is torch.float32 and dense:
            units = sizes.batch * sizes.hidden_size
            if units > MOST_UNITS:
                return (
                    f"torch's oneDNN is faster at dense float32 LSTMs of {units} units in a batch, "
                    f"and not of {MOST_UNITS}"
                )
    return None


def empty_cache() -> None:
    pass


def describe() -> str:
    threads = torch.get_num_threads()
    return f"fused Numba, {threads} thread{'s' if threads > 1 else ''}"


def _launch() -> ModuleType:
    """kernels/numba/launch.py, with threads of torch's that are there."""
    from fastrnn.kernels.numba import launch

    if launch.in_a_child and torch.get_num_threads() > 1:
        # OpenMP's threads do not survive a fork, and torch would wait for them for ever.
        torch.set_num_threads(1)
    module: ModuleType = launch
    return module


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
    layer = (cell, x, weights, state, batch_sizes, batch, out)
    recurrence = Recurrence(*_launch().backward(*layer, saved, dout, dfinal))
    own = saved[..., : recurrence.dpre.shape[-1]]
    return gradients(*layer, own, needed, recurrence)
