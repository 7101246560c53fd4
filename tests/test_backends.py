"""Every backend against the reference in float64, and the other guarantees of each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partialmethod
from typing import Any

import pytest
import torch
from support import (
    CASES,
    GRID_SIZES,
    LAYERS,
    STEPS,
    Case,
    Results,
    assert_as_accurate,
    assert_equal,
    assert_matches_reference,
    assert_near,
    call,
    data,
    errors,
    evaluate,
    grid,
    naming,
    needs_extension,
    ours,
    output_names,
    reference_result,
    runnable,
    shaped,
    theirs,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.dispatch import load_backend
from fastrnn.layer import Layer, rows_of

pytestmark = pytest.mark.isa

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, F64]
fast = pytest.mark.parametrize("backend", runnable())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize("mode", CELLS)


@needs_extension
def test_cpp_is_here() -> None:
    """Without it most tests below would be left out unnoticed."""
    assert load_backend("cpp").missing() is None


@needs_extension
def test_every_cell_runs_on_cpp() -> None:
    for mode in LAYERS:
        for dtype in DTYPES:
            assert load_backend("cpp").refuses(CELLS[mode], dtype, torch.device("cpu")) is None


def test_uninitialised_memory_is_poisoned() -> None:
    for t in (torch.empty(9), torch.empty(0).resize_(9), torch.ones(9).new_empty(3, 3)):
        assert t.isnan().all()
    cpp: Any = load_backend("cpp")
    if cpp.missing() is None:
        for _ in range(2):  # the second time in memory that the first gave back
            scratch = torch.frombuffer(cpp._cpp.Scratch(4000), dtype=F32)
            assert scratch.isnan().all()
            scratch.zero_()
            del scratch


# Numbers


@fast
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case: Case, backend: str, dtype: torch.dtype) -> None:
    assert_matches_reference(case, backend, dtype)


# Too few rows for the C++ engine to pack weights, unless it is deterministic as in other tests.
FEW_ROWS = [case for case in CASES if case.T * case.B < 16]


@needs_extension
@dtypes
@pytest.mark.parametrize("case", FEW_ROWS, ids=str)
def test_few_rows(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert_matches_reference(case, "cpp", dtype)


@needs_extension
@dtypes
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "mode,directions,projected",
    [
        (mode, directions, projected)
        for mode, cell in CELLS.items()
        for directions, projected in ((1, False), (2, False), (2, True))
        if cell.projectable or not projected
    ],
)
@pytest.mark.parametrize("I,H", [(3, 17), (64, 64), (300, 130)])
def test_a_row_is_the_same_in_any_batch(
    mode: str,
    I: int,
    H: int,
    directions: int,
    projected: bool,
    deterministic: bool,
    dtype: torch.dtype,
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with any number of threads, for 16 rows or more or if deterministic."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    T, max_B = (2, 40) if deterministic else (16, 40)
    case = Case(mode, directions=directions, projected=projected, T=T, B=max_B, I=I, H=H)
    d, m = data(case, dtype), ours(case, dtype)

    def results(first: int, last: int, threads: int) -> Results:
        set_threads(threads)
        part = replace(
            d,
            x=d.x[:, first:last],
            hx=tuple(s[:, first:last] for s in d.hx or ()),
            cotangents=tuple(c[:, first:last] for c in d.cotangents),
        )
        return evaluate(m, replace(case, B=last - first), part, "cpp")

    def rows(found: Results, first: int, last: int) -> Results:
        return {n: t[:, first:last] for n, t in found.items() if n not in parameters}

    parameters = {f"grad of {n}" for n, _ in m.named_parameters()}
    whole = results(0, max_B, 1)
    for B in (1, 2, 3, 5, 8, 13, 19, 39):
        for first, threads in ((0, 1), (max_B - B, 2), ((max_B - B) // 2, 3)):
            few = results(first, first + B, threads)
            assert_equal(rows(few, 0, B), rows(whole, first, first + B))


@needs_extension
@dtypes
@modes
@pytest.mark.parametrize(
    "deterministic,lengths",
    [(True, [20, 3, 1, 17, 20, 8, 2, 11, 5]), (False, [40, 16, 39, 40, 17, 23, 30])],
)
def test_a_sequence_is_the_same_in_any_packed_batch(
    mode: str,
    deterministic: bool,
    lengths: list[int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    T, B = max(lengths), len(lengths)
    m = ours(
        Case(mode, directions=2, layers=2, layout="unsorted", hx=False, T=T, B=B, I=7, H=33), dtype
    )
    x, w = torch.randn(T, B, 7, dtype=dtype), torch.randn(T, B, 66, dtype=dtype)
    x.requires_grad_()

    def results(y: Tensor, final: Any, w: Tensor) -> tuple[list[Tensor], Tensor]:
        states = tree_leaves(final)
        loss = (y * w).sum() + sum(s.square().sum() for s in states)
        return states, torch.autograd.grad(loss, x)[0]

    with fastrnn.use_backend("cpp"):
        output, final = m(x, lengths=lengths)
        states, dx = results(output, final, w)
        for k, n in enumerate(lengths):
            alone, state = m(x[:n, k])
            some, dx_alone = results(alone, state, w[:n, k])
            assert torch.equal(output[:n, k], alone) and not output[n:, k].any()
            assert torch.equal(dx[:, k], dx_alone[:, k])
            for a, b in zip(states, some, strict=True):
                assert torch.equal(a[:, k], b)


@dtypes
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_stack(case: Case, dtype: torch.dtype) -> None:
    """torch's operator, which takes all layers at once."""
    assert_matches_reference(case, "torch", dtype)


