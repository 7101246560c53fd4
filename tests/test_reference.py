"""The reference backend against torch.nn and against finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from support import (
    CASES,
    GRID_SIZES,
    LAYERS,
    OPTIONS,
    SIZES,
    STEPS,
    Case,
    assert_near,
    call,
    data,
    evaluate,
    grid,
    naming,
    ours,
    shaped,
    theirs,
    valid,
)
from torch.func import functional_call

import fastrnn
from fastrnn import functional
from fastrnn.cells import CELLS


def assert_is_torch(case: Case) -> None:
    d = data(case, torch.float64)
    expected = evaluate(theirs(case, torch.float64), case, d)
    assert_near(evaluate(ours(case, torch.float64), case, d, "reference"), expected, torch.float64)


def test_every_pair_of_values_has_a_case() -> None:
    factors = {**OPTIONS, **SIZES}
    for a, b in combinations(factors, 2):
        have = {(getattr(c, a), getattr(c, b)) for c in CASES}
        want = {(x, y) for x, y in product(factors[a], factors[b]) if valid({a: x, b: y})}
        assert have == want, (a, b)


@pytest.mark.parametrize("case", [c for c in CASES if c.mode in LAYERS], ids=str)
def test_layer_is_torchs(case: Case) -> None:
    assert_is_torch(case)


ONE_SIZE = (3, 5, 1, 63)


# All options together at one size, and in the heavy run at every size.
@pytest.mark.parametrize(
    "sizes",
    [s if s == ONE_SIZE else pytest.param(s, marks=pytest.mark.heavy) for s in GRID_SIZES],
    ids=str,
)
@pytest.mark.parametrize("mode", LAYERS)
def test_layer_is_torchs_grid(mode: str, sizes: tuple[int, int, int, int]) -> None:
    for case in grid(mode, sizes):
        with naming(case):
            assert_is_torch(case)


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 3), (0, 3)], ids=str)
def test_cell_is_torchs(mode: str, bias: bool, with_hx: bool, shape: tuple[int, ...]) -> None:
    results = []
    for make in STEPS[mode]:
        torch.manual_seed(3)
        cell = make(3, 4, bias=bias, dtype=torch.float64)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        state = [
            torch.randn(*shape[:-1], 4, dtype=torch.float64, requires_grad=True)
            for _ in CELLS[mode].states
        ]
        hx = None if not with_hx else state[0] if len(state) == 1 else tuple(state)
        with fastrnn.use_backend("reference"):
            new = cell(x, hx)
        new = (new,) if isinstance(new, torch.Tensor) else new
        leaves = dict(cell.named_parameters()) | {"input": x}
        leaves |= {f"{k}_0": s for k, s in enumerate(state) if with_hx}
        grads = torch.autograd.grad(new, list(leaves.values()), [torch.randn_like(n) for n in new])
        results.append(
            {str(k): n for k, n in enumerate(new)} | dict(zip(leaves, grads, strict=True))
        )
    assert_near(*results, torch.float64)


SMALL = [
    Case(mode, directions=directions, layout=layout, projected=projected, T=3, B=2, I=2, H=2)
    for mode, directions, layout, projected in product(
        CELLS, (1, 2), ("dense", "unsorted"), (False, True)
    )
    if CELLS[mode].projectable or not projected
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    d = data(case, torch.float64)
    module = ours(case, torch.float64)
    assert d.hx is not None
    names = [name for name, _ in module.named_parameters()]
    states = len(d.hx)
    leaves = [t.detach().requires_grad_() for t in (d.x, *d.hx, *module.parameters())]

    def f(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = dict(zip(names, rest[states:], strict=True))

        def run(*args: object) -> object:
            return functional_call(module, weights, args)

        with fastrnn.use_backend("reference"):
            return call(run, case, shaped(case, x), d.lengths, rest[:states])

    torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("mode", CELLS)
def test_gradcheck_of_a_step(mode: str) -> None:
    case = Case(mode, T=1, B=2, I=3, H=2)
    d = data(case, torch.float64)
    assert d.hx is not None
    leaves = [d.x[0], *(s[0] for s in d.hx), *ours(case, torch.float64).parameters()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    n = 1 + len(d.hx)

    def f(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = (*t[n:], None)
        return functional.step(CELLS[mode], t[0], t[1:n], weights, backend="reference")

    torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("mode", CELLS)
def test_new_sizes_do_not_change_what_a_sequence_gives(mode: str) -> None:
    """Each sequence of a packed batch as if alone: the oracle for cells that torch lacks."""
    case = Case(mode, directions=2, layers=2, layout="unsorted", T=5, B=4, I=3)
    d = data(case, torch.float64)
    module = ours(case, torch.float64)
    assert d.lengths is not None and d.hx is not None
    alone = replace(case, layout="dense", B=1)
    with fastrnn.use_backend("reference"):
        output, *final = call(module, case, d.x, d.lengths, d.hx)
        for b, length in enumerate(d.lengths):
            hx = tuple(s[:, b : b + 1] for s in d.hx)
            y, *last = call(module, alone, d.x[:length, b : b + 1], None, hx)
            torch.testing.assert_close(output[:length, b : b + 1], y)
            assert output[length:, b].eq(0).all()
            for s, t in zip(final, last, strict=True):
                torch.testing.assert_close(s[:, b : b + 1], t)
