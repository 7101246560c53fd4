"""fastrnn against torch.nn, sample by sample in one process.

    python bench/paired.py [--cell LSTM] [--pass training] [--threads 2] [--seconds 1.0]

Machines drift by more than the differences of interest, so the two libraries take turns: a sample
of one, then a sample of the other, and the ratio is the median of the ratios of neighbours.
Training is one forward and one full backward pass (input, weights, biases, initial state). Outputs
and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from cases import CELLS, EVEN, GRID, PASSES, Shape
from rich.console import Console
from rich.progress import track

import fastrnn


def work(
    library: object, cell: str, shape: Shape, which: str
) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """A function that runs the case once, and what it computes, for comparison."""
    T, B, I, H = shape
    torch.manual_seed(0)
    module = getattr(library, cell)(I, H)
    x = torch.randn(T, B, I)
    h = torch.randn(1, B, H)
    hx = (h, torch.randn(1, B, H)) if cell == "LSTM" else h
    leaves = [x, *(hx if isinstance(hx, tuple) else [hx]), *module.parameters()]
    cotangent = torch.randn(T, B, H)
    if which == "inference":
        module.eval()

        def infer() -> object:
            with torch.inference_mode():
                return module(x, hx)

        with torch.inference_mode():
            return infer, [module(x, hx)[0]]
    for leaf in leaves:
        leaf.requires_grad_()

    def train() -> object:
        output, _ = module(x, hx)
        return torch.autograd.grad(output, leaves, cotangent)

    return train, [module(x, hx)[0], *torch.autograd.grad(module(x, hx)[0], leaves, cotangent)]


def compare(cell: str, shape: Shape, which: str, seconds: float) -> tuple[float, float, float]:
    """Median seconds of torch.nn and of fastrnn, and the median of the ratios."""
    theirs, expected = work(torch.nn, cell, shape, which)
    ours, got = work(fastrnn, cell, shape, which)
    for a, b in zip(got, expected, strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        if not error < 1e-4:
            raise AssertionError(f"{cell} {shape} {which}: results differ by {error:.1e}")
    for _ in range(3):
        theirs(), ours()
    # Short cases are repeated until a sample is long enough for the clock.
    start = time.perf_counter()
    theirs()
    once = time.perf_counter() - start
    repeats = max(1, round(1e-3 / once))
    a, b = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(a) < 7:
        for run, times in ((theirs, a), (ours, b)):
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times.append((time.perf_counter() - start) / repeats)
    ratio = statistics.median(p / q for p, q in zip(a, b, strict=True))
    return statistics.median(a), statistics.median(b), ratio


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cell", choices=CELLS, nargs="*", default=CELLS)
    parser.add_argument("--pass", dest="which", choices=PASSES, nargs="*", default=PASSES)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, fastrnn {fastrnn.__version__}, {args.threads} threads, "
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(fastrnn.explain(fastrnn.LSTM(1, 1), torch.zeros(1, 1, 1)))
    cases = [(c, w, s) for c in args.cell for w in args.which for s in GRID]
    rows, ratios = [], {}
    for cell, which, shape in track(cases, "timing", console=Console(stderr=True)):
        theirs, ours, ratio = compare(cell, shape, which, args.seconds)
        rows.append(
            f"| {cell} | {which} | {shape} | {theirs * 1e3:.3f} | {ours * 1e3:.3f} | {ratio:.2f} |"
        )
        ratios[cell, which, shape] = ratio
    print("| cell | pass | (T, B, I, H) | torch.nn ms | fastrnn ms | ratio |")
    print("|---|---|---|---:|---:|---:|")
    print("\n".join(rows))
    for cell in args.cell:
        for which in args.which:
            even = [ratios[cell, which, s] for s in EVEN]
            print(f"{cell} {which}: geometric mean over the even shapes {geometric_mean(even):.2f}")


if __name__ == "__main__":
    main()
