"""How layers scale to more threads: predicted by bench/scaling.cpp, and measured: `make scaling`.

    python bench/scaling.py PROGRAM [--cells LSTM ...] [--out build/scaling]

Prints a table of the speed over one thread, and writes the results (JSON) and a plot. The
prediction runs the share of each of 1 to 64 threads alone on one core. Where there are more cores
than one, the same calls are also measured, with as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from itertools import product
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.progress import Progress
from workloads import CELLS, EVEN, PASSES, Shape

import fastrnn

MODES = {"RNN": "RNN_TANH", "GRU": "GRU", "LSTM": "LSTM"}
THREADS = (1, 2, 4, 8, 16, 32, 64)
# Beside the shapes of `make bench`: wide layers, whose weights exceed a core's caches.
SHAPES = (*EVEN, Shape(40, 48, 320, 512), Shape(30, 64, 700, 768))
SECONDS = 0.3  # of each measurement

Results = dict[tuple[str, Shape, str], dict[int, float]]
"""Seconds by cell, shape and pass, and by number of threads."""


def predicted(program: str, cells: list[str]) -> Results:
    results: Results = {}
    with Progress() as progress:
        task = progress.add_task("predicting", total=len(cells) * len(SHAPES))
        for cell, shape in product(cells, SHAPES):
            command = [program, MODES[cell], *map(str, (*shape, *THREADS))]
            for line in subprocess.check_output(command, text=True).splitlines():
                row = json.loads(line)
                results.setdefault((cell, shape, row["which"]), {})[row["threads"]] = row["seconds"]
            progress.advance(task)
    return results


def measured(cell: str, shape: Shape, which: str, threads: int) -> float:
    """The median time of a call of the extension's backend, in seconds."""
    T, B, I, H = shape
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    layer, x = getattr(fastrnn, cell)(I, H), torch.randn(T, B, I)
    training = which == "training"
    x.requires_grad_(training)
    cotangent = torch.randn(T, B, H)
    leaves = [x, *layer.parameters()]

    def run() -> None:
        with fastrnn.use_backend("cpp"), torch.set_grad_enabled(training):
            output, _ = layer(x)
            if training:
                torch.autograd.grad(output, leaves, cotangent)

    run()
    times = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(results: Results, cores: int) -> Results:
    counts = [n for n in THREADS if n <= cores]
    found: Results = {}
    if len(counts) < 2:
        return found
    with Progress() as progress:
        for key in progress.track(results, description="measuring"):
            found[key] = {n: measured(*key, n) for n in counts}
    return found


def table(results: Results, times: Results) -> str:
    lines = [
        "| cell | pass | (T, B, I, H) | ms of 1 thread | "
        + " | ".join(f"{n} threads" for n in THREADS[1:])
        + " | measured |",
        "|---|---|---|---:|" + "---:|" * len(THREADS),
    ]
    for key, row in results.items():
        cell, shape, which = key
        one = row[1]
        shown = " | ".join(f"{one / row[n]:.1f}" for n in THREADS[1:])
        own = times.get(key, {})
        here = ", ".join(f"{n}: {own[1] / own[n]:.1f}" for n in own if n > 1)
        lines.append(f"| {cell} | {which} | {shape} | {1e3 * one:.2f} | {shown} | {here} |")
    return "\n".join(lines)


def plot(results: Results, times: Results) -> plt.Figure:
    cells = [c for c in CELLS if any(key[0] == c for key in results)]
    figure, axes = plt.subplots(
        2, len(cells), figsize=(5 * len(cells), 9), sharex=True, sharey=True, squeeze=False
    )
    for column, cell in enumerate(cells):
        for row, which in enumerate(PASSES):
            ax = axes[row, column]
            ax.plot(THREADS, THREADS, color="0.8", label="linear")
            shapes = [s for c, s, w in results if (c, w) == (cell, which)]
            for k, shape in enumerate(shapes):
                key, color = (cell, shape, which), f"C{k % 10}"
                seconds = [results[key][n] for n in THREADS]
                ax.plot(THREADS, [seconds[0] / s for s in seconds], color=color, label=str(shape))
                own = times.get(key, {})
                ax.plot(list(own), [own[1] / s for s in own.values()], "o", color=color)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(THREADS, [str(n) for n in THREADS])
            ax.set_yticks(THREADS, [str(n) for n in THREADS])
            ax.set_title(f"{cell} {which}")
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("threads")
    figure.supylabel("times as fast as one thread (lines: predicted, dots: measured)")
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", help="built from scaling.cpp")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--out", type=Path, default=Path("build/scaling"))
    args = parser.parse_args()
    results = predicted(args.program, args.cells)
    times = measure(results, len(os.sched_getaffinity(0)))
    print(table(results, times))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"cell": cell, "shape": shape, "which": which, "predicted": row, "measured": times.get(key)}
        for key, row in results.items()
        for cell, shape, which in [key]
    ]
    (args.out / "scaling.json").write_text(json.dumps(rows, indent=1))
    figure = plot(results, times)
    for kind in ("png", "svg"):
        figure.savefig(args.out / f"scaling.{kind}", dpi=110)


if __name__ == "__main__":
    main()
