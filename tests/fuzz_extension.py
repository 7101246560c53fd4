"""Calls of the extension with one wrong argument each; run by test_bad_input.py.

The calls are recorded from real layers, so this file is independent of the signatures. Each call is
repeated with one argument, or one item of one, replaced. A call may raise any exception. It must
not crash, write into an argument that it refuses, or write outside one that it accepts.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from support import Case, data, evaluate, ours
from torch import Tensor

from fastrnn.backends import cpp
from fastrnn.cells import CELLS

ENTRIES = ("forward", "backward")
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    2**31 - 1,
    2**31,
    2**32 + 1,
    2**61,
    2**62 + 1,
    2**63 - 1,
    2**64,
)
THINGS = (None, "x", "generic", "avx512", 1.5, True, (), [], {}, object(), b"xyz", float("nan"))
Call = tuple[str, tuple[Any, ...]]


def record() -> list[Call]:
    calls: list[Call] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            function = getattr(extension, name)
            if name not in ENTRIES:
                return function

            def spy(*args: Any) -> Any:
                calls.append((name, args))
                return function(*args)

            return spy

    extension = cpp._cpp
    cpp._cpp = Recorder()
    for mode in CELLS:
        for layout, projected in (("dense", False), ("packed", False), ("dense", True)):
            if projected and not CELLS[mode].projectable:
                continue
            case = Case(mode, directions=2, layout=layout, projected=projected, T=3, B=2, I=3, H=5)
            for dtype in (torch.float32, torch.float64):
                if cpp.refuses(CELLS[mode], dtype, torch.device("cpu")):
                    continue
                evaluate(ours(case, dtype), case, data(case, dtype), "cpp")
    cpp._cpp = extension
    return calls


def tensor_mutants(t: Tensor) -> Iterator[Any]:
    yield from (t.flatten()[:-1], t.flatten()[:0], torch.cat([t.flatten()] * 2), t[None])
    yield from (t.to(torch.float64 if t.dtype == torch.float32 else torch.float32), t.long())
    yield from (
        t.half(),
        t.to("meta"),
        t.flatten().repeat_interleave(2)[::2],
        t.to(torch.complex64),
    )
    yield t.view(torch.int32 if t.element_size() == 4 else torch.int64)
    if t.dim() == 2:
        yield from (
            t.t(),
            t[:, :1].expand_as(t),
            t[:1].expand_as(t),
            t.flatten().as_strided(t.shape, (0, 0)),
        )
    yield t.to_sparse()
    emptied = t.clone()
    emptied.untyped_storage().resize_(0)
    yield emptied
    if t.dtype == torch.int64:
        for k in (0, -1):
            for n in NUMBERS[:-1]:
                other = t.clone()
                other[k] = n
                yield other
        yield from (t.flip(0), torch.cat([t, t.new_zeros(3)]), t.new_full((10_000,), 1))


def mutants(value: Any) -> Iterator[Any]:
    """Values to put in the place of ``value``."""
    yield from THINGS
    if isinstance(value, (Tensor, tuple)):
        yield 3
    if isinstance(value, Tensor):
        yield from tensor_mutants(value)
    elif isinstance(value, tuple):
        yield from (value[:-1], value + value, list(value), value[::-1])
        for k, item in enumerate(value):
            for other in mutants(item):
                yield (*value[:k], other, *value[k + 1 :])
    elif isinstance(value, int):
        yield from NUMBERS


def guarded(value: Any, guards: list[Tensor]) -> Any:
    """A copy of all tensors, each between two runs of a value that must stay."""
    if isinstance(value, tuple):
        return tuple(guarded(v, guards) for v in value)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return value
    if not value.is_contiguous() or not value.untyped_storage().size():
        return value
    buffer = value.new_full((value.numel() + 2 * GUARD,), 77)
    guards.append(buffer)
    inner = buffer[GUARD : GUARD + value.numel()].view(value.shape)
    return inner.copy_(value)


GUARD = 32


def main() -> None:
    faulthandler.enable()
    # A size beyond all memory must end in an exception, and not exhaust the machine. The address
    # sanitizer reserves terabytes, and has a limit of its own.
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    random.seed(0)
    calls = record()
    # One call of each kind with every mutant, and the other calls with a random few.
    seen: set[tuple[str, int]] = set()
    counts = {name: Counter[str]() for name in (*ENTRIES, "Scratch", "make_large", "poison")}

    def tried(name: str, *args: Any) -> None:
        try:
            result = getattr(cpp._cpp, name)(*args)
            if name == "Scratch":
                memoryview(result)
            counts[name]["taken"] += 1
        except Exception:
            counts[name]["refused"] += 1

    for name, args in calls:
        kind = (name, args[1])
        full = kind not in seen
        seen.add(kind)
        for k, value in enumerate(args):
            for other in mutants(value):
                if not full and random.random() > 0.05:
                    continue
                guards: list[Tensor] = []
                wrong = tuple(guarded(v, guards) for v in (*args[:k], other, *args[k + 1 :]))
                threads = torch.get_num_threads()
                tried(name, *wrong)
                torch.set_num_threads(threads)
                for g in guards:
                    assert g[:GUARD].eq(77).all(), (name, k, other)
                    assert g[-GUARD:].eq(77).all(), (name, k, other)
    for size in (*NUMBERS, None, "x", 1.5):
        tried("Scratch", size)
    for thing in THINGS[:-1]:
        tried("poison", thing)
        tried("make_large", 0, thing)
        tried("make_large", thing, cpp._large)
    # A call must refuse result tensors that do not fit, whatever the function that makes them.
    whole = next(args for name, args in calls if name == "forward")
    for make in (
        lambda like, *shape: None,
        lambda like, *shape: like.new_empty(shape)[..., :0],
        lambda like, *shape: like.new_empty(*shape[:-1], 2 * shape[-1])[..., ::2],
        lambda like, *shape: like.new_empty(shape, dtype=torch.int64),
        lambda like, *shape: torch.empty(shape, dtype=like.dtype, device="meta"),
        lambda like: like,
    ):
        cpp._cpp.make_large(0, make)
        before = counts["forward"]["taken"]
        tried("forward", *whole)
        assert counts["forward"]["taken"] == before, "results that do not fit were accepted"
    cpp._cpp.make_large(cpp.LARGE, cpp._large)
    cpp._cpp.release()
    for name, count in counts.items():
        print(f"{name}: {count['taken']} taken, {count['refused']} refused")
        assert count["refused"] >= (1000 if name in ENTRIES else 5), name


if __name__ == "__main__":
    main()
