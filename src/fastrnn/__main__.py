"""``python -m fastrnn``: a description of this system, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


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
    """The OpenMP runtimes that are loaded. Two of them share no threads."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return "unknown on this system"
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
    parser = argparse.ArgumentParser(
        "python -m fastrnn",
        description="Print versions, processor, threads and the state of each backend, for a bug "
        "report.",
    )
    parser.add_argument("command", nargs="?", choices=["info"], help="may be left out")
    parser.parse_args()
    return _info()


if __name__ == "__main__":
    sys.exit(main())