@pytest.mark.heavy
@fast
@dtypes
@modes
@pytest.mark.parametrize("sizes", GRID_SIZES, ids=str)
def test_layer_grid(
    mode: str, sizes: tuple[int, int, int, int], backend: str, dtype: torch.dtype
) -> None:
    for case in grid(mode, sizes):
        with naming(case):
            assert_matches_reference(case, backend, dtype)


@fast
@dtypes
@modes
@pytest.mark.parametrize("T", [40, 300])
def test_a_long_sequence(mode: str, T: int, backend: str, dtype: torch.dtype) -> None:
    assert_matches_reference(
        Case(mode, directions=2, layout="unsorted", T=T, B=6, H=19), backend, dtype
    )


@fast
@dtypes
@modes
def test_a_wide_layer(mode: str, backend: str, dtype: torch.dtype) -> None:
    """Weights that outgrow a core's cache, a batch of many tiles."""
    assert_matches_reference(Case(mode, T=3, B=41, I=70, H=330), backend, dtype)


ACCURACY_SIZES = [
    {"T": 1, "B": 8, "I": 64, "H": 64},
    {"T": 20, "B": 13, "I": 64, "H": 130},
    {"T": 100, "B": 16, "I": 64, "H": 128},
    pytest.param({"T": 500, "B": 32, "I": 16, "H": 16}, marks=pytest.mark.heavy),
    pytest.param({"T": 10, "B": 32, "I": 256, "H": 512}, marks=pytest.mark.heavy),
]


# Which of two errors is smaller in one call is chance, so tests compare the mean of several calls.
SEEDS = range(4)


@lru_cache(maxsize=64)
def errors_of_torch(case: Case, dtype: torch.dtype) -> list[dict[str, float]]:
    """The errors of torch.nn, or of the reference for a cell that torch.nn lacks."""
    make = theirs if case.mode in LAYERS else ours
    return [
        errors(
            evaluate(make(case, dtype, seed), case, data(case, dtype, seed + 1), "reference"),
            reference_result(case, dtype, seed),
        )
        for seed in SEEDS
    ]


def assert_as_accurate_as_torch(case: Case, backend: str, dtype: torch.dtype) -> None:
    actual = [
        errors(
            evaluate(ours(case, dtype, seed), case, data(case, dtype, seed + 1), backend),
            reference_result(case, dtype, seed),
        )
        for seed in SEEDS
    ]
    assert_as_accurate(actual, errors_of_torch(case, dtype))


@fast
@modes
@pytest.mark.parametrize("sizes", ACCURACY_SIZES, ids=str)
def test_float32_is_as_accurate_as_torch(mode: str, sizes: dict[str, int], backend: str) -> None:
    assert_as_accurate_as_torch(Case(mode, **sizes), backend, F32)


