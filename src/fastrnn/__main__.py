"""``python -m fastrnn info``: what runs here, for a bug report.

``python -m fastrnn aot``: what the GPU kernels take, compiled without a GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from fastrnn.kernels.triton.aot import Kernel, Request

_A = TypeVar("_A")
_B = TypeVar("_B")

HEADER = (
    "| target | cell | products | H | pass | plan | registers | spills | shared | tensor-core "
    "instructions | worked out | problems |",
    "|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---|",
)


def _each(function: Callable[[_A], _B], items: list[_A], jobs: int, label: str) -> Iterator[_B]:
    """Results in order, computed by processes of their own, with progress on a terminal."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as pool:
        results = pool.map(function, items)
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            yield from results
        else:
            yield from track(results, label, len(items), console=Console(stderr=True))


def _row(request: Request, kernel: Kernel | str) -> str:
    H = str(request.H) if request.plan.resident else "any"
    which = ", ".join([request.which, *sorted(request.options)])
    asked = f"{request.architecture} | {request.mode} | {request.precision} | {H} | {which}"
    if isinstance(kernel, str):
        return f"| {asked} | {request.plan} | | | | | | {kernel} |"
    counted, expected = kernel.products
    return (
        f"| {asked} | {request.plan} | {kernel.registers} | {kernel.spills} | {kernel.shared} "
        f"| {counted} | {expected} | {'; '.join(kernel.problems)} |"
    )


def _table(requests: list[Request], jobs: int) -> int:
    """Print what every kernel takes; 1 if one breaks a budget."""
    from fastrnn.kernels.triton import aot

    kernels = list(_each(aot.measure_alone, requests, jobs, "compiling"))
    print(*HEADER, sep="\n")
    for request, kernel in zip(requests, kernels, strict=True):
        print(_row(request, kernel))
    broken = [k for k in kernels if isinstance(k, str) or k.problems]
    if broken:
        print(f"{len(broken)} of {len(kernels)} kernels break a budget", file=sys.stderr)
    return int(bool(broken))


def _largest(requests: list[Request], jobs: int) -> int:
    """Print up to which H weights stay resident, by the plan of the largest that has such."""
    from fastrnn.kernels.triton import aot

    last: dict[tuple[str, ...], Request] = {}
    for request in requests:
        if request.plan.resident and request.plan.sync == "grid":
            key = (request.architecture, request.mode, request.precision, request.which)
            last[key] = request
    found = _each(aot.largest, list(last.values()), jobs, "searching")
    print("| target | cell | products | pass | plan | largest resident H |")
    print("|---|---|---|---|---|---:|")
    for asked, request, H in zip(last, last.values(), found, strict=True):
        print(f"| {' | '.join(asked)} | {request.plan} | {H} |")
    return 0


def _plans(requests: list[Request], jobs: int) -> int:
    """Print rows of ``kernels/triton/table.py`` with the first plans that hold every budget."""
    from fastrnn.kernels.triton import aot
    from fastrnn.kernels.triton.plans import names, shares

    found = list(_each(aot.search, requests, jobs, "searching"))
    for k in range(0, len(found), 2):
        request = requests[k]
        name = names(request.mode)[0 if shares(request.mode) else -1]
        key = (request.architecture, name, request.precision, request.H)
        print(f"    {key}: Plans({found[k]}, {found[k + 1]}),".replace("'", '"'))
    return int(None in found)


