"""Compile kernels without a GPU, and measure the resources that they use.

``python -m fastrnn.kernels.triton`` prints the results of :func:`measure` and the budgets that a
kernel breaks. Kernels are compiled exactly as in a run: by the same launches, with tensors on the
meta device, under a driver that only knows its target.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from fastrnn.cells import CELLS, Cell
from fastrnn.kernels.triton import launch, sequence
from fastrnn.kernels.triton.plans import (
    BUCKETS,
    LIMITS,
    Plan,
    Target,
    find,
    program,
    resident,
    streaming,
)
from fastrnn.layer import Layer, Rows, Weights

PRECISIONS = {"16-bit": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
PASSES = ("forward", "backward")

OPTIONS = ("inference", "packed", "projected", "odd", "float16")
"""Options that change the kernels of a plan. "odd" is an H that is not a multiple of 16."""


@dataclass(frozen=True)
class Request:
    """A kernel of a plan.

    Attributes:
        which: one of PASSES.
        options: a subset of OPTIONS.
    """

    architecture: str
    mode: str
    precision: str
    H: int
    which: str
    plan: Plan
    options: frozenset[str] = frozenset()

    @property
    def cell(self) -> Cell:
        return CELLS[self.mode]

    @property
    def proj_size(self) -> int:
        """Half of H, in whole tiles."""
        return self.H // 32 * 16 if "projected" in self.options else 0


@dataclass(frozen=True)
class Kernel:
    """The resources of the compiled kernels of a request.

    Attributes:
        registers: per thread; on AMD of both kinds together.
        spills: bytes of stack that registers were spilled to.
        shared: bytes of shared memory.
        products: tensor-core instructions per warp and step, as counted and as expected.
        problems: descriptions of the budgets that it breaks.
    """

    registers: int
    spills: int
    shared: int
    products: tuple[int, int]
    problems: tuple[str, ...]


class _Driver:
    """The part of a driver that triton needs in order to compile."""

    def __init__(self, architecture: str) -> None:
        kind, arch = architecture.split(":")
        self.target = (
            GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled(request: Request) -> list[tuple[launch.Launch, Any]]:
    """The distinct kernels of a request, each with a launch of it."""
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, so there is nothing to compile")
    triton.runtime.driver.set_active(_Driver(request.architecture))
    kernels: dict[str, tuple[launch.Launch, Any]] = {}

    def run(one: launch.Launch) -> None:
        part = one.constants["PART"]
        if part not in kernels:
            made = one.kernel.warmup(*one.args, grid=one.grid, **one.constants)
            kernels[part] = (one, made)

    cell, H = request.cell, request.H - ("odd" in request.options)
    dtype = torch.float16 if "float16" in request.options else PRECISIONS[request.precision]
    projected = request.proj_size > 0
    T, B, D, G, P = 3, 16, 1, len(cell.gates), request.proj_size or H

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = Weights(
        ih=empty(G * H, H),
        hh=empty(G * H, P),
        bias_ih=empty(G * H),
        bias_hh=empty(G * H),
        hr=empty(P, H) if projected else None,
    )
    packed = "packed" in request.options
    x = empty(T * B, H) if packed else empty(T, B, H)
    rows = Rows(T, B, T * B, torch.full((T,), B) if packed else None)
    final = tuple(empty(D, B, H if k else P) for k in cell.state_range)
    layer = Layer(cell, rows, [weights], final)
    target = Target(request.precision, 1 << 20, request.architecture.startswith("hip"))
    if request.which == "forward":
        save = "inference" not in request.options
        launch.forward(request.plan, target, layer, x, save, run)
    else:
        out, saved = empty(*x.shape[:-1], D * P), empty(*layer.saved_shape(H))
        launch.backward(request.plan, target, layer, x, out, saved, out, final, run)
    return list(kernels.values())


def measure(request: Request) -> Kernel:
    """Compile a request and compare it with the limits of its architecture."""
    found = [_measure(request, one, made) for one, made in compiled(request)]
    return Kernel(
        max(k.registers for k in found),
        max(k.spills for k in found),
        max(k.shared for k in found),
        (sum(k.products[0] for k in found), sum(k.products[1] for k in found)),
        tuple(dict.fromkeys(p for k in found for p in k.problems)),
    )


def _measure(request: Request, one: launch.Launch, made: Any) -> Kernel:
    cuda = request.architecture.startswith("cuda")
    text = made.asm["ptx" if cuda else "amdgcn"]
    registers, spills = _of_cubin(made) if cuda else _of_amdgcn(text)
    shared = made.metadata.shared
    pattern = r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma\b" if cuda else r"\bv_mfma"
    counted, expected = len(re.findall(pattern, text)), _products(request, one)
    if not one.constants["RESIDENT"] and expected:
        # Pipelining moves up to two iterations of the loop over K before or after it.
        expected *= min(max(1, counted // expected), 3)
    products = (counted, expected)
    limits = LIMITS.get(request.architecture)
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    if limits and shared > limits.shared:
        problems.append(f"{shared} bytes of shared memory, of {limits.shared}")
    threads = one.constants["num_warps"] * (limits.warp if limits else 32)
    if limits and registers * threads > limits.registers:
        problems.append(f"{registers * threads} registers, of {limits.registers}")
    if limits and one.constants["SYNC"] == "grid" and one.grid[0] > limits.processors:
        problems.append(
            f"{one.grid[0]} programs that wait for each other, on {limits.processors} processors"
        )
    if products[0] != products[1]:
        problems.append(f"{products[0]} tensor-core instructions a step, not {products[1]}")
    loops = 1 + (one.constants["PROJECTED"] and one.constants["PART"] == "both")
    if not one.constants["RESIDENT"] and (dots := _dots_in_inner_loops(made)) != loops:
        problems.append(f"{dots} products of tiles in the loops over K, not {loops}")
    before, inside = (_weight_loads(made, inside) for inside in (False, True))
    if one.constants["RESIDENT"] and inside:
        problems.append(f"{inside} loads of resident weights inside the loop over time")
    if not (before if one.constants["RESIDENT"] else inside):
        problems.append("no load of weights was found where it should be")
    if one.constants["RESIDENT"] and _prefetches(made):
        problems.append("data that a step writes is read ahead, in pipeline stages")
    if one.constants["SYNC"] == "grid":
        problems += [f"the barrier lacks {what}" for what in _barrier_lacks(one, made)]
    return Kernel(registers, spills, shared, products, tuple(problems))


# Rows, columns and K of a tensor-core instruction, per warp.
_SHAPES = {
    ("cuda", "16-bit"): (16, 8, 16),
    ("cuda", "tf32"): (16, 8, 8),
    ("hip", "16-bit"): (16, 16, 16),
    ("hip", "ieee"): (16, 16, 4),
}


def _products(request: Request, one: launch.Launch) -> int:
    """Tensor-core instructions that a warp needs per step, or per iteration of a loop over K."""
    shape = _SHAPES.get((request.architecture.split(":")[0], request.precision))
    if shape is None:
        return 0
    c = one.constants
    G = len(request.cell.gates)
    forward = request.which == "forward"
    first = c["PART"] in ("both", "cell" if forward else "product")
    second = c["PROJECTED"] and c["PART"] in ("both", "projection" if forward else "cell")
    # Columns and K of the products with W_hh and W_hr.
    columns = (c["BH"] * request.cell.num_preacts, c["BP"]) if forward else (c["BP"], c["BH"])
    if c["SYNC"] == "program":
        depths = (c["BP"], c["BH"]) if forward else (G * c["BH"], c["BP"])
    elif c["RESIDENT"]:
        depths = (c["NK"] * c["KC"] * c["SPLIT"], c["NKR"] * c["KC"] * c["SPLIT"])
    else:
        depths = (c["KC"] * c["SPLIT"],) * 2
    rows, width, deep = shape
    each = [
        triton.cdiv(c["BB"], rows) * triton.cdiv(n, width) * triton.cdiv(k, deep)
        for n, k, has in zip(columns, depths, (first, second), strict=True)
        if has
    ]
    return int(triton.cdiv(sum(each), c["num_warps"]))


def _dots_in_inner_loops(made: Any) -> int:
    """Products of tiles per iteration of the loops over K, summed over the loops."""
    loop = r"^( {6,})(?:%\S+ = )?scf\.for [^\n]*\n((?:(?!\1\}).*\n)*)"
    bodies = re.findall(loop, made.asm["ttgir"], re.MULTILINE)
    return sum(len(re.findall(r"= (?:tt\.dot|ttng\.\w*(?:dot|mma))\b", b)) for _, b in bodies)


def _of_cubin(made: Any) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, to which registers are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    assert match, output
    return int(match[1]), int(match[2]) + int(match[3])


def _of_amdgcn(text: str) -> tuple[int, int]:
    """Registers per lane, of both kinds, and bytes of scratch memory."""

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match, name
        return int(match[1])

    # Scalar registers spill to lanes of vector registers, which needs no memory.
    spilled = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return number("vgpr_count"), spilled


def _time_loop(ir: str) -> tuple[int, int]:
    """Begin and end of the loop over time: the first ``for`` at the function's top level."""
    begin = re.search(r"^    (?:%\S+ = )?scf\.for ", ir, re.MULTILINE)
    if begin is None:
        return len(ir), len(ir)
    end = re.compile(r"^    \}", re.MULTILINE).search(ir, begin.end())
    assert end
    return begin.start(), end.end()