half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@fast
@half_dtypes
@modes
@pytest.mark.parametrize("layout", ["dense", "unsorted"])
def test_16_bits_are_as_accurate_as_torch(
    mode: str, dtype: torch.dtype, layout: str, backend: str
) -> None:
    case = Case(mode, directions=2, layers=2, layout=layout, T=20, B=5, I=16, H=33)
    assert_as_accurate_as_torch(case, backend, dtype)


@fast
@half_dtypes
@pytest.mark.parametrize("mode", LAYERS)
def test_autocast(mode: str, dtype: torch.dtype, backend: str) -> None:
    """Layers and cells run in autocast's dtype, whatever their input's; float64 stays."""
    for make, shape in ((LAYERS[mode][0], (5, 2, 3)), (STEPS[mode][0], (2, 3))):
        torch.manual_seed(0)
        m, x = make(3, 4), torch.randn(shape)
        low = copy.deepcopy(m).to(dtype)
        with fastrnn.use_backend(backend):
            expected = tree_leaves(low(x.to(dtype)))
            with torch.autocast("cpu", dtype):
                for given in (x, x.to(dtype)):
                    actual = tree_leaves(m(given))
                    for a, e in zip(actual, expected, strict=True):
                        assert a.dtype is dtype and torch.equal(a, e)
                    actual[0].sum().backward()
                with torch.autocast("cpu", enabled=False):
                    assert tree_leaves(m(x))[0].dtype is F32
                assert tree_leaves(copy.deepcopy(m).double()(x.double()))[0].dtype is F64
            expected[0].sum().backward()
            with torch.autocast("cpu", dtype):
                for wrong in (x.cfloat(), x.int(), x > 0):
                    with pytest.raises((RuntimeError, ValueError), match="dtype"):
                        m(wrong)
                    state = torch.zeros(1, 2, 4) if x.dim() == 3 else torch.zeros(2, 4)
                    states = (state.to(wrong.dtype),) * len(CELLS[mode].states)
                    with pytest.raises((RuntimeError, ValueError), match="dtype"):
                        m(x, states if len(states) > 1 else states[0])
        for p, q in zip(m.parameters(), low.parameters(), strict=True):
            assert p.grad.dtype is F32
            torch.testing.assert_close(p.grad, 2 * q.grad.float(), rtol=2e-2, atol=1e-3)


@fast
@pytest.mark.parametrize(
    "mode", [m if m == "LSTM" else pytest.param(m, marks=pytest.mark.heavy) for m in CELLS]
)
def test_5000_steps(mode: str, backend: str) -> None:
    case = Case(mode, directions=2, T=5000, B=2, I=3, H=5)
    actual = evaluate(ours(case, F64), case, data(case, F64), backend)
    for name, e in reference_result(case, F64).items():  # sums over 5000 steps
        torch.testing.assert_close(actual[name], e, rtol=1e-9, atol=1e-10 * e.abs().max().item())


# The same call under other conditions


@fast
@dtypes
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_no_grad_changes_no_bit(case: Case, backend: str, dtype: torch.dtype) -> None:
    d = data(case, dtype)
    m = ours(case, dtype)
    with_grad = evaluate(m, case, d, backend)
    hx = d.hx
    if case.layout == "unbatched" and hx is not None:
        hx = tuple(s.squeeze(1) for s in hx)
    with fastrnn.use_backend(backend), torch.no_grad():
        outputs = call(m, case, shaped(case, d.x), d.lengths, hx)
    names = output_names(case.cell)
    without = dict(zip(names, outputs, strict=True))
    assert_equal(without, {n: with_grad[n] for n in names})


THREADED_SIZES = [
    {"T": 6, "B": 13, "I": 7, "H": 20},
    {"T": 3, "B": 1, "I": 300, "H": 300},
    {"T": 9, "B": 2, "I": 4, "H": 600},
    {"T": 30, "B": 5, "I": 301, "H": 303},
    {"T": 20, "B": 1, "I": 600, "H": 20},
]


