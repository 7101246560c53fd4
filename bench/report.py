"""Tables and plots of what `make bench` measured.

    python bench/report.py build/bench/results.json [--out build/bench] [--readme]

Prints a Markdown report and writes it with its plots, as PNG and SVG, to the folder of --out.
--readme puts the summary into README.md, and the report and its plots into docs/benchmarks/
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cases import CELLS, EVEN, ODD, PASSES, Shape, geometric_mean

mpl.use("Agg")
import matplotlib.pyplot as plt

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
COLORS = {
    "fastrnn": "#d1495b",
    "torch.nn": "#30638e",
    "onnxruntime": "#66a182",
    "openvino": "#8d6b94",
    "jax": "#edae49",
    "torch.compile": "#9c9c9c",
}


@dataclass(frozen=True)
class Result:
    """One case as test_speed.py measured it; seconds and ratios by contestant."""

    cell: str
    which: str
    shape: Shape
    variant: str
    threads: int
    flops: float
    recurrent_bytes: float
    seconds: dict[str, float]
    ratios: dict[str, float]
    refusals: dict[str, str]
    memory: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, str, Shape, str]:
        return self.cell, self.which, self.shape, self.variant

    @property
    def readings(self) -> int:
        """How often W_hh must be read: once a step, in training once more going back."""
        return self.shape.T * (2 if self.which == "training" else 1)

    @property
    def rate(self) -> float:
        return self.flops / self.seconds["fastrnn"]

    @property
    def best_peer(self) -> tuple[str, float]:
        name = min(self.ratios, key=self.ratios.__getitem__)
        return name, self.ratios[name]


class Report:
    def __init__(self, data: dict[str, Any]) -> None:
        self.machine = data["machine_info"]
        self.ours = self.machine["fastrnn"]
        self.commit = data["commit_info"]
        extra = [b["extra_info"] for b in data["benchmarks"]]
        self.results = [Result(**{**e, "shape": Shape(*e["shape"])}) for e in extra if e]
        self.by_key = {r.key: r for r in self.results}

    def find(self, cell: str, which: str, shape: Shape, variant: str = "") -> Result | None:
        return self.by_key.get((cell, which, shape, variant))

    def grid(self, cell: str, which: str, shapes: Iterable[Shape]) -> list[Result]:
        return [r for s in shapes if (r := self.find(cell, which, s))]

    # What the machine could do

    def peak(self, threads: int) -> float | None:
        probe = self.ours["probe"].get(str(threads))
        return probe["flops"] if probe else None

    def fma_share(self, r: Result) -> float | None:
        peak = self.peak(r.threads)
        return r.rate / peak if peak else None

    def bandwidth_share(self, r: Result) -> float | None:
        """The time that reading W_hh takes once a step, from where it fits, over the time taken."""
        probe = self.ours["probe"].get(str(r.threads))
        if not probe:
            return None
        rate = next(
            (rate for size, rate in probe["read"] if size >= r.recurrent_bytes),
            probe["read"][-1][1],
        )
        return r.readings * r.recurrent_bytes / rate / r.seconds["fastrnn"]

    # Text

    def heading(self) -> list[str]:
        versions = ", ".join(f"{n} {v}" for n, v in self.ours["versions"].items())
        commit = str(self.commit.get("id"))[:10] + (
            " and changes" if self.commit.get("dirty") else ""
        )
        cpu = self.machine.get("cpu", {}).get("brand_raw", self.machine["processor"])
        lines = [
            f"- {self.ours['threads']} threads on {self.ours['cores']} cores of {cpu}, "
            f"torch's instruction set {self.ours['torch_isa']}; {self.ours['engine']}"
            + ("; other processes keep all cores busy" if self.ours["busy"] else ""),
            f"- Python {self.machine['python_version']}, {versions}; commit {commit}",
        ]
        for threads, probe in self.ours["probe"].items():
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
            "| cell | pass | against torch.nn | against the best peer | slowest case against it |",
            "|---|---|---:|---:|---|",
        ]
        for cell in CELLS:
            for which in PASSES:
                grid = self.grid(cell, which, EVEN)
                if not grid:
                    continue
                worst = min(grid, key=lambda r: r.best_peer[1])
                name, ratio = worst.best_peer
                lines.append(
                    f"| {cell} | {which} | {mean(r.ratios['torch.nn'] for r in grid):.2f} "
                    f"| {mean(r.best_peer[1] for r in grid):.2f} "
                    f"| {ratio:.2f} at {worst.shape}, {name} |"
                )
        return lines

    def table(self) -> list[str]:
        lines = [
            "| cell | pass | (T, B, I, H) | | fastrnn ms | torch.nn ms | ratio | best peer | ratio "
            "| GFLOP/s | of FMA peak | of W_hh bandwidth | MB | torch.nn MB |",
            "|---|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        neighbours = set(ODD.values())
        for r in self.results:
            if r.shape in neighbours:
                continue
            name, best = r.best_peer
            megabytes = [
                f"{r.memory['peak'][who] / 1e6:.1f}" if r.memory else ""
                for who in ("fastrnn", "torch.nn")
            ]
            lines.append(
                f"| {r.cell} | {r.which} | {r.shape} | {r.variant} "
                f"| {milliseconds(r.seconds['fastrnn'])} | {milliseconds(r.seconds['torch.nn'])} "
                f"| {emphasised(r.ratios['torch.nn'])} | {name} | {emphasised(best)} "
                f"| {r.rate / 1e9:.1f} | {percent(self.fma_share(r))} "
                f"| {percent(self.bandwidth_share(r))} | {megabytes[0]} | {megabytes[1]} |"
            )
        return lines

    def odd_shapes(self) -> list[str]:
        lines = [
            "| cell | pass | odd shape | even neighbour | share of its throughput |",
            "|---|---|---|---|---:|",
        ]
        for cell in CELLS:
            for which in PASSES:
                for odd, even in ODD.items():
                    a, b = self.find(cell, which, odd), self.find(cell, which, even)
                    if a and b:
                        lines.append(
                            f"| {cell} | {which} | {odd} | {even} | {percent(a.rate / b.rate)} |"
                        )
        return lines

    def faults(self) -> list[str]:
        who = ("torch.nn", "fastrnn without its workspace", "fastrnn")
        lines = [f"| cell | (T, B, I, H) | {' | '.join(who)} |", "|---|---|---:|---:|---:|"]
        for r in self.results:
            if r.memory and r.which == "training" and not r.variant and r.shape in EVEN:
                counts = " | ".join(f"{r.memory['faults'][name]:.0f}" for name in who)
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
        """The ratio against torch.nn here and under other conditions, of the cases in both."""
        names = " | ".join(others)
        lines = [
            f"| cell | pass | (T, B, I, H) | | here | {names} |",
            "|---|---|---|---|---:|" + "---:|" * len(others),
        ]
        for r in self.results:
            ratios = [
                o.by_key[r.key].ratios["torch.nn"] for o in others.values() if r.key in o.by_key
            ]
            if len(ratios) == len(others):
                shown = " | ".join(f"{x:.2f}" for x in ratios)
                lines.append(
                    f"| {r.cell} | {r.which} | {r.shape} | {r.variant} "
                    f"| {r.ratios['torch.nn']:.2f} | {shown} |"
                )
        return lines

    def markdown(self, others: dict[str, Report]) -> str:
        parts = [
            ("", self.heading()),
            ("Geometric means over the eleven even shapes", self.means()),
            ("All cases", self.table()),
            ("Odd shapes", self.odd_shapes()),
            ("Against torch.nn under other conditions", self.beside(others) if others else []),
            ("Page faults of a warm training step", self.faults()),
            ("Peers that have no answer", self.absent()),
        ]
        blocks = [
            "\n".join(["## " + title, "", *lines] if title else lines)
            for title, lines in parts
            if lines
        ]
        return (
            "# Benchmarks\n\nWritten by `make readme`. A ratio is the peer's time over fastrnn's; "
            "below 1, in bold, the peer is faster.\n\n" + "\n\n".join(blocks) + "\n"
        )

    def summary(self) -> str:
        columns = [(cell, which) for cell in CELLS[::-1] for which in PASSES[::-1]]
        lines = [
            "| (T, B, I, H) | " + " | ".join(f"{c} {w}" for c, w in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for shape in README_SHAPES:
            found = [self.find(c, w, shape) for c, w in columns]
            cells = [f"{r.ratios['torch.nn']:.2f}x" if r else "" for r in found]
            lines.append(f"| {shape} | {' | '.join(cells)} |")
        means = [mean(r.ratios["torch.nn"] for r in self.grid(c, w, EVEN)) for c, w in columns]
        lines.append("| mean of eleven | " + " | ".join(f"{m:.2f}x" for m in means) + " |")
        return "\n".join(lines)

    # Plots

    def plot_ratios(self) -> plt.Figure:
        """Every shape of the grid, one panel for each cell and pass."""
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
        """Rates against the flops that each byte of W_hh serves when it is read once a step."""
        figure, ax = plt.subplots(figsize=(8, 5.5))
        threads = self.ours["threads"]
        results = [r for r in self.results if not r.variant]
        for cell, marker in zip(CELLS, "o^s", strict=True):
            for which, fill in zip(PASSES, ("none", "full"), strict=True):
                points = [
                    (
                        r.flops / (r.recurrent_bytes * r.readings),
                        r.rate / 1e9,
                    )
                    for r in results
                    if (r.cell, r.which) == (cell, which)
                ]
                if points:
                    ax.plot(
                        *zip(*points, strict=True), marker, fillstyle=fill, label=f"{cell} {which}"
                    )
        probe = self.ours["probe"].get(str(threads))
        if probe:
            x = [10 ** (k / 20 - 1) for k in range(70)]
            for size, rate in probe["read"]:
                if size >> 10 in (256, 4096, 131072):
                    y = [min(i * rate, probe["flops"]) / 1e9 for i in x]
                    ax.plot(x, y, color="0.6", lw=1)
                    ax.annotate(f"{size >> 10} KiB", (x[4], y[4]), color="0.4", fontsize=8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("flops per byte of W_hh read")
        ax.set_ylabel("GFLOP/s")
        ax.set_title(f"fastrnn under the measured limits of {threads} threads")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        figure.tight_layout()
        return figure

    def plot_threads(self) -> plt.Figure | None:
        """Speed of all threads over that of one."""
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
        ax.set_xlabel(f"time of 1 thread over time of {self.ours['threads']}")
        ax.legend()
        figure.tight_layout()
        return figure

    def plot_overhead(self) -> plt.Figure | None:
        """Microseconds of one call at T = B = 1, where arithmetic is nothing."""
        results = [r for which in PASSES for c in CELLS for r in self.grid(c, which, EVEN[:1])]
        if not results:
            return None
        names = [n for n in COLORS if any(n in r.seconds for r in results)]
        figure, ax = plt.subplots(figsize=(9, 4.5))
        for k, name in enumerate(names):
            places = [i + 0.8 * k / len(names) for i, r in enumerate(results) if name in r.seconds]
            values = [1e6 * r.seconds[name] for r in results if name in r.seconds]
            ax.bar(places, values, width=0.75 / len(names), color=COLORS[name], label=name)
        ax.set_xticks(
            [i + 0.3 for i in range(len(results))], [f"{r.cell}\n{r.which}" for r in results]
        )
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


def mean(values: Iterable[float]) -> float:
    return geometric_mean(list(values))


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
        raise ValueError(f"expected one pair of {mark} marks, found {count}")
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
            figure.savefig(out / f"{name}.{kind}", dpi=110)
    pictures = "\n".join(f"![{name}]({name}.png)" for name in figures)
    (out / "README.md").write_text(f"{text}\n## Plots\n\n{pictures}\n")
    if args.readme:
        readme = ROOT / "README.md"
        readme.write_text(replace_between(readme.read_text(), "benchmarks", report.summary()))


if __name__ == "__main__":
    main()