@cache
def _lines_of(function: Any) -> tuple[int, int]:
    source, first = inspect.getsourcelines(function.fn)
    return first, first + len(source)


def _weight_loads(made: Any, inside: bool) -> int:
    """Loads that ``right_tile`` issues inside the loop over time, or outside."""
    ir = made.asm["ttgir"]
    begin, end = _time_loop(ir)
    names = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ir, re.MULTILINE))
    first, last = _lines_of(sequence.right_tile)
    loads = 0
    for match in re.finditer(
        r"(?:tt\.load|buffer_load\w*|async_copy_global_to_local)\b.*loc\((#loc\d*)\)", ir
    ):
        if (begin <= match.start() < end) == inside:
            # A chain of call sites begins with the innermost location.
            location = names[match[1]]
            while inner := re.match(r"[^#]*(#loc\d+)", location):
                location = names[inner[1]]
            line = re.search(r'":(\d+):\d+', location)
            loads += line is not None and first <= int(line[1]) < last
    return loads


def _prefetches(made: Any) -> bool:
    """Whether asynchronous copies, begun in an earlier step, read data that a step writes."""
    ir = made.asm["ttgir"]
    begin, end = _time_loop(ir)
    return "async_copy" in ir[begin:end]


def _barrier_lacks(one: launch.Launch, made: Any) -> list[str]:
    """The parts of the device-wide barrier that the code lacks in at least one place.

    All threads must have written before one thread signals, by a release. No thread may read before
    that thread has seen the arrivals of all programs, by an acquire.
    """
    cuda = "ptx" in made.asm
    code, ir = made.asm["ptx" if cuda else "amdgcn"], made.asm["ttgir"]
    barrier = r"(?:ttg|gpu)\.barrier[^\n]*\n"
    loop = r"^( +)(?:%\S+ = )?scf\.while[^\n]*\n(?:(?!\1\}(?! do)).*\n)*\1\}[^\n]*\n"
    if cuda:
        release, acquire = r"(?:atom|red)\S*\.release", r"(?:atom|ld)\S*\.acquire"
    else:
        release, acquire = "buffer_wbl2", "buffer_inv"
    needed = {
        "a release": (release, code),
        "an acquire": (acquire, code),
        "a barrier of the program before it": (
            rf"{barrier}(?:[^\n]*addptr[^\n]*\n)?[^\n]*atomic_rmw add, \w*rel",
            ir,
        ),
        "a barrier of the program after it": (rf"{loop}\s*{barrier}", ir),
    }
    if not cuda:
        # By every wave, with no store between it and the barrier.
        stores = r"(?:global|buffer|flat)_(?:store|atomic)"
        wait = rf"ASMSTART\n\s*s_waitcnt vmcnt\(0\)\n(?:(?!.*{stores}).*\n)*?\s*s_barrier"
        needed["a wait for stores"] = (wait, code)
    syncs = 1 + one.constants["PROJECTED"]
    return [
        what
        for what, (pattern, text) in needed.items()
        if sum(1 for _ in re.finditer(pattern, text, re.MULTILINE)) < syncs
    ]


