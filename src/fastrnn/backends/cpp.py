"""The C++ backend: csrc/ through the extension ``fastrnn._cpp``, float32 and float64 on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastrnn.backends import Gradients, State, Weights
from fastrnn.cells import Cell

# torch is imported above, so that the extension finds torch's OpenMP runtime loaded and shares it.
try:
    from fastrnn import _cpp
except ImportError as error:
    _missing: str | None = f"the extension fastrnn._cpp could not be imported ({error})"
else:
    _missing = None

__all__ = [
    "CHECKS",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "matmul",
    "missing",
    "refuses",
]


CHECKS = True


def missing() -> str | None:
    return _missing


@cache
def _index(cell: Cell) -> int:
    """Where the extension keeps a cell; -1 if it lacks it or knows another of that name."""
    numbers = (
        cell.mode,
        len(cell.gates),
        cell.shared,
        len(cell.states),
        len(cell.saved),
        cell.projectable,
    )
    known = _cpp.cells()
    return known.index(numbers) if numbers in known else -1


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


def refuses(cell: Cell, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"expected tensors on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"expected torch.float32 or torch.float64, got {dtype}"
    if _index(cell) < 0:
        return f"the extension has no cell {cell.mode} like this one"
    return None


def empty_cache() -> None:
    if _missing is None:
        _cpp.release()


def describe() -> str:
    threads = torch.get_num_threads() if _cpp.threading() else 1
    return f"fused C++, {isa()}, {threads} thread{'s' if threads > 1 else ''}"


def forward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
) -> tuple[Tensor, State, Tensor | None]:
    *leading, size = x.shape
    D, (rows, P) = len(weights), weights[0][1].shape
    H = rows // len(cell.gates)
    N = leading[0] * leading[-1] if len(leading) == 2 else leading[0]
    # Sizes one by one: new_empty takes longer to read a tuple than to make the tensor.
    out = x.new_empty(*leading, D * P)
    if len(leading) == 2 or batch_sizes is not None:
        final = [x.new_empty(D, batch, H if k else P) for k in cell.state_range]
    else:
        final = [x.new_empty(batch, H if k else P) for k in cell.state_range[1:]]
        # The only h of one step is the output, unless autograd must be able to tell them apart.
        final.insert(0, x.new_empty(batch, P) if save else out)
    saved = None
    if save:
        saved = _workspace(x, D, N, cell.saved_slots(weights[0][4] is not None), H)
    _cpp.forward(
        isa(),
        _index(cell),
        torch.get_num_threads(),
        batch_sizes,
        N,
        batch,
        size,
        H,
        P,
        D,
        x,
        tuple(weights),
        state,
        out,
        tuple(final),
        saved,
    )
    return out, tuple(final), saved


def backward(
    cell: Cell,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
) -> Gradients:
    D, N, _, H = saved.shape
    P, size = weights[0][1].shape[1], weights[0][0].shape[1]
    projected = weights[0][4] is not None
    dpre = _workspace(out, D, N, cell.slots, H)
    dbias = out.new_empty(D, cell.slots, H)
    directions = (D,) if out.dim() == 3 or batch_sizes is not None else ()
    dstate = tuple([out.new_empty(*directions, batch, H if k else P) for k in cell.state_range])
    dh = out.new_empty(D, N, P) if projected else None
    _cpp.backward(
        isa(),
        _index(cell),
        torch.get_num_threads(),
        batch_sizes,
        N,
        batch,
        size,
        H,
        P,
        D,
        tuple(weights),
        state,
        out,
        saved,
        dout,
        tuple(dfinal),
        dpre,
        dbias,
        dstate,
        dh,
    )
    return Gradients(dpre, dbias, dstate, dh)


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    if b.stride(1) != 1:
        b = b.contiguous()
    _cpp.matmul(isa(), torch.get_num_threads(), a, b, out, add)


# Smaller tensors come from memory that the allocator has mapped already.
WORKSPACE_BYTES = 1 << 20


def _workspace(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor for our own use, in memory that the extension keeps for reuse.

    It goes back when the last reference to the tensor goes, with the graph that holds it.
    """
    count = math.prod(shape)
    size = count * like.element_size()
    if size < WORKSPACE_BYTES:
        return like.new_empty(shape)
    return torch.frombuffer(_cpp.Scratch(size), dtype=like.dtype, count=count).view(shape)
