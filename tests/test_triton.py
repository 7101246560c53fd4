"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for an absent GPU.

conftest.py sets TRITON_INTERPRET, which holds for all kernels that a process imports. So kernels
are compiled in other processes.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import (
    OPTIONS,
    TOLERANCE,
    Case,
    assert_equal,
    assert_near,
    assert_near_in_norm,
    cover,
    data,
    errors,
    evaluate,
    ours,
    reference_result,
    valid,
)
from torch import Tensor

import fastrnn
from fastrnn.backends import StackSizes
from fastrnn.cells import CELLS
from fastrnn.dispatch import explain_choice, load_backend

triton = pytest.importorskip("triton", "3.6")
tl = triton.language

from fastrnn.kernels.padding import PaddedSizes  # noqa: E402
from fastrnn.kernels.triton import launch, plans, sequence  # noqa: E402
from fastrnn.kernels.triton.plans import Plans, program, resident, streaming  # noqa: E402

F32, F64 = torch.float32, torch.float64
backend: Any = load_backend("triton")

# Small tiles, so that small layers have several. The interpreter runs one program after another, so
# plans whose programs synchronise are launched step by step. Resident weights stay resident.
SPLIT = {
    "program": Plans(program(4), program(4)),
    "resident": Plans(
        replace(resident(16, 16, 1, 4), sync="launch"),
        replace(resident(32, 16, 2, 4), sync="launch"),
    ),
    "streaming": Plans(streaming(32, 32, 2, 4), streaming(16, 16, 1, 4)),
}
SIZES = {"T": (1, 2, 3), "B": (1, 3, 16, 19), "I": (1, 3, 17), "H": (1, 2, 16, 17, 33)}
# How far every result may be from the reference in float64, in the norm.
MAX_ERROR = {F32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plans], None]:
    def plan(chosen: Plans) -> None:
        monkeypatch.setattr(plans, "find", lambda *_: chosen)

    return plan


def chosen_cases() -> list[tuple[str, torch.dtype, Case]]:
    factors = {
        "plan": tuple(SPLIT),
        "dtype": tuple(MAX_ERROR),
        **OPTIONS,
        **SIZES,
        "mode": plans.MODES,
    }

    def comparable(values: Mapping[str, Any]) -> bool:
        # In 16 bits a gradient of a single number may cancel, and relu's sign may be another.
        hard = values.get("H", 2) == 1 or values.get("mode") == "RNN_RELU"
        return valid(values) and not (hard and values.get("dtype", F32) != F32)

    chosen = cover(factors, comparable)
    return [(values.pop("plan"), values.pop("dtype"), Case(**values)) for values in chosen]


# Numbers


@pytest.mark.parametrize("plan,dtype,case", chosen_cases(), ids=str)
def test_layer(plan: str, dtype: torch.dtype, case: Case, planned: Any) -> None:
    planned(SPLIT[plan])
    actual = evaluate(ours(case, dtype), case, data(case, dtype), "triton")
    expected = reference_result(case, dtype)
    for name, result in actual.items():
        assert result.dtype == dtype, name
    if dtype in TOLERANCE:
        assert_near(actual, expected, dtype)
    assert_near_in_norm(actual, expected, MAX_ERROR[dtype])