def requests(
    architectures: list[str],
    modes: list[str],
    precisions: list[str],
    options: frozenset[str] = frozenset(),
) -> list[Request]:
    """Every distinct kernel of the plan table for which these options exist."""
    chosen: dict[Any, Request] = {}
    for architecture in architectures:
        for mode in modes:
            for precision in precisions:
                G = len(CELLS[mode].gates)
                for H in BUCKETS:
                    if "projected" in options and BUCKETS[-1] > H:
                        # The largest H for which find() returns this entry.
                        H = 2 * G * H // (2 * G + 1) // 16 * 16
                    plans = find(architecture, mode, precision, H)
                    for which, plan in zip(PASSES, plans or (), strict=False):
                        request = Request(architecture, mode, precision, H, which, plan, options)
                        if not _exists(request):
                            continue
                        for kind in plan.kinds():
                            of_kind = replace(request, plan=kind)
                            chosen.setdefault(_kernel_of(of_kind), of_kind)
    return list(chosen.values())


def _exists(request: Request) -> bool:
    options = request.options
    return not (
        ("projected" in options and not request.cell.projectable)
        or ("inference" in options and request.which == "backward")
        or ("float16" in options and request.precision != "16-bit")
    )


def _kernel_of(request: Request) -> Request:
    """The request with H = 0 if its kernel serves every H, as without resident weights."""
    return request if request.plan.resident else replace(request, H=0)


