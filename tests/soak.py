"""Layers of all kinds and sizes for minutes: `make soak`.

The work of a service in a day: every backend with kernels for a CPU, every cell, layout and size in
random order, several threads at once, children forked and joined, caches emptied. Memory must stay
flat, and no thread may remain.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from support import LAYERS, OPTIONS, Case, data, evaluate, ours, runnable, valid

import fastrnn

MAX_GROWTH = 16 << 20
"""Bytes by which the median of the last third may exceed the first third's: heaps have holes."""

SAMPLES = 90


def resident() -> int:
    """Resident bytes, with all memory that is kept for reuse freed first."""
    fastrnn.empty_cache()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def some_case(pick: random.Random) -> Case:
    """Sizes of all magnitudes, many small and few large."""
    while True:
        values = {name: pick.choice(options) for name, options in OPTIONS.items()}
        values["mode"] = pick.choice(list(LAYERS))
        for name, max_size in (("T", 120), ("B", 40), ("I", 200), ("H", 300)):
            values[name] = max(1, int(max_size ** pick.random()))
        if valid(values):
            return Case(**values)


def run(case: Case, backend: str, dtype: torch.dtype) -> None:
    results = evaluate(ours(case, dtype), case, data(case, dtype), backend)
    assert all(r.isfinite().all() for r in results.values()), case


def in_a_child(case: Case, backend: str) -> None:
    layer, x = LAYERS[case.mode][0](case.I, case.H), torch.randn(case.T, case.B, case.I)

    def work() -> None:
        faulthandler.dump_traceback_later(50, exit=True)
        with torch.no_grad(), fastrnn.use_backend(backend):
            layer(x)

    # A child that is forked while a thread, joined or not, frees its MKL memory can wait for MKL's
    # lock for ever.
    time.sleep(0.05)
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0, (case, backend, child.exitcode)


def in_threads(case: Case, backend: str, dtype: torch.dtype) -> None:
    with ThreadPoolExecutor(3) as team:
        for done in [team.submit(run, case, backend, dtype) for _ in range(3)]:
            done.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.seconds < 30:
        parser.error(f"expected 30 seconds or more, got {args.seconds:g}")
    pick = random.Random(args.seed)
    torch.manual_seed(args.seed)
    memory: list[tuple[float, int]] = []
    count: Counter[str] = Counter()
    started, before = time.monotonic(), 0
    columns = (TextColumn("soaking"), BarColumn(), TextColumn("{task.fields[at]}"))
    # A refreshing thread could hold the console's lock when a child is forked.
    show = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, TimeRemainingColumn(), transient=True, **show) as progress:
        task = progress.add_task("", total=args.seconds, at="")
        while (now := time.monotonic() - started) < args.seconds:
            case, backend = some_case(pick), pick.choice(runnable())
            dtype = pick.choice([torch.float32, torch.float64])
            torch.set_num_threads(pick.choice([1, 2]))
            ways: dict[str, Callable[[], None]] = {
                "alone": lambda c=case, b=backend, d=dtype: run(c, b, d),
                "in threads": lambda c=case, b=backend, d=dtype: in_threads(c, b, d),
                "in a child": lambda c=case, b=backend: in_a_child(c, b),
            }
            way = pick.choices(list(ways), (90, 7, 3))[0]
            ways[way]()
            count[f"{backend}, {way}"] += 1
            if now >= len(memory) * args.seconds / SAMPLES:
                memory.append((now, resident()))
            if not before and now > args.seconds / 10:
                before = threads()
            shown = f"{memory[-1][1] >> 20} MB, {threads()} threads"
            progress.update(task, completed=now, at=shown, refresh=True)
    third = args.seconds / 3
    first, last = (
        statistics.median(m for at, m in memory if start <= at < start + third)
        for start in (args.seconds / 10, args.seconds - third)
    )
    for name, times in sorted(count.items()):
        print(f"{times:8} {name}")
    curve = " ".join(f"{m >> 20}" for _, m in memory[:: max(1, len(memory) // 15)])
    print(f"memory in MB {curve}; median {first / 2**20:.0f}, of the last third {last / 2**20:.0f}")
    print(f"threads {before} and at the end {threads()}")
    grown, left = last - first > MAX_GROWTH, threads() > before
    if grown or left:
        print("memory grew" if grown else "threads were left behind", file=sys.stderr)
    return int(grown or left)


if __name__ == "__main__":
    sys.exit(main())
