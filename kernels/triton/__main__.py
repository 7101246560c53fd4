"""``python -m fastrnn.kernels.triton``: compile the kernels without a GPU, print their resources.

A tool for maintainers; ``make aot`` runs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

from fastrnn.kernels.triton.plans import (
    BUCKETS,
    DEVICES,
    LIMITS,
    MODES,
    Step,
    find,
    has_own_entry,
    names,
    program,
    shares,
)

if TYPE_CHECKING:
    from fastrnn.kernels.triton.aot import Kernel, Request

_A = TypeVar("_A")
_B = TypeVar("_B")

HEADER = (
    "| target | cell | products | H | pass | plan | registers | spills | shared | tensor-core "
    "instructions | expected | problems |",
    "|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---|",
)


def _each(function: Callable[[_A], _B], items: list[_A], jobs: int, label: str) -> Iterator[_B]:
    """Results in order, computed in worker processes, with a progress bar on a terminal."""
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


def _format_entry(request: Request, kernel: Kernel | str) -> str:
    H = str(request.H) if request.plan.resident else "any"
    which = ", ".join([request.which, *sorted(request.options)])
    columns = f"{request.architecture} | {request.mode} | {request.precision} | {H} | {which}"
    if isinstance(kernel, str):
        return f"| {columns} | {request.plan} | | | | | | {kernel} |"
    counted, expected = kernel.products
    return (
        f"| {columns} | {request.plan} | {kernel.registers} | {kernel.spills} | {kernel.shared} "
        f"| {counted} | {expected} | {'; '.join(kernel.problems)} |"
    )


def _table(requests: list[Request], jobs: int) -> int:
    """Print the resources of every kernel. Return 1 if one breaks a budget."""
    from fastrnn.kernels.triton import aot

    kernels = list(_each(aot.measure_alone, requests, jobs, "compiling"))
    print(*HEADER, sep="\n")
    for request, kernel in zip(requests, kernels, strict=True):
        print(_format_entry(request, kernel))
    broken = [k for k in kernels if isinstance(k, str) or k.problems]
    if broken:
        print(f"{len(broken)} of {len(kernels)} kernels break a budget", file=sys.stderr)
    return int(bool(broken))


def _largest(requests: list[Request], jobs: int) -> int:
    """Print the largest H with resident weights, by the plan of the largest such entry."""
    from fastrnn.kernels.triton import aot

    last: dict[tuple[str, ...], Request] = {}
    for request in requests:
        if request.plan.resident and request.plan.sync == "grid":
            key = (request.architecture, request.mode, request.precision, request.which)
            last[key] = request
    sizes = _each(aot.largest, list(last.values()), jobs, "searching")
    print("| target | cell | products | pass | plan | largest resident H |")
    print("|---|---|---|---|---|---:|")
    for columns, request, H in zip(last, last.values(), sizes, strict=True):
        print(f"| {' | '.join(columns)} | {request.plan} | {H} |")
    return 0


def _plans(requests: list[Request], jobs: int) -> int:
    """Print entries of ``kernels/triton/table.py``, with the first plans that keep every budget."""
    from fastrnn.kernels.triton import aot

    plans = list(_each(aot.search, requests, jobs, "searching"))
    for k in range(0, len(plans), 2):
        request = requests[k]
        name = names(request.mode)[0 if shares(request.mode) else -1]
        entry = (request.architecture, name, request.precision, request.H)
        print(f"    {entry}: Plans({plans[k]}, {plans[k + 1]}),".replace("'", '"'))
    return int(None in plans)


def _cost() -> int:
    """Print the cost model of a step of a 16-bit LSTM on an H100."""
    parts = ("weights", "h", "products", "barrier")
    print(f"| H | B | plan | {' | '.join(parts)} | sum | launched |")
    print("|---:|---:|---|" + "---:|" * (len(parts) + 2))
    for H in BUCKETS:
        for B in (16, 64, 256):
            plans = find("cuda:90", "LSTM", "16-bit", H)
            assert plans
            step, device = Step(4, H, 0, B, "16-bit"), DEVICES["cuda:90"]
            cost = step.least_time(plans.forward, device)
            shown = [cost[p] for p in parts] + [sum(cost.values()), step.launched_time(device)]
            row = " | ".join(f"{1e6 * seconds:.2f}" for seconds in shown)
            print(f"| {H} | {B} | {plans.forward} | {row} |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m fastrnn.kernels.triton",
        description="Compile every Triton kernel of the plan table, without a GPU, and print "
        "registers, spills, shared memory and tensor-core instructions. Exits with 1 if a kernel "
        "breaks a budget of its architecture.",
    )
    parser.add_argument("--target", nargs="+", help="such as cuda:90 or hip:gfx942; default: all")
    parser.add_argument("--cell", nargs="+", help=f"some of {', '.join(MODES)}; default: all")
    parser.add_argument("--products", nargs="+", help="16-bit, tf32, ieee; default: all")
    parser.add_argument(
        "--options",
        nargs="+",
        action="append",
        default=[],
        help="compile the kernels changed by some of inference, packed, projected, odd (an H that "
        "is not a multiple of 16) and float16, combined; repeat the option for further "
        "combinations (default: the kernels that train a dense layer)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--largest", action="store_true", help="print the largest resident H instead"
    )
    instead.add_argument(
        "--cost",
        action="store_true",
        help="print the cost model of a step of a 16-bit LSTM on an H100 instead",
    )
    instead.add_argument("--search", action="store_true", help="print a new plan table instead")
    args = parser.parse_args()

    try:
        from fastrnn.kernels.triton.aot import OPTIONS, PASSES, PRECISIONS, Request, requests
    except ImportError as error:
        parser.error(f"this tool needs triton: {error}")
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
    if args.cost:
        if args.target or args.cell or args.products or args.options:
            parser.error("--cost is for one device and one cell: expected no other options")
        return _cost()
    if args.search:
        chosen = [
            Request(target, mode, precision, H, which, program(4))
            for target in targets
            for mode in modes
            if args.cell or not shares(mode)
            for precision in products
            if not (target.startswith("hip") and precision == "tf32")
            for H in BUCKETS
            for which in PASSES
        ]
        return _plans(chosen, args.jobs)
    chosen = [r for o in options for r in requests(targets, modes, products, o)]
    if not args.cell:
        chosen = [r for r in chosen if has_own_entry(r.architecture, r.mode, r.precision, r.H)]
    return (_largest if args.largest else _table)(chosen, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
