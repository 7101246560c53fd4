"""Fixed seeds, poisoned memory and no more threads than cores, for every test."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.register_assert_rewrite("support")


def pytest_configure() -> None:
    if os.environ.get("FASTRNN_TEST_GPU") == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
    else:
        # The Triton kernels that this process imports run in the interpreter, without a GPU.
        os.environ["TRITON_INTERPRET"] = "1"
    # With both of these torch fills every torch.empty with NaN (integers: their largest value), so
    # an element that was never written fails the test that reads it. The engine's scratch memory is
    # not torch's, and has a switch of its own.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        import fastrnn._cpp
    except ImportError:
        pass  # test_cpp_is_here fails if it may not be missing
    else:
        fastrnn._cpp.poison(True)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


# The files whose tests take longest, which run first.
LONG_FILES = {
    name: order
    for order, name in enumerate(
        ("test_triton", "test_new_cell", "test_examples", "test_operators", "test_runtime")
    )
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip a cell on a backend that refuses it, leave out repetitions, and run long files first.

    Workers take tests from each other, and short ones at the end leave none of them idle.
    """
    from fastrnn.cells import CELLS
    from fastrnn.dispatch import BACKENDS, load_backend

    device = torch.device("cuda" if os.environ.get("FASTRNN_TEST_GPU") == "1" else "cpu")
    named = []
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or parameters.get("backend") not in BACKENDS:
            continue
        named.append(item)
        mode = parameters.get("mode") or getattr(parameters.get("case"), "mode", None)
        backend = load_backend(parameters["backend"])
        if mode in CELLS and backend.missing() is None:
            why = backend.refuses(CELLS[mode], torch.float32, device)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))
    if os.environ.get("FASTRNN_BACKEND"):
        # A test that selects its backend itself is the same as without the variable.
        config.hook.pytest_deselected(items=named)
        items[:] = [item for item in items if item not in set(named)]
    items.sort(key=lambda item: LONG_FILES.get(item.path.stem, len(LONG_FILES)))


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice of a backend, whatever FASTRNN_BACKEND is."""
    from fastrnn import dispatch

    monkeypatch.setattr(dispatch, "_environment", None)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads`` for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