@pytest.mark.parametrize("plan", SPLIT)
@pytest.mark.parametrize("mode,projected", [*((m, False) for m in plans.MODES), ("LSTM", True)])
def test_every_cell_by_every_plan(mode: str, projected: bool, plan: str, planned: Any) -> None:
    planned(SPLIT[plan])
    case = Case(mode, directions=2, layout="packed", projected=projected, T=3, H=33)
    actual = evaluate(ours(case, F32), case, data(case, F32), "triton")
    assert_near_in_norm(actual, reference_result(case, F32), MAX_ERROR[F32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", SPLIT)
def test_relu_in_16_bits(plan: str, dtype: torch.dtype, planned: Any) -> None:
    """The state and the weights leave no pre-activation near zero, where its sign could differ."""
    planned(SPLIT[plan])
    case = Case("RNN_RELU", directions=2, layout="packed", T=3, B=5, I=7, H=33)
    d, module = data(case, dtype), ours(case, dtype)
    for name, p in module.named_parameters():
        sign = torch.arange(len(p)).remainder(3).sub(1).sign() + 0.5
        p.data.copy_(sign * 2.0 if "bias_ih" in name else p / 8)
    actual = evaluate(module, case, d, "triton")
    expected = evaluate(module.double(), case, d.to(F64), "reference")
    assert 0.2 < (expected["output"] > 0).double().mean() < 0.8
    assert_near_in_norm(actual, expected, MAX_ERROR[dtype])


@pytest.mark.parametrize("mode", plans.MODES)
def test_step(mode: str, planned: Any) -> None:
    """A cell's module, and a state that is not contiguous."""
    planned(SPLIT["streaming"])
    cell = CELLS[mode]
    name = {"RNN_TANH": "RNNCell", "RNN_RELU": "RNNCell"}.get(mode, f"{mode}Cell")
    module: Any = getattr(fastrnn, name)(
        5, 33, **({"nonlinearity": "relu"} if "RELU" in mode else {})
    )
    x = torch.randn(3, 5)
    state = tuple(torch.randn(33, 3).t() for _ in cell.states)
    hx = state if len(state) > 1 else state[0]
    with torch.no_grad():
        with fastrnn.use_backend("triton"):
            actual = module(x, hx)
        expected = module(x, hx)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_empty_batch(planned: Any) -> None:
    planned(SPLIT["streaming"])
    x = torch.randn(4, 0, 3, requires_grad=True)
    with fastrnn.use_backend("triton"):
        output, h = fastrnn.GRU(3, 5)(x)
    output.sum().backward()
    assert output.shape == (4, 0, 5) and h.shape == (1, 0, 5) and x.grad is not None


def test_backward_is_deterministic(planned: Any) -> None:
    planned(SPLIT["streaming"])
    case = Case("LSTM", directions=2, layout="unsorted", projected=True, T=2, B=17, H=17)
    runs = [evaluate(ours(case, F32), case, data(case, F32), "triton") for _ in range(2)]
    assert_equal(*runs)


def test_activations_near_zero_and_far() -> None:
    """tanh keeps its digits where (1 - e) / (1 + e) would lose them."""
    x = torch.cat([torch.logspace(-7, 1.5, 200), torch.tensor([0.0, 100.0, torch.inf, torch.nan])])
    x = torch.cat([x, -x])
    m = fastrnn.RNNCell(1, len(x), bias=False)
    torch.nn.init.zeros_(m.weight_hh)
    m.weight_ih.data = x[:, None].clone()
    with torch.no_grad(), fastrnn.use_backend("triton"):
        y = m(torch.ones(1, 1))[0]
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("plan", SPLIT)
@pytest.mark.parametrize(
    "mode,projected,H",
    [("RNN_RELU", False, 17), ("LSTM", False, 17), ("LSTM", True, 17), ("LSTM", True, 48)],
)
def test_infinite_numbers_at_odd_sizes(
    plan: str, mode: str, projected: bool, H: int, planned: Any
) -> None:
    """An infinite number times a masked weight adds nothing, forward and backward."""
    planned(SPLIT[plan])
    case = Case(mode, projected=projected, hx=False, T=3, I=3, H=H)
    d, module = data(case, F32), ours(case, F32)
    for p in module.parameters():
        p.data.abs_()
    d.x.abs_()
    for infinite in (d.x, d.cotangents[0]):
        numbers = infinite.clone()
        infinite[1, 0, 0] = torch.inf
        actual, expected = (evaluate(module, case, d, b) for b in ("triton", "reference"))
        infinite.copy_(numbers)
        assert not all(e.isfinite().all() for e in expected.values())
        for name, e in expected.items():
            torch.testing.assert_close(actual[name], e, rtol=1e-4, atol=1e-5, equal_nan=True)


@triton.jit
def _split(order, into, PREACTS: tl.constexpr, LO: tl.constexpr):
    column = tl.arange(0, 8 * PREACTS)
    preact, unit = sequence.preacts_of(column, 8, PREACTS, LO)
    tl.store(order + column, preact * 8 + unit)
    tile = tl.arange(0, 2)[:, None] * 1000 + (preact * 8 + unit)[None, :]
    tiles = sequence.split_preacts(tile, 2, 8, PREACTS, LO)
    at = tl.arange(0, 2)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for k in tl.static_range(PREACTS):
        tl.store(into + k * 16 + at, tiles[k])


@pytest.mark.parametrize("count,lo", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_columns_are_split_into_preacts(count: int, lo: int) -> None:
    order, into = torch.empty(8 * count, dtype=torch.int32), torch.empty(count, 2, 8).int()
    _split[(1,)](order, into, count, lo)
    assert order.sort().values.equal(torch.arange(8 * count).int())
    first = torch.arange(8 * count).view(count, 8)
    assert into.equal(torch.stack([first, first + 1000], 1).int())


# The device-wide barrier, between processes


def _program(one: launch.Launch, x: int, y: int, wait: Any) -> None:
    """One program of a launch, in this process."""
    torch.set_num_threads(1)
    builder = triton.runtime.interpreter.interpreter_builder
    dim, idx = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda *_: dim(*one.grid, 1)
    builder.set_grid_idx = lambda *_: idx(x, y, 0)
    if wait is not None:
        sequence.wait = wait
    one.kernel[(1, 1)](*one.args, **one.constants)


def side_by_side(wait: Any = None) -> Callable[[launch.Launch], None]:
    """Runs a launch as a device would: one process per program, tensors in shared memory."""
    context = get_context("fork")

    def run(one: launch.Launch) -> None:
        assert one.constants["SYNC"] == "grid"
        for argument in one.args:
            if isinstance(argument, Tensor):
                argument.share_memory_()
        team = [
            context.Process(target=_program, args=(one, x, y, wait))
            for x in range(one.grid[0])
            for y in range(one.grid[1])
        ]
        assert len(team) > 1
        for process in team:
            process.start()
        for process in team:
            process.join(100)
        codes = [process.exitcode for process in team]
        for process in team:
            process.kill()
        assert codes == [0] * len(team), codes

    return run


@triton.jit
def _no_wait(counter, goal, SYNC):
    if tl.program_id(0) == 0:
        time.sleep(0.02)


def in_several_programs(
    mode: str, run: Any, monkeypatch: pytest.MonkeyPatch, projected: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of a layer in several programs, and of the reference."""
    case = Case(mode, directions=2, layout="packed", projected=projected, H=33)
    found = Plans(resident(16, 32, 1, 4), resident(16, 16, 2, 4))
    monkeypatch.setattr(plans, "find", lambda *_: found)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(
        backend, "_find", lambda *_: (found, "cuda:90", plans.Target("ieee", 100, False))
    )
    monkeypatch.setattr(launch, "run", run)
    actual = evaluate(ours(case, F32), case, data(case, F32), "triton")
    return actual, reference_result(case, F32)


@pytest.mark.parametrize(
    "mode,projected",
    [("LSTM", True), ("GRU", False), pytest.param("LSTM", False, marks=pytest.mark.heavy)],
)
def test_grid_barrier(mode: str, projected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_near(*in_several_programs(mode, side_by_side(), monkeypatch, projected), F32)


def test_without_the_grid_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the barrier the results are wrong, so the test above can fail."""
    actual, expected = in_several_programs("LSTM", side_by_side(_no_wait), monkeypatch)
    worst = max(v if v == v else torch.inf for v in errors(actual, expected).values())
    assert worst > 1e-3


def test_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than fit at once run one after another, and more programs step by step."""
    case = Case("GRU", directions=2, T=3, B=40, H=33)
    found = Plans(resident(16, 32, 1, 4), resident(16, 16, 2, 4))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for at_once, grids in ((3, {(3, 1)}), (7, {(3, 2)}), (100, {(3, 6)}), (2, {(3, 6)})):
        seen: list[launch.Launch] = []

        def run(one: launch.Launch, seen: list[launch.Launch] = seen) -> None:
            seen.append(one)

        monkeypatch.setattr(
            backend,
            "_find",
            lambda *_, n=at_once: (found, "cuda:90", plans.Target("ieee", n, False)),
        )
        monkeypatch.setattr(launch, "run", run)
        evaluate(ours(case, F32), case, data(case, F32), "triton")
        assert {one.grid for one in seen} == grids
        forward = [one for one in seen if one.kernel is sequence.forward]
        first_group = -3 - len(PaddedSizes._fields)
        groups = [(one.args[first_group], one.grid[1]) for one in forward]
        if at_once == 2:
            assert len(forward) == case.T and {k.constants["SYNC"] for k in seen} == {"launch"}
        else:
            assert [g for first, n in groups for g in range(first, first + n)] == list(range(6))
            assert {k.constants["launch_cooperative_grid"] for k in seen} == {True}


def test_a_kernel_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of triton may make one: the layer then runs step by step, and warns."""
    from triton.runtime.errors import OutOfResources

    def run(one: launch.Launch, run: Any = launch.run) -> None:
        if one.constants["PART"] == "both" and one.constants["SYNC"] != "launch":
            raise OutOfResources(300000, 232448, "shared memory")
        run(one)

    monkeypatch.setattr(launch, "run", run)
    for projected in (False, True):
        case = Case("LSTM", directions=2, layout="packed", projected=projected, H=33)
        with pytest.warns(
            RuntimeWarning, match=r"kernel program\(8\) exceeds this device's resources"
        ):
            actual = evaluate(ours(case, F32), case, data(case, F32), "triton")
        assert_near(actual, reference_result(case, F32), F32)


# Choice


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU for the choice of a backend."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    cached = (backend._architecture, backend._programs_at_once)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


CUDA = torch.device("cuda")
SMALL = StackSizes(layers=1, directions=1, batch=32, input_size=128, hidden_size=256)


def test_choice_on_a_gpu(a_gpu: None) -> None:
    def name(mode: str = "LSTM", dtype: torch.dtype = F32, **sizes: Any) -> tuple[str, str]:
        choice = explain_choice(CELLS[mode], dtype, CUDA, sizes=SMALL._replace(**sizes))
        return choice.backend, choice.rejected.get("triton", "")

    for mode in ("GRU", "LSTM"):
        for dtype in (F32, torch.bfloat16):
            assert name(mode, dtype) == ("triton", "")
    half = torch.float16
    for dtype, sizes, why in (
        (F64, {}, "got torch.float64"),
        (F32, {"hidden_size": 2049}, "expected a hidden_size of at most 2048, got 2049"),
        (F32, {"one_step": True}, "torch is faster at one step"),
        (half, {}, "cuDNN also runs all steps"),
        (half, {"batch": 24, "hidden_size": 1024}, "cuDNN also runs all steps"),
        (F32, {"hidden_size": 128}, "cuDNN also runs all steps"),
        (F32, {"batch": 256, "hidden_size": 1024}, "cost model: "),
    ):
        backend_, reason = name(dtype=dtype, **sizes)
        assert backend_ == "torch" and why in reason
    for sizes in (
        {"layers": 2},
        {"directions": 2},
        {"batch": 40},
        {"batch": 31},
        {"hidden_size": 250},
        {"input_size": 100},
        {"packed": True},
        {"proj_size": 128},
    ):
        assert name(dtype=half, **sizes)[0] == "triton"
    assert name("GRU", half, hidden_size=128)[0] == "triton"
    assert name("RNN_TANH", half, hidden_size=512)[0] == "triton"
    # cuDNN keeps an RNN's smaller matrix in one launch up to twice the size.
    for mode in ("RNN_TANH", "RNN_RELU"):
        assert name(mode)[0] == "torch" and name(mode, hidden_size=257)[0] == "triton"
        assert name(mode, torch.bfloat16) == ("triton", "")
    # A step takes longer with weights of twice the bytes, which it reads every time.
    wide = {"batch": 16, "hidden_size": 2048}
    assert name(dtype=torch.bfloat16, **wide)[0] == "triton"
    assert "cost model" in name(dtype=F32, **wide)[1]
    assert explain_choice(CELLS["LSTM"], half, CUDA, "triton", SMALL).backend == "triton"


def test_choice_on_a_part_of_a_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_programs_at_once", lambda _: 14)
    choice = explain_choice(CELLS["LSTM"], F32, CUDA, sizes=SMALL)
    assert choice.backend == "torch"
    assert "the 16 programs of a layer cannot synchronise" in choice.rejected["triton"]
    small = SMALL._replace(hidden_size=64)
    assert explain_choice(CELLS["LSTM"], torch.bfloat16, CUDA, sizes=small).backend == "triton"


def test_weights_of_a_projection_count() -> None:
    for H, proj_size, as_of in (
        (512, 0, 512),
        (512, 16, 1024),
        (480, 128, 512),
        (2048, 2000, 2048),
    ):
        found = plans.find("cuda:90", "LSTM", "tf32", H, 4, proj_size)
        assert found == plans.find("cuda:90", "LSTM", "tf32", as_of)


def test_choice_on_a_gpu_of_another_kind(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_architecture", lambda _: "cuda:75")
    choice = explain_choice(CELLS["LSTM"], F32, CUDA, sizes=SMALL)
    assert choice.backend == "torch"
    assert choice.rejected["triton"].startswith("there is no plan for cuda:75")
    with pytest.raises(fastrnn.BackendError, match="no plan for cuda:75"):
        explain_choice(CELLS["LSTM"], F32, CUDA, "triton", SMALL)


def test_choice_without_triton(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choice = explain_choice(CELLS["GRU"], F32, CUDA, sizes=SMALL)
    assert choice.backend == "torch"
    assert choice.rejected["triton"] == "triton is not installed"


def test_choice_with_an_old_triton(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed", backend.installed.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr("fastrnn.backends.version", lambda name: "3.2.0")
    choice = explain_choice(CELLS["GRU"], F32, CUDA, sizes=SMALL)
    assert choice.backend == "torch"
    assert choice.rejected["triton"] == "expected triton 3.6 or newer, got 3.2"


def test_final_states_may_be_edited(planned: Any) -> None:
    planned(SPLIT["streaming"])
    with fastrnn.use_backend("triton"):
        _, states = fastrnn.LSTM(3, 5)(torch.randn(4, 2, 3))
    for state in states:
        state.detach_().add_(1)


def test_the_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpp", "numba"):
        monkeypatch.setattr(load_backend(name), "missing", lambda: "left out")
    choice = explain_choice(CELLS["GRU"], torch.bfloat16, torch.device("cpu"))
    assert choice.backend == "torch" and "triton" in choice.rejected


def test_precision_is_that_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plans.precision(F32, hip=True) == "ieee"
    assert plans.precision(torch.bfloat16, hip=False) == "16-bit"
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is None:
        with torch.backends.cudnn.flags(allow_tf32=False):
            assert plans.precision(F32, hip=False) == "ieee"
        with torch.backends.cudnn.flags(allow_tf32=True):
            assert plans.precision(F32, hip=False) == "tf32"
        return
    before = rnn.fp32_precision
    try:
        for setting, products in (("tf32", "tf32"), ("ieee", "ieee")):
            rnn.fp32_precision = setting
            assert plans.precision(F32, hip=False) == products
    finally:
        rnn.fp32_precision = before


def test_every_size_has_a_plan() -> None:
    for architecture in plans.LIMITS:
        for mode in plans.MODES:
            for products in ("16-bit", "ieee") + ("tf32",) * architecture.startswith("cuda"):
                for H in (1, 64, 65, 1000, 2048):
                    assert plans.find(architecture, mode, products, H), (architecture, mode, H)
                assert plans.find(architecture, mode, products, 2049) is None


# Compiled for GPUs


def compiling(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, in which triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *(["-c", textwrap.dedent(code)] if code else []), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


SETUP = """
    import contextlib, io, types
    from dataclasses import replace
    from fastrnn.kernels.triton.__main__ import _table
    from fastrnn.kernels.triton import aot, plans, sequence
    from fastrnn.kernels.triton.aot import Request, measure
    from fastrnn.kernels.triton.plans import program, resident, streaming
    def problems(*request):
        return "; ".join(measure(Request(*request)).problems)
"""


REQUESTED = ("--target", "cuda:90", "--cell", "RNN_TANH", "--products", "16-bit")


def test_aot_prints_the_table() -> None:
    # Whether the budgets hold depends on the version of triton, and is checked by `make aot`.
    # A part of the requests, since `make aot` compiles all.
    code = f"""
    import sys
    from fastrnn.kernels.triton import __main__, aot
    every = aot.requests
    aot.requests = lambda *choice: list(every(*choice))[::4]
    if __name__ == "__main__":
        sys.argv = ["fastrnn.kernels.triton", *{REQUESTED!r}]
        sys.exit(__main__.main())
    """
    run = compiling(code)
    assert "Traceback" not in run.stderr, run.stderr
    assert "does not compile" not in run.stdout
    header, line, *rows = run.stdout.splitlines()
    assert {"registers", "spills", "shared"} <= {c.strip() for c in header.split("|")}
    assert len(rows) >= 4 and all(row.startswith("| cuda:90 | RNN_TANH |") for row in rows)
    assert any("program" in row for row in rows) and any("resident" in row for row in rows)


def test_aot_refuses_an_unknown_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrnn.kernels.triton", "--target", "cuda:1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fastrnn.kernels.triton", run_name="__main__")
    assert end.value.code == 2 and "expected some of cuda:80" in capsys.readouterr().err


def test_options_compile() -> None:
    """The options that change the kernels of a plan. `make aot` checks whether they spill."""
    code = f"""{SETUP}
    for which in aot.PASSES:
        for options in ("packed", "projected", "odd"), ("inference", "float16"):
            for plan in program(8), resident(16, 32, 4, 4), streaming(16, 32, 4, 4).as_stepwise():
                H = 64 if plan.sync == "program" else 128
                asked = Request("cuda:90", "LSTM", "16-bit", H, which, plan, frozenset(options))
                problems = [p for p in measure(asked).problems if "spills" not in p]
                # A projection of few columns leaves some of the warps without work.
                assert not [p for p in problems if "tensor-core" not in p], (asked, problems)
    """
    run = compiling(code)
    assert run.returncode == 0, run.stderr


def test_budgets_can_break() -> None:
    """Every budget, each exceeded once."""
    code = f"""{SETUP}
    print(problems("cuda:90", "LSTM", "16-bit", 2048, "forward", resident(16, 64, 1, 4)))
    print(problems("cuda:80", "LSTM", "16-bit", 2048, "forward", streaming(16, 64, 1, 4)))
    print(problems("cuda:90", "LSTM", "ieee", 64, "forward", program(8)))
    with contextlib.redirect_stdout(io.StringIO()):
        status = _table([Request("cuda:90", "LSTM", "ieee", 64, "forward", program(8))], 1)
    assert status == 1
    request = Request("cuda:90", "GRU", "16-bit", 256, "forward", streaming(16, 64, 1, 4))
    (one, made), = aot.compiled(request)
    def seen(**changed):
        other = one._replace(constants=one.constants | changed)
        print("; ".join(aot._measure(request, other, made).problems))
    seen()
    seen(RESIDENT=True)
    seen(BB=32)
    seen(num_warps=16)
    lines = aot._lines_of
    aot._lines_of = lambda _: (0, 0)
    seen()
    aot._lines_of = lines
    begin = aot._time_loop(made.asm["ttgir"])[0]
    text = made.asm["ttgir"]
    text = text[:begin] + "    scf.for async_copy\\n    }}\\n" + text[begin:]
    made = types.SimpleNamespace(asm=dict(made.asm) | {{"ttgir": text}}, metadata=made.metadata)
    seen(RESIDENT=True)
    """
    run = compiling(code)
    assert run.returncode == 0, run.stderr
    shared, programs, spills, none, inside, count, registers, lost, ahead = run.stdout.splitlines()
    assert "128 programs that wait for each other, on 108 processors" in programs
    assert re.search(r"\d+ bytes of shared memory, of 232448", shared)
    assert re.search(r"spills \d+ bytes", spills)
    assert none == ""
    assert "loads of resident weights inside the loop" in inside
    assert "tensor-core instructions a step, not" in count
    assert re.search(r"\d+ registers, of 65536", registers)
    assert "no load of weights" in lost
    assert "read ahead" in ahead


# The statements that keep the barrier's order, a replacement that does not, and the problem that is
# then found in the compiled code.
ORDER = {
    "release": ('sem="release"', 'sem="relaxed"', "the barrier lacks a release"),
    "acquire": ("acquire", "relaxed", "the barrier lacks an acquire"),
    "before": (
        "        tl.debug_barrier()\n        tl.atomic_add",
        "        tl.atomic_add",
        "the barrier lacks a barrier of the program before it",
    ),
    "after": (
        "seen all arrivals.\n        tl.debug_barrier()",
        "seen all arrivals.",
        "the barrier lacks a barrier of the program after it",
    ),
    "stores": ("if is_hip():", "if False:", "the barrier lacks a wait for stores"),
}


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_missing_order_is_found(target: str, tmp_path: Any) -> None:
    """The interpreter cannot see that memory order is missing; the compiled code shows it."""
    sites = [site for site in ORDER if site != "stores" or target.startswith("hip")]
    source = inspect.getsource(sequence)
    for site in sites:
        here, instead, _ = ORDER[site]
        assert here in source
        (tmp_path / f"without_{site}.py").write_text(source.replace(here, instead))
    code = f"""{SETUP}
    import importlib, sys
    sys.path.insert(0, {str(tmp_path)!r})
    from fastrnn.kernels.triton import launch
    passes = ("forward", resident(16, 32, 1, 4)), ("backward", resident(16, 32, 4, 4))
    for each in passes:
        print(problems({target!r}, "LSTM", "16-bit", 128, *each))
    # Both passes have the same barrier, so one of them is enough for a mutant.
    for k, site in enumerate({sites!r}):
        launch.sequence = aot.sequence = importlib.import_module("without_" + site)
        print(problems({target!r}, "LSTM", "16-bit", 128, *passes[k % 2]))
    """
    run = compiling(code)
    assert run.returncode == 0, run.stderr
    forward, backward, *mutants = run.stdout.splitlines()
    assert forward == backward == ""
    for site, found in zip(sites, mutants, strict=True):
        assert ORDER[site][2] in found, site


def test_a_cells_own_entry_comes_before_its_familys() -> None:
    tanh, relu = (plans.find("cuda:80", mode, "ieee", 128) for mode in ("RNN_TANH", "RNN_RELU"))
    assert tanh.forward == relu.forward and tanh.backward != relu.backward
    assert plans.find("cuda:80", "RNN_RELU", "tf32", 128) == plans.find(
        "cuda:80", "RNN_TANH", "tf32", 128
    )
