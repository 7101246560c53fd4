"""Compare this tree with another commit, case by case, and report regressions.

    python bench/compare.py BASE [--match REGEX] [--seconds 1.0]

BASE is checked out and built under build/. Each tree runs in its own process, and the two take
alternate samples. Exits with 1 if a case is slower than BASE by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from competitors import MIN_ROUNDS, OURS, repeats, rest, timed
from rich.console import Console
from rich.progress import track
from workloads import cases, geometric_mean, problem

ROOT = Path(__file__).resolve().parent.parent


def serve(threads: int) -> None:
    """Read the name of a case from each line; print the seconds of a sample as JSON."""
    by_name = {str(c): c for c in cases()}
    import fastrnn

    print(json.dumps(fastrnn.__file__), flush=True)
    name, run, count = "", None, 1
    for line in sys.stdin:
        if line.strip() != name:
            name = line.strip()
            case = by_name[name]
            torch.set_num_threads(case.threads or threads)
            run = OURS.prepare(case, problem(case), threads)
            count = repeats(run)
        rest(run)
        print(json.dumps(timed(run, count)), flush=True)


class Server:
    def __init__(self, tree: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--threads", str(threads), ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tree / "src")},
        )
        imported = Path(self.read())
        if tree not in imported.parents:
            raise RuntimeError(f"expected fastrnn of {tree}, got {imported}")

    def read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("expected an answer, got the end of a benchmark process")
        return json.loads(line)

    def sample(self, case: str) -> float:
        assert self.process.stdin
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(self.read())


def checkout(revision: str) -> Path:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", f"{revision}^{{commit}}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    tree = ROOT / "build" / "compare" / commit
    if not tree.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(tree), commit],
            cwd=ROOT,
            check=True,
        )
    # An editable installation would find the kernels of this tree.
    kernels = tree / "src" / "fastrnn" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(tree / "kernels")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True
    )
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("--match", default="", help="only cases whose name matches")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.threads)
        return 0
    base = Server(checkout(args.base), args.threads)
    here = Server(ROOT, args.threads)
    chosen = [c for c in cases() if re.search(args.match, str(c))]
    ratios: dict[str, float] = {}
    for case in track(map(str, chosen), "timing", len(chosen), console=Console(stderr=True)):
        samples = [(base.sample(case), here.sample(case))]
        until = time.perf_counter() + args.seconds
        while time.perf_counter() < until or len(samples) < MIN_ROUNDS:
            samples.append((base.sample(case), here.sample(case)))
        ratios[case] = statistics.median(a / b for a, b in samples[1:])
    print(f"| case | time of {args.base} over time of this tree |\n|---|---:|")
    for case, ratio in ratios.items():
        slower = ratio < 1 - args.tolerance
        print(f"| {case} | {'**' if slower else ''}{ratio:.2f}{'**' if slower else ''} |")
    print(f"| geometric mean | {geometric_mean(list(ratios.values())):.3f} |")
    return int(min(ratios.values()) < 1 - args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
