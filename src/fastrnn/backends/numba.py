"""The Numba backend: kernels/numba/, float32 and float64 on a CPU, without a C++ compiler or wheel.

Compiled kernels are cached in files, so that a second process starts without compiling.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastrnn.backends import Gradients, StackSizes, installed, one_thread_in_a_child
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
from fastrnn.kernels.numba import MODES
from fastrnn.kernels.padding import padded_sizes
from fastrnn.layer import Layer

__all__ = [
    "VALIDATES",
    "backward",
    "broken",
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

MAX_UNITS, MAX_HIDDEN = 512, 32
"""Units of all sequences together, and of each, beyond which torch's oneDNN LSTM is faster.

Source: docs/performance.md.
"""


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
    sizes: StackSizes | None = None,
    automatic: bool = False,
) -> str | None:
    if device.type != "cpu":
        return f"expected tensors on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64, *HALF_DTYPES):
        return f"expected a 16-bit dtype, torch.float32 or torch.float64, got {dtype}"
    if cell.mode not in MODES:
        return f"there is no kernel for the cell {cell.mode}"
    if automatic and sizes is not None and not sizes.compiled:
        if sizes.one_step:
            return "torch is faster at one step: two products and a few operators"
        dense = not sizes.packed and not sizes.proj_size
        if cell.mode == "LSTM" and dtype is torch.float32 and dense:
            units = sizes.batch * sizes.hidden_size
            if units > MAX_UNITS or sizes.hidden_size > MAX_HIDDEN:
                return (
                    f"torch's oneDNN is usually faster at dense float32 LSTMs of more than "
                    f"{MAX_HIDDEN} units, or {MAX_UNITS} in a batch"
                )
    return broken()


def empty_cache() -> None:
    pass


def describe() -> str:
    threads = torch.get_num_threads()
    return f"fused Numba, {threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def _launcher() -> Iterator[ModuleType]:
    """kernels/numba/launch.py, with no more threads than torch has in this process.

    Inside the block, torch's products make subnormal numbers zero too.
    """
    from fastrnn.kernels.numba import launch
    from fastrnn.kernels.numba.subnormals import subnormals_are_zero

    one_thread_in_a_child()
    with subnormals_are_zero():
        yield launch


@cache
def broken() -> str | None:
    """The reason why importing Numba fails, or None. Asking imports it."""
    try:
        from fastrnn.kernels.numba import launch  # noqa: F401
    except Exception as error:  # Numba raises errors of many types on import
        return f"numba cannot be used: {error}"
    return None


def saved_spec(layer: Layer, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return layer.saved_shape(padded_sizes(layer).H_pad), saved_dtype(dtype)


@in_own_dtype
def forward(layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
    if x.dtype in HALF_DTYPES:
        return forward_in_float32(forward, layer, x, save)
    with _launcher() as launch:
        result: tuple[Tensor, State, Tensor | None] = launch.forward(layer, x, save)
    return result


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
    with _launcher() as launch:
        recurrence = Recurrence(*launch.backward(layer, x, out, saved, dout, dfinal))
        return gradients(layer, x, out, saved[..., : layer.H], needed, recurrence)
