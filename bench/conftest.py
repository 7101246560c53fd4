"""Options of a run, and measurements made once for all cases: machine limits and memory."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from competitors import COMPETITORS, GPU_COMPETITORS, OURS, TORCH, Competitor, missing

HERE = Path(__file__).parent
PROBES = pytest.StashKey[dict[int, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastrnn")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1))
    group.addoption("--seconds", type=float, default=2.0, help="approximate time per case")
    group.addoption("--competitors", help="comma-separated names; default: all")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda", "rocm"))
    group.addoption("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    group.addoption("--busy", action="store_true", help="keep all cores busy with other processes")
    group.addoption("--probe", help="path of the program built from probe.cpp")
    group.addoption("--memory", action="store_true", help="also measure memory")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the options and run the probe before the cases, some of which take minutes."""
    config = session.config
    device, dtype = config.getoption("--device"), config.getoption("--dtype")
    if device != "cpu" and (
        not torch.cuda.is_available() or bool(torch.version.hip) != (device == "rocm")
    ):
        raise pytest.UsageError(
            f"--device {device}: torch {torch.__version__} finds no such device"
        )
    if device == "cpu" and dtype != "float32":
        raise pytest.UsageError(f"--dtype {dtype}: expected float32 on the CPU")
    known = [c.name for c in competitors_on(config)]
    if set(names(config)) - set(known) or TORCH.name not in names(config):
        raise pytest.UsageError(
            f"--competitors: expected {TORCH.name} and any of {', '.join(known)}, "
            f"got {config.getoption('--competitors')}"
        )
    threads = {1, config.getoption("--threads")}
    config.stash[PROBES] = {n: probe(config, n) for n in threads}


def competitors_on(config: pytest.Config) -> tuple[Competitor, ...]:
    return COMPETITORS if config.getoption("--device") == "cpu" else GPU_COMPETITORS


def names(config: pytest.Config) -> list[str]:
    requested = config.getoption("--competitors")
    return requested.split(",") if requested else [c.name for c in competitors_on(config)]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    import fastrnn

    versions = {"torch": torch.__version__, "fastrnn": fastrnn.__version__}
    for name in sorted({n for c in competitors_on(config) for n in c.needs}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    torch.set_num_threads(config.getoption("--threads"))
    machine_info["fastrnn"] = {
        "versions": versions,
        "device": device_name(config),
        "dtype": config.getoption("--dtype"),
        "threads": config.getoption("--threads"),
        "cores": len(os.sched_getaffinity(0)),
        "busy": config.getoption("--busy"),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "engine": engine(config),
        "seconds": config.getoption("--seconds"),
        "import": import_milliseconds() if device_name(config) == "cpu" else None,
        "probe": {str(n): result for n, result in config.stash[PROBES].items()},
    }


def import_milliseconds() -> float:
    """The time that ``import fastrnn`` adds to ``import torch``: the median of ten processes."""
    code = (
        "import time, torch; began = time.perf_counter(); import fastrnn; "
        "print(1e3 * (time.perf_counter() - began))"
    )
    command = [sys.executable, "-c", code]
    measured = [float(subprocess.check_output(command, text=True)) for _ in range(10)]
    return statistics.median(measured)


def engine(config: pytest.Config) -> str:
    import fastrnn

    place = "cpu" if config.getoption("--device") == "cpu" else "cuda"
    like = torch.zeros(1, 1, 64, device=place, dtype=getattr(torch, config.getoption("--dtype")))
    return str(fastrnn.explain(fastrnn.LSTM(64, 64).to(like), like))


def device_name(config: pytest.Config) -> str:
    on_cpu = config.getoption("--device") == "cpu"
    return "cpu" if on_cpu else torch.cuda.get_device_name()


def probe(config: pytest.Config, threads: int, *which: str) -> Any:
    program = config.getoption("--probe")
    if not program:
        return None
    command = [program, str(threads), *which]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def peak(request: pytest.FixtureRequest) -> Callable[[int], float | None]:
    """Measures the current flops per second of a number of threads; it drifts."""

    def measure(threads: int) -> float | None:
        measured = probe(request.config, threads, "flops")
        return measured and measured["flops"]

    return measure


@pytest.fixture(scope="session", autouse=True)
def load(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --busy, one spinning process per core."""
    cores = os.cpu_count() or 1 if request.config.getoption("--busy") else 0
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    yield
    for spinner in spinners:
        spinner.kill()
        spinner.wait()


@pytest.fixture(scope="session")
def memory(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Peak bytes and page faults by case, measured in a separate process."""
    enabled = request.config.getoption("--memory") and request.config.getoption("--device") == "cpu"
    if not enabled or not Path("/proc/self/clear_refs").exists():
        return {}
    threads = str(request.config.getoption("--threads"))
    result = subprocess.run(
        [sys.executable, str(HERE / "memory.py"), "--threads", threads],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        # Without these glibc keeps freed memory, and a result depends on the cases before it.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "1048576",
            "MALLOC_TRIM_THRESHOLD_": "1048576",
        },
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def competitors(request: pytest.FixtureRequest) -> list[Competitor]:
    selected = names(request.config)
    return [OURS, *(c for c in competitors_on(request.config) if c.name in selected)]


@pytest.fixture(scope="session")
def absent(competitors: list[Competitor]) -> dict[str, str]:
    reasons = {c.name: missing(c) for c in competitors}
    if not shutil.which("c++"):
        reasons["torch.compile"] = "no C++ compiler"
    return {name: why for name, why in reasons.items() if why}
