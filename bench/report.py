"""Tables and plots of the results of `make bench`.

    python bench/report.py build/bench/results.json [--out build/bench] [--readme]

Prints a Markdown report and writes it, with its plots as PNG and SVG, to the folder of --out.
--readme writes the summary into README.md, and the report and its plots into docs/benchmarks/.
The GPU row of the summary comes from docs/benchmarks/h200.json, which bench/graphs.py measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from graphs import T as GPU_STEPS
from matplotlib import ticker
from workloads import CELLS, EVEN, LAST, ODD, PASSES, Shape, geometric_mean

mpl.rcParams["svg.hashsalt"] = "fastrnn"  # the same element names in every run

ROOT = Path(__file__).resolve().parent.parent
README_SHAPES = tuple(
    Shape(*s)
    for s in (
        (1, 1, 64, 64),
        (100, 1, 64, 64),
        (100, 32, 256, 256),
        (50, 64, 512, 512),
        (200, 128, 128, 128),
        (1000, 8, 32, 32),
    )
)
GPU_HIDDEN, GPU_BATCH = 256, 64  # up to which the README reports a GPU
COLUMNS = [(cell, which) for cell in CELLS[::-1] for which in PASSES[::-1]]
NUMBA, COMPILED, LENGTHS = "fastrnn numba", "fastrnn compiled", "fastrnn lengths"
COLORS = {
    "fastrnn": "#d1495b",
    "torch.nn": "#30638e",
    "onnxruntime": "#66a182",
    "openvino": "#8d6b94",
    "jax": "#edae49",
    "torch.compile": "#9c9c9c",
    "flashrnn": "#66a182",
    NUMBA: "#e8a0aa",
    COMPILED: "#f2c5cb",
    LENGTHS: "#f7dfe2",
}


CONDITIONS = {
    "busy": "busy: one other process per core, never idle",
    "one-core": "one-core: restricted to one core, with torch set to two threads",
}


@dataclass(frozen=True)
class Result:
    """One case as test_speed.py measured it; seconds and ratios by competitor.

    Attributes:
        peak: flops per second of multiply-adds, measured just before.
        weight_bytes: W_ih and W_hh of each layer.
        compiled: by competitor, the seconds that a compiled graph adds.
        neighbour: for an odd shape, its throughput over that of its even neighbour.
    """

    cell: str
    which: str
    shape: Shape
    variant: str
    threads: int
    flops: float
    peak: float | None
    weight_bytes: list[tuple[float, float]]
    rounds: int
    seconds: dict[str, float]
    ratios: dict[str, float]
    quartiles: dict[str, list[float]]
    compiled: dict[str, float]
    neighbour: float | None
    refusals: dict[str, str]
    memory: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, str, Shape, str]:
        return self.cell, self.which, self.shape, self.variant

    def __str__(self) -> str:
        return f"{self.cell} {self.which} {self.shape} {self.variant}".rstrip()

    @property
    def weight_reads(self) -> int:
        """The number of times W_hh must be read: once per step and pass."""
        return self.shape.T * (2 if self.which == "training" else 1)

    @property
    def recurrent_bytes(self) -> float:
        return sum(w_hh for _, w_hh in self.weight_bytes)

    @property
    def fma_share(self) -> float | None:
        return self.rate / self.peak if self.peak else None

    @property
    def rate(self) -> float:
        return self.flops / self.seconds["fastrnn"]

    @property
    def fastest_competitor(self) -> tuple[str, float]:
        name = min(self.ratios.keys() - {NUMBA, COMPILED, LENGTHS}, key=self.ratios.__getitem__)
        return name, self.ratios[name]


class Report:
    def __init__(self, data: dict[str, Any]) -> None:
        self.machine = data["machine_info"]
        self.settings = self.machine["fastrnn"]
        self.commit = data["commit_info"]
        extra = [b["extra_info"] for b in data["benchmarks"]]
        self.results = [Result(**{**e, "shape": Shape(*e["shape"])}) for e in extra if e]
        self.by_key = {r.key: r for r in self.results}

    def find(self, cell: str, which: str, shape: Shape, variant: str = "") -> Result | None:
        return self.by_key.get((cell, which, shape, variant))

    def grid(self, cell: str, which: str, shapes: Iterable[Shape]) -> list[Result]:
        return [r for s in shapes if (r := self.find(cell, which, s))]

    # Limits of the machine

    def bandwidth_share(self, r: Result) -> float | None:
        """The least time for reading the weights, over the measured time.

        They are read from the nearest memory level that holds them: W_hh once per step, W_ih once
        per call, and in training both again in the backward pass.
        """
        probe = self.settings["probe"].get(str(r.threads))
        if not probe:
            return None

        def seconds(size: float) -> float:
            rates = [rate for level, rate in probe["read"] if level >= size]
            return size / (rates[0] if rates else probe["read"][-1][1])

        back = 2 if r.which == "training" else 1
        least = sum(back * seconds(i) + r.weight_reads * seconds(h) for i, h in r.weight_bytes)
        return least / r.seconds["fastrnn"]

    def ceiling(self, cell: str, which: str) -> float | None:
        """The mean ratio to torch.nn if every case with B >= 8 ran at the FMA peak."""
        ratios = [
            r.ratios["torch.nn"] / (r.fma_share if r.shape.B >= 8 else 1)
            for r in self.grid(cell, which, EVEN)
            if r.fma_share
        ]
        return geometric_mean(ratios) if ratios else None

    # Text

    def heading(self) -> list[str]:
        versions = ", ".join(f"{n} {v}" for n, v in self.settings["versions"].items())
        commit = str(self.commit.get("id"))[:10] + (
            " and changes" if self.commit.get("dirty") else ""
        )
        cpu = self.machine.get("cpu", {}).get("brand_raw", self.machine["processor"])
        lines = (
            []
            if self.settings.get("device", "cpu") == "cpu"
            else [f"- on {self.settings['device']}"]
        )
        lines += [
            f"- {self.settings.get('dtype', 'float32')}; {self.settings['threads']} threads on "
            f"{self.settings['cores']} cores of {cpu}, instruction set of torch: "
            f"{self.settings['torch_isa']}; {self.settings['engine']}"
            + ("; all cores kept busy by other processes" if self.settings["busy"] else ""),
            f"- Python {self.machine['python_version']}, {versions}; commit {commit}",
            f"- {self.settings['seconds']:g} s per case, at least "
            f"{min(r.rounds for r in self.results)} rounds; in the median case the middle half "
            f"of the ratios to torch.nn spans {100 * spread(self.results):.0f} % of their median",
        ]
        if self.settings["import"]:
            lines.append(
                f"- `import fastrnn` adds {self.settings['import']:.0f} ms to `import torch`, the "
                "median of ten processes"
            )
        for threads, probe in self.settings["probe"].items():
            if probe:
                lines.append(
                    f"- measured limit of {threads} thread{'' if threads == '1' else 's'}: "
                    f"{probe['flops'] / 1e9:.0f} GFLOP/s; reading "
                    + ", ".join(
                        f"{rate / 1e9:.0f} GB/s from {size >> 10} KiB"
                        for size, rate in probe["read"]
                        if size >> 10 in (256, 1024, 4096, 16384, 131072)
                    )
                )
        return lines

    def means(self) -> list[str]:
        lines = [
            "| cell | pass | shapes | against torch.nn | if wide batches ran at the FMA peak "
            "| against the fastest competitor | slowest case against it |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for cell in CELLS:
            for which in PASSES:
                grid = self.grid(cell, which, EVEN)
                if not grid:
                    continue
                worst = min(grid, key=lambda r: r.fastest_competitor[1])
                name, ratio = worst.fastest_competitor
                ceiling = self.ceiling(cell, which)
                lines.append(
                    f"| {cell} | {which} | {len(grid)} "
                    f"| {geometric_mean([r.ratios['torch.nn'] for r in grid]):.2f} "
                    f"| {f'{ceiling:.2f}' if ceiling else ''} "
                    f"| {geometric_mean([r.fastest_competitor[1] for r in grid]):.2f} "
                    f"| {emphasised(ratio)} at {worst.shape}, {name} |"
                )
        return lines

    def table(self) -> list[str]:
        names = [n for n in COLORS if any(n in r.ratios for r in self.results)]
        lines = [
            f"| cell | pass | (T, B, I, H) | variant | fastrnn ms | {' | '.join(names)} "
            "| GFLOP/s | of FMA peak | of weight bandwidth | MB | torch.nn MB |",
            "|---|---|---|---|---:|" + "---:|" * (len(names) + 5),
        ]
        for r in self.results:
            ratios = [emphasised(r.ratios[n]) if n in r.ratios else "" for n in names]
            lines.append(
                f"| {r.cell} | {r.which} | {r.shape} | {r.variant} "
                f"| {milliseconds(r.seconds['fastrnn'])} | {' | '.join(ratios)} "
                f"| {r.rate / 1e9:.1f} | {percent(r.fma_share)} "
                f"| {percent(self.bandwidth_share(r))} | {self.megabytes(r)} |"
            )
        return lines

    def megabytes(self, r: Result) -> str:
        if not r.memory:
            return " | "
        ours, theirs = (r.memory["peak"][name] / 1e6 for name in ("fastrnn", "torch.nn"))
        mark = "**" if self.more_memory(r) else ""
        return f"{mark}{ours:.1f}{mark} | {theirs:.1f}"

    def more_memory(self, r: Result) -> bool:
        return bool(r.memory and r.memory["peak"]["fastrnn"] > r.memory["peak"]["torch.nn"] + 5e4)

    def behind(self) -> list[str]:
        """The cases where fastrnn takes more time or memory than torch.nn."""
        ratios = ((r.ratios["torch.nn"], r) for r in self.results)
        slower = sorted(ratios, key=itemgetter(0))
        lines = [f"- {r}: {emphasised(ratio)}" for ratio, r in slower if ratio < 1]
        larger = [r for r in self.results if r.which == "training" and self.more_memory(r)]
        if larger:
            lines += ["", "Training takes more memory than torch.nn in:", ""]
            lines += [f"- {r}" for r in larger]
        return lines

    def numba(self) -> list[str]:
        """The Numba backend, selected by name, against torch.nn."""

        def ratio(r: Result) -> str:
            measured = NUMBA in r.seconds
            return emphasised(r.seconds["torch.nn"] / r.seconds[NUMBA]) if measured else ""

        variants = [f"- {r}: {ratio(r)}" for r in self.results if r.variant and ratio(r)]
        if not any(NUMBA in r.seconds for r in self.results):
            return []
        return [*self.pivot((*EVEN, *ODD), ratio), "", *variants]

    def floors(self) -> list[str]:
        """Microseconds at T = B = 1, beside calls that compute little or nothing."""
        names = ("fastrnn", "torch.nn", "onnxruntime", "openvino", "jax", "nothing", "nn.Linear")
        lines = [
            f"| cell | pass | (T, B, I, H) | variant | {' | '.join(names)} |",
            "|---|---|---|---|" + "---:|" * len(names),
        ]
        for r in self.results:
            if "nothing" in r.seconds:
                shown = [f"{1e6 * r.seconds[n]:.1f}" if n in r.seconds else "" for n in names]
                lines.append(
                    f"| {r.cell} | {r.which} | {r.shape} | {r.variant} | {' | '.join(shown)} |"
                )
        return lines if len(lines) > 2 else []

    def compiled(self, *names: str) -> list[str]:
        """The time of an eager and a compiled training step, in microseconds."""
        columns = " | ".join(f"{name} | compiled | difference" for name in names)
        lines = [
            f"| cell | (T, B, I, H) | variant | {columns} |",
            "|---|---|---|" + "---:|" * 3 * len(names),
        ]
        for r in self.results:
            if r.compiled.keys() >= set(names):
                columns = " | ".join(
                    f"{1e6 * r.seconds[name]:.0f} | {1e6 * r.seconds[f'{name} compiled']:.0f} "
                    f"| {1e6 * r.compiled[name]:.0f}"
                    for name in names
                )
                lines.append(f"| {r.cell} | {r.shape} | {r.variant} | {columns} |")
        return lines if len(lines) > 2 else []

    def last(self) -> list[str]:
        """A step with the gradient of the last output, beside one with that of every output."""
        names = ("torch.nn", "jax", "fastrnn")
        lines = [
            f"| cell | (T, B, I, H) | {' | '.join(f'{n}, ms' for n in names)} | against torch.nn "
            "| fastrnn, last / all |",
            "|---|---|" + "---:|" * (len(names) + 2),
        ]
        for cell, shape in product(CELLS, LAST):
            last = self.find(cell, "training", shape, "last")
            every = self.find(cell, "training", shape)
            if last and every:
                shown = " | ".join(
                    f"{1e3 * last.seconds[n]:.1f} / {1e3 * every.seconds[n]:.1f}"
                    if n in last.seconds and n in every.seconds
                    else ""
                    for n in names
                )
                share = last.seconds["fastrnn"] / every.seconds["fastrnn"]
                ratio = emphasised(last.ratios["torch.nn"])
                lines.append(f"| {cell} | {shape} | {shown} | {ratio} | {share:.2f} |")
        return lines if len(lines) > 2 else []

    def odd_shapes(self) -> list[str]:
        lines = [
            "| cell | pass | odd shape | even neighbour | share of its throughput |",
            "|---|---|---|---|---:|",
        ]
        for r in self.results:
            if r.neighbour:
                lines.append(
                    f"| {r.cell} | {r.which} | {r.shape} | {ODD[r.shape]} "
                    f"| {percent(r.neighbour)} |"
                )
        return lines if len(lines) > 2 else []

    def faults(self) -> list[str]:
        names = ("torch.nn", "fastrnn without its workspace", "fastrnn")
        lines = [f"| cell | (T, B, I, H) | {' | '.join(names)} |", "|---|---|---:|---:|---:|"]
        for r in self.results:
            if r.memory and r.which == "training" and not r.variant and r.shape in EVEN:
                counts = " | ".join(f"{r.memory['faults'][name]:.0f}" for name in names)
                lines.append(f"| {r.cell} | {r.shape} | {counts} |")
        return lines if len(lines) > 2 else []

    def absent(self) -> list[str]:
        reasons = {}
        for r in self.results:
            for name, why in r.refusals.items():
                reasons.setdefault((name, why), []).append(r)
        return [
            f"- {name}: {why} ({len(rs)} of {len(self.results)} cases)"
            for (name, why), rs in reasons.items()
        ]

    def beside(self, others: dict[str, Report]) -> list[str]:
        """Ratios against torch.nn in this run and under other conditions, for the common cases."""
        for name, other in others.items():
            if other.commit.get("id") != self.commit.get("id"):
                raise ValueError(
                    f"{name}: expected a run of commit {self.commit.get('id')}, "
                    f"got {other.commit.get('id')}; run it again"
                )
        columns = " | ".join(f"{name} | middle half" for name in others)
        lines = [
            *(f"- {CONDITIONS[name]}" for name in others if name in CONDITIONS),
            "",
            f"| cell | pass | (T, B, I, H) | alone | {columns} |",
            "|---|---|---|---:|" + "---:|---|" * len(others),
        ]
        for r in self.results:
            same = [o.by_key[r.key] for o in others.values() if r.key in o.by_key]
            if len(same) == len(others):
                shown = " | ".join(
                    f"{emphasised(o.ratios['torch.nn'])} "
                    f"| {' to '.join(f'{q:.2f}' for q in o.quartiles['torch.nn'])}"
                    for o in same
                )
                lines.append(
                    f"| {r.cell} | {r.which} | {r.shape} "
                    f"| {emphasised(r.ratios['torch.nn'])} | {shown} |"
                )
        return lines

    def markdown(self, others: dict[str, Report]) -> str:
        parts = [
            ("", self.heading()),
            ("Geometric means over the eleven even shapes", self.means()),
            ("All cases", self.table()),
            ("Behind torch.nn", self.behind()),
            ("One step of one sequence, in microseconds", self.floors()),
            (
                "A compiled training step of a layer, in microseconds",
                self.compiled("fastrnn", "nn.Linear"),
            ),
            (
                "A compiled training step of a model, in microseconds",
                self.compiled("model with fastrnn", "model with nn.Linear"),
            ),
            ("Training on the last output", self.last()),
            ("Odd shapes", self.odd_shapes()),
            ("The Numba backend against torch.nn", self.numba()),
            ("Against torch.nn under other conditions", self.beside(others) if others else []),
            ("Page faults of a warm training step", self.faults()),
            ("Cases without a measurement", self.absent()),
        ]
        blocks = [
            "\n".join(["## " + title, "", *lines] if title else lines)
            for title, lines in parts
            if lines
        ]
        return (
            "# Benchmarks\n\nWritten by `make readme`. (T, B, I, H) are time steps, batch size, "
            "input size and hidden size. Training is a forward and a full backward pass. A ratio "
            "is the time of the competitor over that of fastrnn: the median over the rounds of "
            "neighbouring samples. Below 1, in bold, the competitor is faster. MB is the peak "
            "memory above the inputs. All cases share one process, and memory that an allocator "
            "kept from earlier cases affects the results: where a step needs large buffers, the "
            "time of torch.nn differs by up to 1.4 times between runs.\n\n"
            + "\n\n".join(blocks)
            + "\n"
        )

    def pivot(self, shapes: Iterable[Shape], value: Callable[[Result], str]) -> list[str]:
        """A row for each measured shape, a column for each cell and pass."""
        lines = [
            "| (T, B, I, H) | " + " | ".join(f"{c} {w}" for c, w in COLUMNS) + " |",
            "|---|" + "---:|" * len(COLUMNS),
        ]
        for shape in shapes:
            results = [self.find(c, w, shape) for c, w in COLUMNS]
            if any(results):
                shown = " | ".join(value(r) if r else "" for r in results)
                lines.append(f"| {shape} | {shown} |")
        return lines

    def means_against_torch(self) -> dict[tuple[str, str], str]:
        means = {}
        for cell, which in COLUMNS:
            ratios = [r.ratios["torch.nn"] for r in self.grid(cell, which, EVEN)]
            if len(ratios) != len(EVEN):
                raise ValueError(
                    f"expected {len(EVEN)} shapes of {cell} {which} for the README, "
                    f"got {len(ratios)}"
                )
            means[cell, which] = times(geometric_mean(ratios))
        return means

    def summary(self, gpu: dict[str, Any]) -> str:
        """The first table of the README, with the best and the worst case."""
        cells, means = CELLS[::-1], self.means_against_torch()
        training, inference = (" | ".join(means[c, w] for c in cells) for w in PASSES[::-1])
        ranges, lowest = gpu_ranges(gpu)
        results = [r for c, w in COLUMNS for r in self.grid(c, w, EVEN)]
        results.sort(key=lambda r: r.ratios["torch.nn"])
        slower = sum(r.ratios["torch.nn"] < 1 for r in results)
        worst, best = (
            f"{times(r.ratios['torch.nn'])} ({r.cell} {r.which}, {r.shape.T} steps, "
            f"batch {r.shape.B}, {r.shape.H} hidden units)"
            for r in (results[0], results[-1])
        )
        cpu = self.machine.get("cpu", {}).get("brand_raw", self.machine["processor"])
        return "\n".join(
            [
                f"| times as fast | {' | '.join(cells)} |",
                "|---|" + "---:|" * len(cells),
                f"| CPU, float32, training (forward + backward), against torch.nn | {training} |",
                f"| CPU, float32, inference, against torch.nn | {inference} |",
                f"| CPU, float32, training on the last output of {LAST[0].T} to {LAST[-1].T} "
                f"steps, against torch.nn | {' | '.join(map(self.last_mean, cells))} |",
                f"| {gpu['device']}, bfloat16, at most {GPU_HIDDEN} hidden units and batch "
                f"{GPU_BATCH}, against cuDNN | {' | '.join(ranges[c] for c in cells)} |",
                "",
                f"- CPU: {self.settings['threads']} threads of {cpu}, "
                f"{self.settings['torch_isa']}, geometric mean over {len(EVEN)} shapes. "
                f"Best: {best}. Worst: {worst}. "
                f"Of {len(results)} cases {slower} are slower than torch.nn.",
                "- GPU: the only model measured. Lowest and highest ratio of training and "
                f"inference, in GPU time of {GPU_STEPS} steps in a CUDA graph. Wide layers in "
                f"large batches are slower than cuDNN, down to {times(lowest)}; there the "
                "automatic choice is cuDNN.",
            ]
        )

    def last_mean(self, cell: str) -> str:
        found = [self.find(cell, "training", shape, "last") for shape in LAST]
        ratios = [r.ratios["torch.nn"] for r in found if r]
        if len(ratios) != len(LAST):
            raise ValueError(
                f"expected {len(LAST)} shapes of {cell} training on the last output for the "
                f"README, got {len(ratios)}; run make bench again"
            )
        return times(geometric_mean(ratios))

    def shapes(self) -> str:
        """The second table of the README: some shapes, and the means."""
        lines = self.pivot(README_SHAPES, lambda r: times(r.ratios["torch.nn"]))
        means = self.means_against_torch()
        return "\n".join([*lines, f"| mean of {len(EVEN)} | {' | '.join(means.values())} |"])

    # Plots

    def plot_ratios(self) -> plt.Figure:
        """Every shape of the grid, one panel per cell and pass."""
        shapes = [*EVEN, *ODD]
        figure, axes = plt.subplots(2, 3, figsize=(13, 9), sharey=True, sharex=True)
        for column, cell in enumerate(CELLS):
            for row, which in enumerate(PASSES):
                ax = axes[row, column]
                for r in self.grid(cell, which, shapes):
                    y = shapes.index(r.shape)
                    ratios = sorted(r.ratios.items(), key=lambda item: item[0] != "torch.nn")
                    ax.plot([1, max(r.ratios.values())], [y, y], color="0.85", zorder=1)
                    for name, ratio in ratios:
                        ax.scatter(ratio, y, color=COLORS[name], s=28, zorder=2)
                ax.axvline(1, color=COLORS["fastrnn"], lw=1.5)
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
                ax.xaxis.set_minor_formatter(ticker.NullFormatter())
                ax.set_title(f"{cell} {which}")
                ax.set_yticks(range(len(shapes)), [str(s) for s in shapes])
                ax.grid(axis="x", alpha=0.3)
        axes[0, 0].invert_yaxis()
        names = [n for n in COLORS if any(n in r.ratios for r in self.results)]
        handles = [plt.Line2D([], [], marker="o", ls="", color=COLORS[n], label=n) for n in names]
        figure.legend(handles=handles, loc="upper center", ncol=len(names), frameon=False)
        figure.supxlabel("time over fastrnn's time (right of the line: fastrnn is faster)")
        figure.tight_layout(rect=(0, 0, 1, 0.96))
        return figure

    def plot_roofline(self) -> plt.Figure:
        """Rates against flops per byte of W_hh, if it is read once per step."""
        figure, ax = plt.subplots(figsize=(8, 5.5))
        threads = self.settings["threads"]
        results = [r for r in self.results if not r.variant]
        for cell, marker in zip(CELLS, "o^s", strict=True):
            for which, fill in zip(PASSES, ("none", "full"), strict=True):
                points = [
                    (
                        r.flops / (r.recurrent_bytes * r.weight_reads),
                        r.rate / 1e9,
                    )
                    for r in results
                    if (r.cell, r.which) == (cell, which)
                ]
                if points:
                    ax.plot(
                        *zip(*points, strict=True), marker, fillstyle=fill, label=f"{cell} {which}"
                    )
        probe = self.settings["probe"].get(str(threads))
        if probe:
            x = [10 ** (k / 20 - 1) for k in range(70)]
            for size, rate in probe["read"]:
                if size >> 10 in (32, 1024, 4096, 131072):
                    y = [min(i * rate, probe["flops"]) / 1e9 for i in x]
                    ax.plot(x, y, color="0.6", lw=1)
                    at = (x[4], y[4])
                    label = f"{size >> 10} KiB"
                    ax.annotate(
                        label,
                        at,
                        xytext=(0, 3),
                        textcoords="offset points",
                        color="0.4",
                        fontsize=8,
                    )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("flops per byte of W_hh read")
        ax.set_ylabel("GFLOP/s")
        ax.set_title(f"fastrnn under the measured limits of {threads} threads, by size of W_hh")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        figure.tight_layout()
        return figure

    def plot_threads(self) -> plt.Figure | None:
        """Speed of all threads over that of one thread."""
        labels, ours, theirs = [], [], []
        for one in self.results:
            many = self.find(one.cell, one.which, one.shape)
            if one.variant != "1 thread" or not many:
                continue
            labels.append(f"{one.cell} {one.which} {one.shape}")
            for name, values in (("fastrnn", ours), ("torch.nn", theirs)):
                values.append(one.seconds[name] / many.seconds[name])
        if not labels:
            return None
        figure, ax = plt.subplots(figsize=(9, 0.32 * len(labels) + 1.5))
        for shift, (name, values) in enumerate((("fastrnn", ours), ("torch.nn", theirs))):
            places = [k + 0.4 * shift for k in range(len(labels))]
            ax.barh(places, values, height=0.38, color=COLORS[name], label=name)
        ax.set_yticks([k + 0.2 for k in range(len(labels))], labels, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color="0.3", lw=1)
        ax.set_xlabel(f"time of 1 thread over time of {self.settings['threads']}")
        figure.legend(loc="upper right", ncol=2, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        return figure

    def plot_overhead(self) -> plt.Figure | None:
        """Microseconds per call at T = B = 1, where the arithmetic is negligible."""
        results = [r for which in PASSES for c in CELLS for r in self.grid(c, which, EVEN[:1])]
        if not results:
            return None
        names = [n for n in COLORS if any(n in r.seconds for r in results)]
        figure, ax = plt.subplots(figsize=(9, 4.5))
        for name in names:
            places = [i for i, r in enumerate(results) if name in r.seconds]
            values = [1e6 * results[i].seconds[name] for i in places]
            ax.plot(places, values, "o", color=COLORS[name], label=name)
        ax.set_xticks(range(len(results)), [f"{r.cell}\n{r.which}" for r in results])
        ax.grid(axis="y", which="both", alpha=0.3)
        ax.set_yscale("log")
        ax.set_ylabel("µs a call")
        ax.set_title(f"Call overhead at {EVEN[0]}")
        ax.legend()
        figure.tight_layout()
        return figure

    def plots(self) -> dict[str, plt.Figure]:
        figures = {
            "ratios": self.plot_ratios(),
            "roofline": self.plot_roofline(),
            "threads": self.plot_threads(),
            "overhead": self.plot_overhead(),
        }
        return {name: figure for name, figure in figures.items() if figure}


def gpu_ranges(measured: dict[str, Any]) -> tuple[dict[str, str], float]:
    """Lowest and highest ratio to torch by cell within the README's limits, and the lowest of all.

    In bfloat16, training and inference.
    """
    ratios: dict[str, list[float]] = {cell: [] for cell in CELLS}
    lowest = float("inf")
    for row in measured["rows"]:
        if row["dtype"] != "bfloat16":
            continue
        found = [row["torch"][which] / row["fastrnn"][which] for which in PASSES]
        lowest = min(lowest, *found)
        if row["H"] <= GPU_HIDDEN and row["B"] <= GPU_BATCH:
            ratios[row["cell"]] += found
    return {cell: f"{min(rs):.1f}x to {max(rs):.1f}x" for cell, rs in ratios.items()}, lowest


def spread(results: list[Result]) -> float:
    return statistics.median(
        (q[1] - q[0]) / r.ratios["torch.nn"] for r in results if (q := r.quartiles["torch.nn"])
    )


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def emphasised(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def replace_between(text: str, mark: str, new: str) -> str:
    pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)"
    replaced, count = re.subn(pattern, lambda m: m[1] + new + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of {mark} marks, got {count}")
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="results under other conditions"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    report, *others = (
        Report(json.loads(path.read_text())) for path in (args.results, *args.beside)
    )
    text = report.markdown({p.stem: o for p, o in zip(args.beside, others, strict=True)})
    print(text)
    out = ROOT / "docs" / "benchmarks" if args.readme else args.out
    out.mkdir(parents=True, exist_ok=True)
    figures = report.plots()
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(out / f"{name}.{kind}", dpi=110, metadata=metadata)
    pictures = "\n".join(f"![{name}]({name}.png)" for name in figures)
    (out / "README.md").write_text(f"{text}\n## Plots\n\n{pictures}\n")
    if args.readme:
        gpu = json.loads((ROOT / "docs" / "benchmarks" / "h200.json").read_text())
        readme = ROOT / "README.md"
        text = replace_between(readme.read_text(), "speed", report.summary(gpu))
        readme.write_text(replace_between(text, "shapes", report.shapes()))


if __name__ == "__main__":
    main()