def _paper() -> int:
    """Print what a step of a 16-bit LSTM costs an H100 at least."""
    from fastrnn.kernels.triton.plans import BUCKETS, DEVICES, Step, find

    parts = ("weights", "h", "products", "barrier")
    print(f"| H | B | plan | {' | '.join(parts)} | sum | launched |")
    print("|---:|---:|---|" + "---:|" * (len(parts) + 2))
    for H in BUCKETS:
        for B in (16, 64, 256):
            found = find("cuda:90", "LSTM", "16-bit", H)
            assert found
            step, device = Step(4, H, 0, B, "16-bit"), DEVICES["cuda:90"]
            cost = step.least_time(found.forward, device)
            shown = [cost[p] for p in parts] + [sum(cost.values()), step.launched_time(device)]
            row = " | ".join(f"{1e6 * seconds:.2f}" for seconds in shown)
            print(f"| {H} | {B} | {found.forward} | {row} |")
    return 0


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _openmp() -> str:
    """The OpenMP runtimes that are loaded: with two, threads of one do not know of the other's."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return "not known on this system"
    found = sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps)))
    if len(found) > 1:
        return f"{len(found)} runtimes, which share no threads: {', '.join(found)}"
    return f"{found[0]}, the only one" if found else "none"


def _info() -> int:
    from fastrnn.dispatch import BACKENDS, load_backend

    modules: dict[str, Any] = {name: load_backend(name) for name in BACKENDS}
    missing = {name: module.missing() for name, module in modules.items()}
    missing["numba"] = missing["numba"] or modules["numba"].broken()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    isa = "no extension"
    if missing["cpp"] is None:
        from fastrnn.backends import cpp

        isa = cpp.isa()
    print(f"fastrnn     {_version_of('fastrnn')} in {Path(__file__).parent}")
    print(f"python      {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numba", "numpy"):
        found = torch.__version__ if package == "torch" else _version_of(package)
        print(f"{package:<12}{found}")
    print(f"processor   {_processor()}")
    print(f"vectors     {isa}; torch: {torch.backends.cpu.get_cpu_capability()}")
    print(f"threads     {torch.get_num_threads()} of torch, on {cores} cores")
    print(f"OpenMP      {_openmp()}")
    for name in ("FASTRNN_BACKEND", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET"):
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
    if torch.cuda.is_available():
        print(f"GPU         {torch.cuda.get_device_name()}")
    print("backends")
    for name, problem in missing.items():
        print(
            f"  {name:<10}{f'cannot run: {problem}' if problem else load_backend(name).describe()}"
        )
    return 0


def main() -> int:
    from fastrnn.kernels.triton.plans import BUCKETS, LIMITS, MODES, has_own_row, program, shares

    parser = argparse.ArgumentParser("python -m fastrnn", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser(
        "info",
        help="print versions, threads and what each backend lacks, for a bug report",
    )
    aot = commands.add_parser(
        "aot",
        help="compile the Triton kernels of the plan table and print what they take",
        description="Compile every Triton kernel of the plan table, with no GPU, and print "
        "registers, spills, shared memory and tensor-core instructions. Exits with 1 if a kernel "
        "breaks a budget of its architecture.",
    )
    aot.add_argument("--target", nargs="+", help="such as cuda:90 or hip:gfx942; default: all")
    aot.add_argument("--cell", nargs="+", help=f"some of {', '.join(MODES)}; default: all")
    aot.add_argument("--products", nargs="+", help="16-bit, tf32, ieee; default: all")
    aot.add_argument(
        "--options",
        nargs="+",
        action="append",
        default=[],
        help="compile what inference, packed, projected, odd (an H that is no multiple of 16) and "
        "float16 change, together; once more "
        "for other kernels (default: that which trains a dense layer)",
    )
    aot.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    instead = aot.add_mutually_exclusive_group()
    instead.add_argument(
        "--largest", action="store_true", help="print the largest resident H instead"
    )
    instead.add_argument(
        "--paper", action="store_true", help="print what a step costs an H100 at least instead"
    )
    instead.add_argument("--search", action="store_true", help="print a new plan table instead")
    args = parser.parse_args()
    if args.command == "info":
        return _info()

    try:
        from fastrnn.kernels.triton.aot import OPTIONS, PASSES, PRECISIONS, Request, requests
    except ImportError as error:
        parser.error(f"aot needs triton: {error}")
    targets, modes = args.target or list(LIMITS), args.cell or list(MODES)
    products = args.products or list(PRECISIONS)
    options = [frozenset(o) for o in args.options] or [frozenset[str]()]
    every = sorted(frozenset[str]().union(*options))
    for given, known in (
        (targets, LIMITS),
        (modes, MODES),
        (products, PRECISIONS),
        (every, OPTIONS),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.paper:
        if args.target or args.cell or args.products or args.options:
            parser.error("--paper is for one device and one cell: expected no other options")
        return _paper()
    if args.search:
        asked = [
            Request(target, mode, precision, H, which, program(4))
            for target in targets
            for mode in modes
            if args.cell or not shares(mode)
            for precision in products
            if not (target.startswith("hip") and precision == "tf32")
            for H in BUCKETS
            for which in PASSES
        ]
        return _plans(asked, args.jobs)
    show = _largest if args.largest else _table
    asked = [r for o in options for r in requests(targets, modes, products, o)]
    if not args.cell:
        asked = [r for r in asked if has_own_row(r.architecture, r.mode, r.precision, r.H)]
    return show(asked, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
