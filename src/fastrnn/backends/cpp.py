"""The C++ backend: csrc/ through the extension ``fastrnn._cpp``, float32 and float64 on a CPU."""

from __future__ import annotations

import importlib.util
import math
import sysconfig
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fastrnn.backends import Gradients, StackSizes, one_thread_in_a_child
from fastrnn.backends.products import (
    HALF_DTYPES,
    backward_in_float32,
    forward_in_float32,
    saved_dtype,
)
from fastrnn.cells import Cell, State
from fastrnn.layer import Layer

# torch is imported above, so that the extension finds torch's OpenMP runtime loaded and shares it.
try:
    from fastrnn import _cpp
except ImportError as error:
    _missing: str | None = f"the extension fastrnn._cpp could not be imported ({error})"
    if importlib.util.find_spec("fastrnn._cpp") is None:
        _missing = "fastrnn was installed without its extension fastrnn._cpp"
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            _missing += (
                ": free-threaded builds of Python are not supported, because it requires the GIL"
            )
else:
    _missing = None

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
VALIDATES = True


def missing() -> str | None:
    return _missing


@cache
def _index(cell: Cell) -> int:
    """The index of a cell in the extension; -1 if it lacks the cell or has another of that name."""
    info = (
        cell.mode,
        len(cell.gates),
        cell.summed,
        len(cell.states),
        len(cell.saved),
        cell.projectable,
    )
    known = _cpp.cells()
    return known.index(info) if info in known else -1


@cache
def isa() -> str:
    """The best instruction set compiled in that runs here and that torch may use.

    torch's own limit counts, so ``ATEN_CPU_CAPABILITY=avx2`` or ``default`` holds for both.
    """
    allowed = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}
    capability = torch.backends.cpu.get_cpu_capability()
    for name in _cpp.isas():
        if name in allowed.get(capability, ("generic",)):
            return str(name)
    raise AssertionError("the generic engine runs everywhere")


@cache
def _engine(cell: Cell) -> tuple[str, int]:
    """The instruction set and the index of a cell, the first arguments of the extension."""
    return isa(), _index(cell)


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
    if _index(cell) < 0:
        return f"the extension has no cell {cell.mode} like this one"
    return None


def empty_cache() -> None:
    if _missing is None:
        _cpp.release()


def describe() -> str:
    threads = torch.get_num_threads() if _cpp.threading() else 1
    return f"fused C++, {isa()}, {threads} thread{'s' if threads > 1 else ''}"


def saved_spec(layer: Layer, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return layer.saved_shape(layer.H), saved_dtype(dtype)


def forward(layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
    if x.dtype in HALF_DTYPES:
        return forward_in_float32(forward, layer, x, save)
    return _cpp.forward(
        *_engine(layer.cell),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        layer.rows.batch_sizes,
        x,
        tuple(layer.weights),
        layer.state,
        save,
    )


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
    return _cpp.backward(
        *_engine(layer.cell),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        layer.rows.batch_sizes,
        x,
        tuple(layer.weights),
        layer.state,
        out,
        saved,
        dout,
        tuple(dfinal),
        tuple(needed),
    )


# In bytes. Smaller tensors come from memory that the allocator has mapped already.
LARGE = 1 << 20


def _large(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor in memory that the extension keeps for reuse.

    The memory is returned with the last reference to the tensor. A tensor that a backward pass
    needs is returned with the graph that holds it.
    """
    count = math.prod(shape)
    scratch = _cpp.Scratch(count * like.element_size())
    # Resized in place: a view could not be detached in place nor edited inside a Function.
    return torch.frombuffer(scratch, dtype=like.dtype, count=count).resize_(shape)


if _missing is None:
    _cpp.make_large(LARGE, _large)
    # The extension itself only sees a fork that comes after it is loaded.
    one_thread_in_a_child()