@fast
@modes
@pytest.mark.parametrize(
    "directions,layout",
    [
        (1, "dense"),
        (2, "unsorted"),
        pytest.param(2, "dense", marks=pytest.mark.heavy),
        pytest.param(1, "unsorted", marks=pytest.mark.heavy),
    ],
)
@pytest.mark.parametrize("sizes", THREADED_SIZES, ids=str)
def test_threads(
    mode: str,
    directions: int,
    layout: str,
    sizes: dict[str, int],
    backend: str,
    set_threads: Callable[[int], None],
) -> None:
    """Threads share the rows or, where there are few rows, the hidden units."""
    case = Case(mode, directions=directions, layout=layout, **sizes)
    d, m = data(case, F32), ours(case, F32)
    for n in (1, 2, 8):
        set_threads(n)
        actual = evaluate(m, case, d, backend)
        assert_near(actual, reference_result(case, F32), F32)
        if n > 1:  # and no race
            assert_equal(evaluate(m, case, d, backend), actual)


HIDDEN_SIZES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33)


@fast
@dtypes
@modes
def test_every_hidden_size_and_batch(mode: str, backend: str, dtype: torch.dtype) -> None:
    """All remainders of every tile, in both directions.

    The C++ engine in float32 runs every pair of sizes. Its other dtype and the other backends run
    each size in three pairs or more.
    """
    every_pair = backend == "cpp" and dtype == F32
    for k, H in enumerate(HIDDEN_SIZES):
        for B in range(1, 14):
            if every_pair or (k + B) % 4 == 0:
                layout = "packed" if (B + H) % 2 else "dense"
                case = Case(mode, directions=2, layout=layout, T=2, B=B, I=2, H=H)
                with naming(case):
                    assert_matches_reference(case, backend, dtype)


