"""Options of a run, and what is measured once for all cases: the machine's limits, and memory."""

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
from peers import GPU_PEERS, OURS, PEERS, TORCH, Peer, missing

HERE = Path(__file__).parent
PROBES = pytest.StashKey[dict[int, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastrnn")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1))
    group.addoption("--seconds", type=float, default=2.0, help="to spend on a case, about")
    group.addoption("--peers", help="names, with commas; default: all")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda", "rocm"))
    group.addoption("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    group.addoption("--busy", action="store_true", help="keep all cores busy beside it")
    group.addoption("--probe", help="the program built from probe.cpp")
    group.addoption("--memory", action="store_true", help="measure memory too")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before the cases, of which some take minutes: the probe, and the names of peers."""
    config = session.config
    device, dtype = config.getoption("--device"), config.getoption("--dtype")
    if device != "cpu" and (
        not torch.cuda.is_available() or bool(torch.version.hip) != (device == "rocm")
    ):
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} sees no such device")
    if device == "cpu" and dtype != "float32":
        raise pytest.UsageError(f"--dtype {dtype}: expected a GPU, or float32")
    known = [p.name for p in peers_on(config)]
    if set(names(config)) - set(known) or TORCH.name not in names(config):
        raise pytest.UsageError(
            f"--peers: expected {TORCH.name} and any of {', '.join(known)}, "
            f"got {config.getoption('--peers')}"
        )
    threads = {1, config.getoption("--threads")}
    config.stash[PROBES] = {n: probe(config, n) for n in threads}


def peers_on(config: pytest.Config) -> tuple[Peer, ...]:
    return PEERS if config.getoption("--device") == "cpu" else GPU_PEERS


def names(config: pytest.Config) -> list[str]:
    given = config.getoption("--peers")
    return given.split(",") if given else [p.name for p in peers_on(config)]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    import fastrnn

    versions = {"torch": torch.__version__, "fastrnn": fastrnn.__version__}
    for name in sorted({n for p in peers_on(config) for n in p.needs}):
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
        "probe": {str(n): found for n, found in config.stash[PROBES].items()},
    }


def import_milliseconds() -> float:
    """What ``import fastrnn`` adds to ``import torch``: the median of ten processes."""
    code = (
        "import time, torch; began = time.perf_counter(); import fastrnn; "
        "print(1e3 * (time.perf_counter() - began))"
    )
    command = [sys.executable, "-c", code]
    found = [float(subprocess.check_output(command, text=True)) for _ in range(10)]
    return statistics.median(found)


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
    """Multiply-adds of some threads just now, in flops a second: the machine drifts."""

    def measure(threads: int) -> float | None:
        found = probe(request.config, threads, "flops")
        return found and found["flops"]

    return measure


@pytest.fixture(scope="session", autouse=True)
def load(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --busy, as many spinning processes as there are cores."""
    cores = os.cpu_count() or 1 if request.config.getoption("--busy") else 0
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    yield
    for spinner in spinners:
        spinner.kill()
        spinner.wait()


@pytest.fixture(scope="session")
def memory(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Peak bytes and page faults by case, of a process of its own."""
    wanted = request.config.getoption("--memory") and request.config.getoption("--device") == "cpu"
    if not wanted or not Path("/proc/self/clear_refs").exists():
        return {}
    threads = str(request.config.getoption("--threads"))
    result = subprocess.run(
        [sys.executable, str(HERE / "memory.py"), "--threads", threads],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        # Else glibc keeps more and more, and what a call takes depends on what ran before.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "1048576",
            "MALLOC_TRIM_THRESHOLD_": "1048576",
        },
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def contestants(request: pytest.FixtureRequest) -> list[Peer]:
    return [OURS, *(p for p in peers_on(request.config) if p.name in names(request.config))]


@pytest.fixture(scope="session")
def absent(contestants: list[Peer]) -> dict[str, str]:
    reasons = {p.name: missing(p) for p in contestants}
    if not shutil.which("c++"):
        reasons["torch.compile"] = "no C++ compiler"
    return {name: why for name, why in reasons.items() if why}
