"""Peak memory and page faults of a warm pass, for torch.nn and fastrnn, as JSON.

    MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 python bench/memory.py

The peak is the kernel's high-water mark of resident memory above that of the inputs, which counts
the buffers of both libraries alike: the median of five calls. Memory that a library keeps between
calls is released first. The variables make the allocator return freed blocks of a mebibyte and more
to the system. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from competitors import Module
from rich.console import Console
from rich.progress import track
from workloads import Case, cases, problem

import fastrnn
from fastrnn.backends import cpp

WARM = 3
PEAKS = 5


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"expected {field} in /proc/self/status, got none")


def peak(run: Any) -> int:
    gc.collect()
    fastrnn.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    high = resident("VmHWM")
    del result
    return max(0, high - before)


def faults(run: Any) -> float:
    for _ in range(WARM):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(WARM):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / WARM


def measure(case: Case, threads: int) -> dict[str, Any]:
    tensors = problem(case)
    measured: dict[str, Any] = {"peak": {}, "faults": {}}
    for name in ("torch.nn", "fastrnn"):
        run = Module(name).prepare(case, tensors, threads)
        run()
        measured["peak"][name] = statistics.median(peak(run) for _ in range(PEAKS))
        measured["faults"][name] = faults(run)
    if case.training:
        cpp._cpp.make_large(sys.maxsize, cpp._large)
        measured["faults"]["fastrnn without its workspace"] = faults(
            lambda: (fastrnn.empty_cache(), run())
        )
        cpp._cpp.make_large(cpp.LARGE, cpp._large)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    measured = {}
    for case in track(cases(), "memory", console=Console(stderr=True)):
        threads = case.threads or args.threads
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(case.deterministic)
        measured[str(case)] = measure(case, threads)
    json.dump(measured, sys.stdout)


if __name__ == "__main__":
    main()