def candidates(request: Request) -> Iterator[Plan]:
    """Plans in order of preference: resident weights first, then large tiles, then few warps."""
    cell, H, forward = request.cell, request.H, request.which == "forward"
    size = PRECISIONS[request.precision].itemsize
    if H <= 64:
        yield from (program(8), program(4), program(2))
    # About 64 columns: four warps of a tensor-core tile each, or K split over the warps.
    preacts = cell.num_preacts
    units = 64 // preacts if forward else 16 if preacts > 1 else 64
    columns = units * preacts if forward else units
    teams = [(1, 4), (1, 8)] if columns > 16 else [(4, 4), (8, 8)]
    depths = (128, 64, 32) if size == 2 else (64, 32, 16)
    limits = LIMITS[request.architecture]
    weights = size * H * units * (preacts if forward else len(cell.gates))
    if weights <= max(limits.shared, 4 * limits.registers) and H <= 1024:
        yield from (resident(units, k, split, warps) for split, warps in teams for k in depths)
    if H > 1024:
        # Half as many programs, since all of them must be on the device at once.
        units, teams = 2 * units, [*teams, (1, 4)]
    yield from (streaming(units, k, split, warps) for split, warps in teams for k in depths)


def _compile(request: Request) -> Kernel | str:
    try:
        return measure(request)
    except Exception as error:  # triton's compile errors have no common class
        return f"does not compile: {(str(error).splitlines() or [repr(error)])[-1]}"


def measure_alone(request: Request) -> Kernel | str:
    """:func:`measure` in a process of its own, which a failed compiler assertion would end."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        try:
            return pool.submit(_compile, request).result()
        except BrokenProcessPool:
            return "does not compile: the compiler crashed"


def _holds(request: Request) -> bool:
    kernels = [measure_alone(replace(request, plan=plan)) for plan in request.plan.kinds()]
    return not any(isinstance(kernel, str) or kernel.problems for kernel in kernels)


def search(request: Request) -> Plan | None:
    """The first candidate within the limits; ``request.plan`` is ignored."""
    for plan in candidates(request):
        if _holds(replace(request, plan=plan)):
            return plan
    return None


def largest(request: Request) -> int:
    """The largest H, in steps of 128 and to 2048, for which the plan is within the limits."""
    # Upwards, since the compiler takes minutes for an H that is far too large.
    H = request.H
    while BUCKETS[-1] > H and _holds(replace(request, H=H + 128)):
        H += 128
    return H
