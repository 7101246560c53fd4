"""Threads, signals, forks and cores: what the engine must not do to the process it runs in."""

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
from fastrnn.dispatch import load

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
    original = getattr(load(backend), direction)

    def spy(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        try:
            return original(*args, **kwargs)
        finally:
            inside.clear()

    monkeypatch.setattr(load(backend), direction, spy)
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
        time.sleep(0.001)  # lets go of the lock, and must get it back
    worker.join()
    assert seen >= 10


@fast
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_in_several_threads_at_once(
    backend: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    shared = fastrnn.LSTM(30, 40, num_layers=2, bidirectional=True)
    modes = [*MODES, "shared"] * 3

    def work(k: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.set_num_threads(threads)
        mode = modes[k]
        m = shared if mode == "shared" else LAYERS[mode][0](30, 40)
        if mode != "shared":
            with torch.no_grad():
                for p in m.parameters():
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        g = torch.Generator().manual_seed(k)
        x = torch.randn(50, 40, 30, generator=g, requires_grad=True)
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
    if backend == "numba":  # which would not wake a thread for so little
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
torch.set_num_threads({n})
m, x = fastrnn.LSTM(64, 128, bidirectional=True), torch.randn(50, 32, 64)
with torch.no_grad(), fastrnn.use_backend("{backend}"):
    fastrnn.GRU(1, 1)(torch.randn(1, 1, 1))  # what is imported for it may start a thread
before = threads()
for _ in range(3):
    with torch.no_grad(), fastrnn.use_backend("{backend}"):
        m(x)
print(threads() - before)
"""


@fast
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("n", [1, 2])
def test_no_more_threads_are_started_than_torch_may_use(n: int, backend: str) -> None:
    # Numba's kernels have a pool of their own beside that of torch's products.
    most = (n - 1) * (2 if backend == "numba" else 1)
    assert int(run_script(COUNT_THREADS.format(n=n, backend=backend))) <= most


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

    monkeypatch.setattr(launch, "_arguments", lambda fixed, scratch, *share: share)
    for threads, directions, shares in ((1, 2, 2), (2, 1, 2), (3, 2, 2), (4, 2, 4), (4, 1, 4)):
        set_threads(threads)
        calls: list[Any] = []
        sizes = SimpleNamespace(B=8, D=directions)
        launch._run(lambda *a, calls=calls: calls.append(a), sizes, 1 << 40, 5, [], [])
        assert len(calls) == shares
        assert {c[0] for c in calls} == set(range(directions))


@needs_numba
def test_numba_waits_for_its_threads_whatever_comes_between(
    set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write to memory that is freed when the call is left."""
    from fastrnn.kernels.numba import launch

    set_threads(2)
    monkeypatch.setattr(launch, "_arguments", lambda fixed, scratch, *share: share)
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
        launch._run(kernel, SimpleNamespace(B=8, D=1), 1 << 40, 5, [], [])
    assert finished

    def interrupted(others: Any, wait: Any = launch.wait) -> None:
        monkeypatch.setattr(launch, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "wait", interrupted)
    finished.clear()
    with pytest.raises(KeyboardInterrupt):
        launch._run(
            lambda d, begin, *_: begin == 0 and (time.sleep(0.2), finished.append(1)),
            SimpleNamespace(B=8, D=1), 1 << 40, 5, [], [],
        )  # fmt: skip
    assert finished


@needs_numba
def test_numba_runs_where_no_thread_can_be_started(
    set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a thread that outlives the main one."""
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
m = fastrnn.LSTM(256, 256, num_layers=400)
x = torch.randn(100, 16, 256)
with torch.set_grad_enabled({training}), fastrnn.use_backend("{backend}"):
    m(x[:1])
    print("ready", flush=True)
    try:
        {statement}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    else:
        print("finished", flush=True)
"""


@fast
@pytest.mark.parametrize("training", [False, True])
def test_ctrl_c_ends_a_forward_of_many_layers(backend: str, training: bool) -> None:
    code = INTERRUPTED.format(training=training, backend=backend, statement="m(x)")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # into the forward pass, which takes many times as long
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert output == "interrupted\n"
    assert process.returncode == 0


# Forks


FORKED = """
import multiprocessing, torch, fastrnn
torch.set_num_threads(2)
m = fastrnn.{cls}(32, 64, num_layers=2, bidirectional=True)
x = torch.randn(40, 32, 32)
def some():
    with torch.no_grad(), fastrnn.use_backend("{backend}"):
        return m(x)[0][:, 3, 5].tolist()  # no large operator of torch's: those hang in a child
def work(queue):
    {prepare}
    queue.put(some())
expected = some()  # all threads of the pool have run
context = multiprocessing.get_context("fork")
queue = context.Queue()
children = [context.Process(target=work, args=(queue,)) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    for a, b in zip(queue.get(timeout=50), expected, strict=True):
        assert abs(a - b) < 1e-5, (a, b)
assert some() == expected  # and the parent's threads are still there
print("done")
"""


@fast
@pytest.mark.parametrize(
    "prepare", ["pass", "torch.set_num_threads(1)", "torch.set_num_threads(2)"]
)
@pytest.mark.parametrize("cls", ["LSTM", "GRU"])
def test_a_forked_child_runs_layers(backend: str, cls: str, prepare: str) -> None:
    assert run_script(FORKED.format(cls=cls, prepare=prepare, backend=backend)) == "done"


FORKED_AFTER_TORCH = """
import multiprocessing, torch, fastrnn
torch.set_num_threads(2)
m, x = fastrnn.{cls}(32, 64), torch.randn(40, 64, 32)
with torch.no_grad():
    torch.randn(1024, 1024) @ torch.randn(1024, 1024)  # all threads of torch's pool have run
def work(queue):
    with torch.no_grad(), fastrnn.use_backend("{backend}"):
        queue.put(m(x)[0][:, 3, 5].tolist())
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=work, args=(queue,))
child.start()
found = queue.get(timeout=50)
with torch.no_grad():
    for a, b in zip(found, m(x)[0][:, 3, 5].tolist(), strict=True):
        assert abs(a - b) < 1e-5, (a, b)
print("done")
"""


@pytest.mark.parametrize("backend", [*runnable(), "torch"])
@pytest.mark.parametrize("cls", ["LSTM", "GRU"])
def test_a_child_of_a_process_that_used_torch_only(backend: str, cls: str) -> None:
    assert run_script(FORKED_AFTER_TORCH.format(cls=cls, backend=backend)) == "done"


LOADER = """
import torch, fastrnn
from torch.utils.data import DataLoader, Dataset
m = fastrnn.GRU(8, 64)
def some():
    with torch.no_grad(), fastrnn.use_backend("{backend}"):
        return m(torch.ones(50, 32, 8))[0]
expected = some()
class Items(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        return some()
for batch in DataLoader(Items(), num_workers=2, batch_size=None, multiprocessing_context="fork"):
    torch.testing.assert_close(batch, expected)
print("done")
"""


@fast
def test_a_data_loader_runs_layers_in_its_workers(backend: str) -> None:
    assert run_script(LOADER.format(backend=backend)) == "done"


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
        with fastrnn.use_backend("{backend}"):
            output, _ = m(x)
            output.sum().backward()
print("done")
"""


@fast
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
@pytest.mark.parametrize("first", ["", "fastrnn.LSTM(64, 64)(torch.randn(30, 32, 64))"])
def test_two_threads_on_one_core_do_not_hang(backend: str, first: str) -> None:
    assert run_script(PINNED.format(first=first, backend=backend)) == "done"


@pytest.mark.parametrize("deterministic", [True, False])
def test_many_threads_on_few_cores(
    set_threads: Callable[[int], None], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that share the hidden units meet at a barrier in every step."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    m, x = fastrnn.LSTM(16, 700), torch.randn(20, 1, 16)
    with torch.no_grad():
        set_threads(1)
        expected, _ = m(x)
        set_threads(4 * (os.cpu_count() or 1))
        # The first calls wait long for each other; unless they must, later ones share no steps.
        for _ in range(10):
            torch.testing.assert_close(m(x)[0], expected)


# Leftovers


@fast
@pytest.mark.skipif(not os.path.isfile("/proc/self/statm"), reason="needs /proc")
def test_memory_does_not_grow(backend: str) -> None:
    code = f"""
import resource, torch, fastrnn
torch.set_num_threads(2)
m = fastrnn.LSTM(32, 64, num_layers=2)
x = torch.randn(60, 32, 32)
def pages():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def step():
    with fastrnn.use_backend("{backend}"):
        output, _ = m(x)
    output.sum().backward()
    m.zero_grad()
for _ in range(5):
    step()
before = pages()
for _ in range(30):
    step()
print(pages() - before)
"""
    # One step keeps 10 MB for its backward: 30 that were never given back would be 300.
    assert int(run_script(code)) < 50e6


@fast
def test_exceptions_leave_the_engine_usable(backend: str) -> None:
    case = Case("LSTM", directions=2, T=3, B=4)
    d, m = data(case, torch.float32), ours(case, torch.float32)
    expected = evaluate(m, case, d, backend)
    cpp: Any = load(backend)
    for _ in range(50):
        with pytest.raises((RuntimeError, ValueError)):
            cpp.forward(
                case.cell, d.x[0], m._weights()[0], None, torch.tensor([2, 9]), 4, save=True
            )
    assert_equal(evaluate(m, case, d, backend), expected)


def test_empty_cache_gives_memory_back() -> None:
    if load("cpp").missing() is not None:
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