@needs_extension
@dtypes
@modes
def test_few_rows_of_every_hidden_size(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All remainders of the dot products that replace the tiles, see ``FEW_ROWS``."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    for k, H in enumerate(HIDDEN_SIZES):
        for B in range(1, 8):
            if dtype == F32 or (k + B) % 4 == 0:
                layout = "packed" if (B + H) % 2 else "dense"
                case = Case(mode, directions=2, layout=layout, T=2, B=B, I=2, H=H)
                with naming(case):
                    assert_matches_reference(case, "cpp", dtype)


@fast
@modes
def test_a_view_gives_what_its_copy_gives(mode: str, backend: str) -> None:
    """Strides, offsets and addresses that no vector is aligned to."""
    case = Case(mode, directions=2, B=5, I=7, H=18)
    d = data(case, F32)
    m = ours(case, F32)
    expected = evaluate(m, case, d, backend)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    for p in m.parameters():
        p.data = shifted(p.data)
    d.x.data, d.hx[0].data = shifted(d.x), shifted(d.hx[0])
    assert_equal(evaluate(m, case, d, backend), expected)


# Infinities, NaN, subnormals


def outputs(m: torch.nn.Module, x: Tensor, backend: str) -> Results:
    with fastrnn.use_backend(backend), torch.no_grad():
        y, final = m(x)
    final = (final,) if isinstance(final, Tensor) else final
    return dict(zip(("output", "h_n", "c_n"), (y, *final), strict=False))


@fast
@dtypes
@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("value", [1e4, -1e4, 3e38, float("inf"), -float("inf"), 1e-40, -1e-45])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_extreme_inputs(
    mode: str, value: float, bidirectional: bool, backend: str, dtype: torch.dtype
) -> None:
    mine, torchs = (make(5, 20, bidirectional=bidirectional, dtype=dtype) for make in LAYERS[mode])
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(3, 13, 5, dtype=dtype)
    x[1, 4, 2] = value
    x[0, 9] = 0
    x[0, 9, 0] = value
    expected = outputs(torchs, x, backend)
    for name, result in outputs(mine, x, backend).items():
        torch.testing.assert_close(
            result, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )


@fast
@dtypes
@modes
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_an_infinite_number(mode: str, where: str, backend: str, dtype: torch.dtype) -> None:
    """With weights that are not negative it stays infinite, and is never multiplied by zero.

    A kernel that pads a row to whole vectors would do that with its own zeros.
    """
    case = Case(mode, hx=False, T=5, H=20)
    d, m = data(case, dtype), ours(case, dtype)
    for p in m.parameters():
        p.data.abs_()
    d.x.abs_()
    (d.x if where == "input" else d.cotangents[0])[1, 0, 0] = torch.inf
    actual, expected = (evaluate(m, case, d, b) for b in (backend, "reference"))
    for name, e in expected.items():
        assert torch.equal(actual[name].isnan(), e.isnan()), name
        assert torch.equal(actual[name].isinf(), e.isinf()), name


@fast
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_tensors_of_another_default_device(layout: str, backend: str) -> None:
    case = Case("LSTM", directions=2, layout=layout)
    d, m = data(case, F32), ours(case, F32)
    expected = evaluate(m, case, d, backend)
    with torch.device("meta"):
        actual = evaluate(m, case, d, backend)
    assert_equal(actual, expected)


@pytest.mark.skipif("numba" not in runnable(), reason="numba is not installed")
@modes
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("T,B,H", [(1, 1, 16), (1, 3, 17), (5, 1, 33), (5, 3, 16)])
def test_numba_writes_within_its_tensors(
    mode: str, layout: str, T: int, B: int, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels get addresses only, so each tensor made for them stands between guards."""
    if load_backend("numba").refuses(CELLS[mode], F32, torch.device("cpu")):
        pytest.skip("there is no kernel for the cell")
    guarded: list[Tensor] = []

    def make(like: Tensor, *shape: int, value: float, **kwargs: Any) -> Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(shape)
        whole = torch.full((count + 128,), 7.0, dtype=like.dtype)
        whole[64 : 64 + count] = value
        guarded.append(whole)
        return whole[64 : 64 + count].view(shape)

    case = Case(
        mode,
        layers=2,
        layout=layout,
        projected=CELLS[mode].projectable and H % 2 > 0,
        T=T,
        B=B,
        H=H,
    )
    d, m = data(case, F32), ours(case, F32)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", partialmethod(make, value=math.nan))
        patch.setattr(Tensor, "new_zeros", partialmethod(make, value=0.0))
        actual = evaluate(m, case, d, "numba")
        with torch.no_grad(), fastrnn.use_backend("numba"):
            call(m, case, shaped(case, d.x), d.lengths, d.hx)
    assert len(guarded) > 4
    for whole in guarded:
        assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()
    assert_near(actual, reference_result(case, F32), F32)


@fast
@dtypes
@modes
def test_nan_stays_in_its_row(mode: str, backend: str, dtype: torch.dtype) -> None:
    case = Case(mode, directions=2, layers=2, T=3, B=13, H=20)
    d = data(case, dtype)
    m = ours(case, dtype)
    clean = evaluate(m, case, d, backend)
    for row in (0, 7, 12):
        poisoned = data(case, dtype)
        poisoned.x[1, row, 3] = float("nan")
        results = evaluate(m, case, poisoned, backend)
        others = [b for b in range(13) if b != row]
        for name in (*output_names(case.cell), "grad of input"):
            assert torch.equal(results[name][:, others], clean[name][:, others]), name
        assert results["output"][1, row].isnan().all()
        for name in output_names(case.cell):
            assert results[name][:, row].isnan().any(), name
        assert results["grad of weight_hh_l1"].isnan().any()


@fast
@dtypes
@modes
def test_nan_in_a_weight_is_seen(mode: str, backend: str, dtype: torch.dtype) -> None:
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        case = Case(mode, T=2, I=4, H=17)
        m = ours(case, dtype)
        with torch.no_grad():
            m.get_parameter(name).view(-1)[-1] = float("nan")
        expected = outputs(m, data(case, dtype).x, "reference")
        for key, result in outputs(m, data(case, dtype).x, backend).items():
            assert torch.equal(result.isnan(), expected[key].isnan()), (name, key)
            assert result.isnan().any()


@fast
@dtypes
@pytest.mark.parametrize("mode", LAYERS)
def test_activations_over_the_whole_range(mode: str, backend: str, dtype: torch.dtype) -> None:
    """One unit and no recurrence: the cell's functions themselves."""
    eps, below = torch.finfo(dtype).eps, {F32: 1e-37, F64: 1e-303}[dtype]
    x = torch.logspace(-42 if dtype == F32 else -310, 4, 4001, dtype=F64).to(dtype)
    x = torch.cat([-x, x]).view(1, -1, 1)
    m = LAYERS[mode][0](1, 1, dtype=dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0 if p.dim() == 2 else 0.0)
    actual = outputs(m, x, backend)
    for name, e in outputs(copy.deepcopy(m).double(), x.double(), "reference").items():
        # A GRU's (1 - z) loses all digits near z = 1. In the other cells only results next to the
        # smallest number may be off: the engine's exp stops short of its underflow.
        atol = eps if mode == "GRU" else below
        close = (actual[name].double() - e).abs() <= 4 * eps * e.abs() + atol
        assert close.all(), (name, x[~close])


# More elements than torch computes in one thread.
TINY = torch.full((100_000,), 1e-40)


@fast
@modes
def test_the_mode_of_subnormals_is_ours_inside_and_theirs_outside(
    mode: str, backend: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    case = Case(mode, directions=2, T=30, B=40, I=64, H=20)  # worth two threads
    m, d = ours(case, F32), data(case, F32)
    d.x[0], d.x[1] = 1e-39, 1e-20
    assert (TINY * 1.0 > 0).all()
    expected = evaluate(m, case, d, backend)
    assert (TINY * 1.0 > 0).all()
    torch.set_flush_denormal(True)
    try:
        assert_equal(evaluate(m, case, d, backend), expected)
        assert TINY[:1] * 1.0 == 0  # in this thread, as it was set
    finally:
        torch.set_flush_denormal(False)
    assert (TINY * 1.0 > 0).all()


@fast
@modes
def test_subnormal_inputs_and_states_are_zero(mode: str, backend: str) -> None:
    case = Case(mode, T=2, B=9, I=5, H=20)
    m, d = ours(case, F32), data(case, F32)
    assert d.hx is not None
    results = []
    for value in (0.0, 1e-40):
        d.x.fill_(value)
        for s in d.hx:
            s.fill_(value)
        results.append(evaluate(m, case, d, backend))
    assert_equal(*results)


@fast
def test_relu_of_subnormals(backend: str) -> None:
    m = fastrnn.RNN(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        m.weight_ih_l0.fill_(1)
    x = torch.tensor([1e-37, 1e-40, -1e-40, 1e-45, -0.0]).view(1, 5, 1)
    expected = torch.tensor([1e-37, 0, 0, 0, 0]).view(1, 5, 1)
    assert torch.equal(outputs(m, x, backend)["output"], expected)


# Gradients that end


def forgetful(case: Case, dtype: torch.dtype) -> fastrnn.RNNBase:
    """A layer whose gradients are exactly zero a few steps before that of an output."""
    m = ours(case, dtype)
    cell = case.cell
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.startswith("weight_hh"):
                p.mul_({F32: 1e-12, F64: 1e-100}[dtype])
            elif name.startswith("bias_hh") and cell.keep_gate:
                k = cell.gates.index(cell.keep_gate)
                p[k * case.H : (k + 1) * case.H] = -1e4
    return m


COTANGENTS: dict[str, tuple[bool, Callable[[Tensor], Any]]] = {
    "last": (False, lambda dy: dy[:-1].zero_()),
    "first": (False, lambda dy: dy[1:].zero_()),
    "first and last": (False, lambda dy: dy[1:-1].zero_()),
    "one sequence": (False, lambda dy: dy[:, 1:].zero_()),
    "the middle": (False, lambda dy: (dy[:7].zero_(), dy[9:].zero_())),
    "a step for each": (
        False,
        lambda dy: dy.mul_(
            torch.arange(len(dy)).view(-1, 1, 1) == torch.arange(dy.shape[1]).view(-1, 1) * 3
        ),
    ),
    "the final state": (True, lambda dy: dy.zero_()),
    "none": (False, lambda dy: dy.zero_()),
}
"""Whether the final states have a gradient, and what is done to that of the output."""


@fast
@dtypes
@pytest.mark.parametrize("which", COTANGENTS)
@pytest.mark.parametrize(
    "mode,directions,layout,projected",
    [
        *((mode, 1, "dense", False) for mode in CELLS),
        *((mode, 2, "packed", False) for mode in CELLS),
        ("LSTM", 2, "unsorted", True),
    ],
)
def test_gradients_that_end(
    mode: str,
    directions: int,
    layout: str,
    projected: bool,
    which: str,
    backend: str,
    dtype: torch.dtype,
) -> None:
    case = Case(
        mode, directions=directions, layout=layout, projected=projected, T=20, B=5, I=6, H=20
    )
    m, d = forgetful(case, dtype), data(case, dtype)
    final, change = COTANGENTS[which]
    change(d.cotangents[0])
    for dfinal in d.cotangents[1:]:
        dfinal.mul_(final)
    expected = evaluate(copy.deepcopy(m).double(), case, d.to(F64), "reference")
    assert_near(evaluate(m, case, d, backend), expected, dtype)


@fast
@modes
def test_one_step_without_a_gradient(mode: str, backend: str) -> None:
    case = Case(mode, directions=2, T=1, B=3, I=4, H=20)
    m, d = ours(case, F32), data(case, F32)
    for cotangent in d.cotangents:
        cotangent.zero_()
    for name, gradient in evaluate(m, case, d, backend).items():
        assert not name.startswith("grad") or not gradient.any(), name


@fast
@modes
@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_that_end_at_another_step_in_each_thread(
    mode: str, directions: int, backend: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    case = Case(mode, directions=directions, T=40, B=16, I=6, H=176)
    m, d = forgetful(case, F32), data(case, F32)
    COTANGENTS["a step for each"][1](d.cotangents[0])
    for dfinal in d.cotangents[1:]:
        dfinal.zero_()
    expected = evaluate(copy.deepcopy(m).double(), case, d.to(F64), "reference")
    assert_near(evaluate(m, case, d, backend), expected, F32)


@fast
@modes
@pytest.mark.parametrize("directions", [1, 2])
def test_steps_without_a_gradient_are_not_run(mode: str, directions: int, backend: str) -> None:
    """Their saved activations are not read."""
    case = Case(mode, directions=directions, T=30, B=3, I=4, H=20)
    m, d = forgetful(case, F32), data(case, F32)
    run: Any = load_backend(backend)
    layer = Layer(case.cell, rows_of(d.x), m._weights()[0], d.hx)
    with torch.no_grad():
        out, _, saved = run.forward(layer, d.x, save=True)
        saved[0, : 15 * case.B], saved[1:, 15 * case.B :] = math.nan, math.nan
        dfinal = d.cotangents[1:]
        gradients = run.backward(
            layer, d.x, out, saved, None, dfinal, (True,) * (1 + 5 * directions + len(dfinal))
        )
    for g in gradients:
        assert g is None or not g.isnan().any()
    dx = gradients[0]
    assert (dx[-1] != 0).any()
    assert (dx[:10] == 0).all() if directions == 1 else (dx[14:16] == 0).all()


def leaves_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for r in result for t in leaves_of(r)]


@fast
@modes
def test_results_are_not_shared_between_calls(mode: str, backend: str) -> None:
    case = Case(mode, directions=2, layers=2, hx=False, T=3, B=4)
    m = ours(case, F32)
    with fastrnn.use_backend(backend), torch.no_grad():
        first = m(data(case, F32, 2).x)
        kept = [t.clone() for t in leaves_of(first)]
        second = m(data(case, F32, 3).x)
    for a, b, c in zip(leaves_of(first), kept, leaves_of(second), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.data_ptr() != c.data_ptr()


@fast
@modes
def test_arguments_are_left_alone(mode: str, backend: str) -> None:
    case = Case(mode, directions=2, layers=2, layout="unsorted", T=3, B=4)
    d = data(case, F32)
    m = ours(case, F32)
    tensors = [d.x, d.lengths, *d.hx, *d.cotangents, *m.parameters()]
    before = [t.detach().clone() for t in tensors]
    evaluate(m, case, d, backend)
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)
