"""Threads, signals, forks and cores: limits on the effects of the engine on its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import (
    LAYERS,
    Case,
    assert_equal,
    assert_near,
    data,
    evaluate,
    ours,
    run_script,
    runnable,
)

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.dispatch import load_backend
from fastrnn.layer import Layer, Rows

fast = pytest.mark.parametrize("backend", runnable())
needs_numba = pytest.mark.skipif("numba" not in runnable(), reason="numba is not installed")
MODES = list(LAYERS)


# The interpreter lock


@fast
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_threads_run_during_a_long_call(
    backend: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread counts while another is inside the engine, and nowhere else."""
    inside = threading.Event()
    original = getattr(load_backend(backend), direction)

    def spy(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        try:
            return original(*args, **kwargs)
        finally:
            inside.clear()

    monkeypatch.setattr(load_backend(backend), direction, spy)
    m, x = fastrnn.LSTM(64, 256), torch.randn(600, 16, 64)

    def work() -> None:
        with fastrnn.use_backend(backend):
            output, _ = m(x)
        output.sum().backward()

    worker = threading.Thread(target=work)
    worker.start()
    seen = 0
    while worker.is_alive():
        seen += inside.is_set()
        time.sleep(0.001)  # releases the lock, and must get it back
    worker.join()
    assert seen >= 10


@fast
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_in_several_threads_at_once(
    backend: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    shared = fastrnn.LSTM(30, 40, num_layers=2, bidirectional=True)
    modes = [*MODES, "shared"] * 2

    def work(k: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.set_num_threads(threads)
        mode = modes[k]
        m = shared if mode == "shared" else LAYERS[mode][0](30, 40)
        if mode != "shared":
            with torch.no_grad():
                for p in m.parameters():
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        g = torch.Generator().manual_seed(k)
        x = torch.randn(20, 40, 30, generator=g, requires_grad=True)
        results = []
        for _ in range(3):
            with fastrnn.use_backend(backend):
                output, _ = m(x)
            results.append(torch.autograd.grad(output.square().sum(), [x, *m.parameters()]))
        return [output, *results[0]], [output, *results[-1]]

    expected = [work(k)[0] for k in range(len(modes))]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(len(modes))))
    for e, (first, last) in zip(expected, got, strict=True):
        for a, b, c in zip(e, first, last, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
            assert torch.equal(b, c)


# The number of threads


@fast
@pytest.mark.isa
@pytest.mark.parametrize("mode", CELLS)
def test_set_num_threads_is_obeyed(
    mode: str,
    backend: str,
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "numba":  # too little work for its threads
        from fastrnn.kernels.numba import launch

        monkeypatch.setattr(launch, "WORTH_A_THREAD", 1)
    case = Case(mode, directions=2, layers=2, layout="unsorted", T=12, B=20, I=30, H=70)
    d, m = data(case, torch.float32), ours(case, torch.float32)
    results = []
    for n in (1, 2, 1):
        set_threads(n)
        results.append(evaluate(m, case, d, backend))
        assert torch.get_num_threads() == n
    assert_near(results[1], results[0], torch.float32)
    assert_equal(results[2], results[0])


COUNT_THREADS = """
import os, torch, fastrnn
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
m, x = fastrnn.LSTM(64, 128, bidirectional=True), torch.randn(50, 32, 64)
with torch.no_grad(), fastrnn.use_backend("{backend}"):
    fastrnn.GRU(1, 1)(torch.randn(1, 1, 1))  # the modules that it imports may start a thread
    before = threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        for _ in range(3):
            m(x)
        print(threads() - before)
"""


@fast
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_no_more_threads_are_started_than_torch_may_use(backend: str) -> None:
    one, two = map(int, run_script(COUNT_THREADS.format(backend=backend)).split())
    assert one <= 0
    # Numba's kernels have a pool of their own beside the pool of torch's products.
    assert two <= (2 if backend == "numba" else 1)


KEEP_CORES = """
import os, time, torch, fastrnn
torch.set_num_threads(2)
m, x = fastrnn.LSTM(64, 128), torch.randn(50, 1, 64)
for _ in range(20):
    time.sleep(0.005)  # threads that slept may wake on one core, and then move apart
    with torch.no_grad():
        m(x)
allowed = os.sched_getaffinity(0)
assert all(os.sched_getaffinity(int(task)) == allowed for task in os.listdir("/proc/self/task"))
print("kept")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_threads_keep_the_cores_they_may_run_on() -> None:
    assert run_script(KEEP_CORES) == "kept"


@needs_numba
def test_numba_starts_no_more_kernels_at_once_than_threads(
    set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrnn.kernels.numba import launch

    monkeypatch.setattr(launch, "_share", lambda arguments, scratch, *share: (*share, 0, 0))
    for threads, directions, shares in ((1, 2, 2), (2, 1, 2), (3, 2, 2), (4, 2, 4), (4, 1, 4)):
        set_threads(threads)
        calls: list[Any] = []
        sizes = SimpleNamespace(B=8, D=directions)
        launch._run(lambda *a, calls=calls: calls.append(a), sizes, 1 << 40, 5, "ab", {})
        assert len(calls) == shares
        assert {c[0] for c in calls} == set(range(directions))


@needs_numba
def test_numba_waits_for_its_threads_whatever_comes_between(
    set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads write to memory that is freed at the end of the call."""
    from fastrnn.kernels.numba import launch

    set_threads(2)
    monkeypatch.setattr(launch, "_share", lambda arguments, scratch, *share: (*share, 0, 0))
    begun, finished = threading.Event(), []

    def kernel(d: int, begin: int, *_: Any) -> None:
        if begin == 0:  # the other thread's
            begun.set()
            time.sleep(0.2)
            finished.append(1)
        else:
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch._run(kernel, SimpleNamespace(B=8, D=1), 1 << 40, 5, "a", {})
    assert finished

    def interrupted(others: Any, wait: Any = launch.wait) -> None:
        monkeypatch.setattr(launch, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "wait", interrupted)
    finished.clear()
    with pytest.raises(KeyboardInterrupt):
        launch._run(
            lambda d, begin, *_: begin == 0 and (time.sleep(0.2), finished.append(1)),
            SimpleNamespace(B=8, D=1), 1 << 40, 5, "a", {},
        )  # fmt: skip
    assert finished


@needs_numba
def test_numba_runs_where_no_thread_can_be_started(
    set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a thread that outlives the main thread."""
    from fastrnn.kernels.numba import launch

    set_threads(2)
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(launch, "_pool", (1, ended))
    m, x = fastrnn.GRU(64, 128), torch.randn(100, 32, 64)
    with torch.no_grad():
        expected = m(x)[0]
        with fastrnn.use_backend("numba"):
            torch.testing.assert_close(m(x)[0], expected, rtol=1e-4, atol=1e-5)


# Signals

INTERRUPTED = """
import signal, torch, fastrnn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.set_num_threads(1)
m = fastrnn.LSTM(256, 256, num_layers=60)
x = torch.randn(600, 16, 256)
for training in (False, True):
    with torch.set_grad_enabled(training), fastrnn.use_backend("{backend}"):
        m(x[:1])
        print("ready", flush=True)
        try:
            m(x)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        else:
            print("finished", flush=True)
"""


@fast
def test_ctrl_c_ends_a_forward_of_many_layers(backend: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(backend=backend)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.3)  # into the forward pass, which takes much longer
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
        process.communicate(timeout=60)
    assert process.returncode == 0


# Forks


FORKED = """
import multiprocessing, torch, fastrnn
x = torch.randn(40, 32, 32)
context = multiprocessing.get_context("fork")
queue = context.Queue()
def some(m):
    with torch.no_grad(), fastrnn.use_backend("{backend}"):
        return m(x)[0][:, 3, 5].tolist()  # a large operator of torch hangs in a child
def work(m, threads):
    if threads:
        torch.set_num_threads(threads)
    queue.put(some(m))
for cls in (fastrnn.LSTM, fastrnn.GRU):
    for threads in (None, 1, 2):
        torch.set_num_threads(2)
        m = cls(32, 64, num_layers=2, bidirectional=True)
        expected = some(m)  # all threads of the pool have run
        children = [context.Process(target=work, args=(m, threads)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            for a, b in zip(queue.get(timeout=50), expected, strict=True):
                assert abs(a - b) < 1e-5, (cls, threads, a, b)
        assert some(m) == expected  # and the threads of the parent are still present
print("done")
"""


@fast
def test_a_forked_child_runs_layers(backend: str) -> None:
    assert run_script(FORKED.format(backend=backend)) == "done"


FORKED_AFTER_TORCH = """
import multiprocessing, torch, fastrnn
torch.set_num_threads(2)
layers, x = [fastrnn.LSTM(32, 64), fastrnn.GRU(32, 64)], torch.randn(40, 64, 32)
with torch.no_grad():
    torch.randn(1024, 1024) @ torch.randn(1024, 1024)  # all threads of torch's pool have run
context = multiprocessing.get_context("fork")
queue = context.Queue()
def work(m, backend):
    with torch.no_grad(), fastrnn.use_backend(backend):
        queue.put(m(x)[0][:, 3, 5].tolist())
found = []  # of all children, before a layer runs in this process
for m in layers:
    for backend in {backends}:
        child = context.Process(target=work, args=(m, backend))
        child.start()
        found.append((m, backend, queue.get(timeout=50)))
        child.join(50)
with torch.no_grad():
    for m, backend, numbers in found:
        for a, b in zip(numbers, m(x)[0][:, 3, 5].tolist(), strict=True):
            assert abs(a - b) < 1e-5, (m, backend, a, b)
print("done")
"""


def test_a_child_of_a_process_that_used_torch_only() -> None:
    assert run_script(FORKED_AFTER_TORCH.format(backends=[*runnable(), "torch"])) == "done"


LOADER = """
import torch, fastrnn
from torch.utils.data import DataLoader, Dataset
m = fastrnn.GRU(8, 64)
class Items(Dataset):
    def __init__(self, backend):
        self.backend = backend
    def __len__(self):
        return 4
    def __getitem__(self, k):
        with torch.no_grad(), fastrnn.use_backend(self.backend):
            return m(torch.ones(50, 32, 8))[0]
for backend in {backends}:
    items = Items(backend)
    expected = items[0]
    loader = DataLoader(items, num_workers=2, batch_size=None, multiprocessing_context="fork")
    for batch in loader:
        torch.testing.assert_close(batch, expected)
print("done")
"""


def test_a_data_loader_runs_layers_in_its_workers() -> None:
    assert run_script(LOADER.format(backends=runnable())) == "done"


# Cores

PINNED = """
import os, torch, fastrnn
{first}
os.sched_setaffinity(0, {{sorted(os.sched_getaffinity(0))[0]}})
torch.set_num_threads(2)
for sizes, batch in (((64, 64), 32), ((300, 512), 1), ((16, 1024), 2)):
    for cls in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
        m = cls(*sizes, bidirectional=batch > 1)
        x = torch.randn(30, batch, sizes[0])
        for backend in {backends}:
            with fastrnn.use_backend(backend):
                output, _ = m(x)
                output.sum().backward()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
@pytest.mark.parametrize("first", ["", "fastrnn.LSTM(64, 64)(torch.randn(30, 32, 64))"])
def test_two_threads_on_one_core_do_not_hang(first: str) -> None:
    assert run_script(PINNED.format(first=first, backends=runnable())) == "done"


@pytest.mark.parametrize("deterministic", [True, False])
def test_many_threads_on_few_cores(
    set_threads: Callable[[int], None], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that share the hidden units synchronise at a barrier in every step."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    m, x = fastrnn.LSTM(16, 700), torch.randn(20, 1, 16)
    with torch.no_grad():
        set_threads(1)
        expected, _ = m(x)
        set_threads(4 * (os.cpu_count() or 1))
        # The first calls wait long at their barrier. Later ones share no steps, unless they must.
        for _ in range(10):
            torch.testing.assert_close(m(x)[0], expected)


# Leftovers


MEMORY = """
import resource, torch, fastrnn
torch.set_num_threads(2)
m = fastrnn.LSTM(32, 64, num_layers=2)
x = torch.randn(60, 32, 32)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def steps(n, backend):
    for _ in range(n):
        with fastrnn.use_backend(backend):
            output, _ = m(x)
        output.sum().backward()
        m.zero_grad()
for backend in {backends}:
    steps(5, backend)
    before = resident()
    steps(15, backend)
    print(resident() - before)
"""


@pytest.mark.skipif(not os.path.isfile("/proc/self/statm"), reason="needs /proc")
def test_memory_does_not_grow() -> None:
    # One step keeps 10 MB for its backward pass: 15 steps that kept theirs would keep 150.
    for grown in run_script(MEMORY.format(backends=runnable())).split():
        assert int(grown) < 50e6


@fast
def test_exceptions_leave_the_engine_usable(backend: str) -> None:
    case = Case("LSTM", directions=2, T=3, B=4)
    d, m = data(case, torch.float32), ours(case, torch.float32)
    expected = evaluate(m, case, d, backend)
    layer = Layer(case.cell, Rows(2, 2, 11, torch.tensor([2, 9])), m._weights()[0], None)
    for _ in range(50):
        with pytest.raises((RuntimeError, ValueError)):
            load_backend(backend).forward(layer, d.x[0], save=True)
    assert_equal(evaluate(m, case, d, backend), expected)


def test_empty_cache_gives_memory_back() -> None:
    if load_backend("cpp").missing() is not None:
        pytest.skip("only the C++ backend keeps memory")
    code = """
import torch, fastrnn

def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))

m = fastrnn.LSTM(64, 128)
m(torch.randn(100, 64, 64))[0].sum().backward()
before = resident()
fastrnn.empty_cache()
kept = before - resident()
assert kept > 15_000, f"{kept} kB"  # the saved gates alone take 16 MB
m(torch.randn(100, 64, 64))[0].sum().backward()
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads /proc")
    run_script(code)
