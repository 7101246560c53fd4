"""torch.func, forward mode and double backward of a layer, against torch.nn's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import LAYERS, STEPS, Case, call, data, layered, ours, theirs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn.cells import CELLS

MODES = list(LAYERS)
F64 = torch.float64

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


@pytest.fixture(params=layered(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastrnn.use_backend(request.param):
        yield request.param


# Forward mode and higher orders run on the reference, whichever backend made the graph.
once = pytest.mark.parametrize("backend", layered()[:1], indirect=True)


class Problem:
    """A module as functions of its parameters and input, to all outputs and to one number."""

    def __init__(self, make: Callable[..., Any], case: Case) -> None:
        self.module, d = make(case, F64), data(case, F64)
        self.x, self.hx, self.cotangent = d.x, d.hx, d.cotangents[0]
        self.packed: PackedSequence | None = None
        if d.lengths is not None:  # torch cannot transform the packing
            self.packed = pack_padded_sequence(d.x, d.lengths, enforce_sorted=False)
            self.x = self.packed.data
        self.parameters = {n: p.detach() for n, p in self.module.named_parameters()}

    def outputs(self, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        input = x if self.packed is None else PackedSequence(x, *self.packed[1:])
        hx = self.hx if len(self.hx) > 1 else self.hx[0]
        output, final = functional_call(self.module, parameters, (input, hx))
        y = output if isinstance(output, Tensor) else output.data
        return (y, *((final,) if isinstance(final, Tensor) else final))

    def loss(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum((y.square().sum() for y in self.outputs(parameters, x)), torch.zeros(()))

    def loss_of_x(self, x: Tensor) -> Tensor:
        return self.loss(self.parameters, x)

    def output_of_x(self, x: Tensor) -> Tensor:
        return self.outputs(self.parameters, x)[0]

    def loss_of_weight(self, w: Tensor) -> Tensor:
        return self.loss({**self.parameters, "weight_hh_l0": w}, self.x)


def assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def small(mode: str, layout: str = "dense", **changes: Any) -> Case:
    projected = CELLS[mode].projectable
    sizes = {"T": 3, "B": 2, "I": 3, "H": 4} | changes
    return Case(mode, directions=2, layers=2, layout=layout, projected=projected, **sizes)


Transforms = dict[str, Callable[[Problem], Any]]
FIRST_ORDER: Transforms = {
    "grad": lambda p: grad(p.loss)(p.parameters, p.x),
    "vjp": lambda p: vjp(p.output_of_x, p.x)[1](p.cotangent),
    "jacrev": lambda p: jacrev(p.output_of_x)(p.x),
}
OTHERS: Transforms = {
    "jvp": lambda p: jvp(p.output_of_x, (p.x,), (p.x.cos(),)),
    "jvp of weights": lambda p: jvp(
        lambda w: p.outputs(w, p.x), (p.parameters,), (tree_map(torch.cos, p.parameters),)
    ),
    "jacfwd": lambda p: jacfwd(p.output_of_x)(p.x),
    "hessian": lambda p: hessian(p.loss_of_weight)(p.parameters["weight_hh_l0"]),
    "reverse over reverse": lambda p: grad(lambda x: grad(p.loss_of_x)(x).sin().sum())(p.x),
    "reverse over forward": lambda p: grad(lambda x: jvp(p.loss_of_x, (x,), (x.cos(),))[1])(p.x),
    "three times": lambda p: grad(
        lambda x: grad(lambda x: grad(p.loss_of_x)(x).sin().sum())(x).sin().sum()
    )(p.x),
}


def assert_is_torchs(mode: str, transform: Callable[[Problem], Any]) -> None:
    assert_same(*(transform(Problem(make, small(mode))) for make in (ours, theirs)))


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("mode", MODES)
def test_first_order_transforms(mode: str, name: str) -> None:
    assert_is_torchs(mode, FIRST_ORDER[name])


@once
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_and_higher_orders(mode: str, name: str) -> None:
    assert_is_torchs(mode, OTHERS[name])


def eager_grad(p: Problem, x: Tensor) -> dict[str, Tensor]:
    """Without torch.func, which torch's own packed layers do not support."""
    leaves = {n: w.clone().requires_grad_() for n, w in p.parameters.items()}
    found = torch.autograd.grad(p.loss(leaves, x), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_packed_batch(mode: str) -> None:
    case = small(mode, "unsorted")
    mine, torchs = Problem(ours, case), Problem(theirs, case)
    assert_same(grad(mine.loss)(mine.parameters, mine.x), eager_grad(torchs, torchs.x))


@once
@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_and_hessians_of_a_packed_batch(mode: str) -> None:
    case = small(mode, "unsorted")
    mine, torchs = Problem(ours, case), Problem(theirs, case)
    x, tangent = mine.x, mine.x.cos()
    assert_same(
        jvp(mine.output_of_x, (x,), (tangent,)),
        torch.autograd.functional.jvp(torchs.output_of_x, x, tangent),
    )
    assert_same(hessian(mine.loss_of_x)(x), torch.autograd.functional.hessian(torchs.loss_of_x, x))


def stacked(results: list[Any]) -> Any:
    return tree_map(lambda *each: torch.stack(each), *results)


@pytest.mark.parametrize("layout", ["dense", "unsorted"])
@pytest.mark.parametrize("mode", MODES)
def test_vmap_is_a_loop(mode: str, layout: str) -> None:
    """Over inputs, over an ensemble of weights, over both; and per-sample gradients."""
    case = small(mode, layout)
    mine, torchs = Problem(ours, case), Problem(theirs, case)
    scale = torch.linspace(0.5, 2, 3, dtype=F64)
    many = {n: torch.stack([s * p for s in scale]) for n, p in mine.parameters.items()}
    x = torch.stack([s * mine.x for s in scale])
    ensemble = [{n: p[k] for n, p in many.items()} for k in range(3)]
    for dim in (0, 1):
        assert_same(
            vmap(lambda x: mine.outputs(mine.parameters, x), in_dims=dim)(x.movedim(0, dim)),
            stacked([torchs.outputs(torchs.parameters, each) for each in x]),
        )
    assert_same(
        vmap(lambda w: mine.outputs(w, mine.x))(many),
        stacked([torchs.outputs(w, torchs.x) for w in ensemble]),
    )
    assert_same(
        vmap(mine.outputs)(many, x),
        stacked([torchs.outputs(w, each) for w, each in zip(ensemble, x, strict=True)]),
    )
    assert_same(
        vmap(grad(mine.loss), in_dims=(None, 0))(mine.parameters, x),
        stacked([eager_grad(torchs, each) for each in x]),
    )


@pytest.mark.parametrize("mode", MODES)
def test_vmap_within_and_around_other_transforms(mode: str) -> None:
    case = small(mode)
    mine, torchs = Problem(ours, case), Problem(theirs, case)
    x = torch.stack([mine.x, mine.x.cos()])
    assert_same(
        grad(lambda w: vmap(lambda x: mine.loss(w, x))(x).sin().sum())(mine.parameters),
        grad(lambda w: sum(torchs.loss(w, each).sin() for each in x))(torchs.parameters),
    )
    assert_same(vmap(vmap(mine.loss_of_x))(x[None])[0], vmap(mine.loss_of_x)(x))
    assert_same(
        vmap(lambda x: jvp(mine.loss_of_x, (x,), (x,))[1])(x),
        stacked([jvp(torchs.loss_of_x, (each,), (each,))[1] for each in x]),
    )
    assert_same(
        vmap(grad(lambda x: grad(mine.loss_of_x)(x).sum()))(x),
        stacked([grad(lambda x: grad(torchs.loss_of_x)(x).sum())(each) for each in x]),
    )


@pytest.mark.parametrize("mode", MODES)
def test_transforms_of_a_cell(mode: str) -> None:
    found = []
    for make in STEPS[mode]:
        torch.manual_seed(1)
        cell = make(3, 4, dtype=F64)
        x = torch.randn(5, 2, 3, dtype=F64)

        def loss(x: Tensor, cell: Any = cell) -> Tensor:
            return sum(s.sin().sum() for s in tree_leaves(cell(x)))

        gradients = [grad(loss), hessian(loss), lambda x: jvp(loss, (x,), (x,))]
        found.append([[g(each) for g in gradients] for each in x])
        if make is STEPS[mode][0]:
            assert_same(vmap(grad(loss))(x), stacked([grad(loss)(each) for each in x]))
    assert_same(*found)


def test_vmap_over_nothing() -> None:
    m, x = fastrnn.GRU(3, 4), torch.zeros(0, 5, 2, 3)
    assert vmap(m)(x)[0].shape == (0, 5, 2, 4)
    weights = {n: p.expand(0, *p.shape) for n, p in m.named_parameters()}
    with pytest.raises(RuntimeError, match="at least one sample"):
        vmap(lambda w: functional_call(m, w, (torch.zeros(5, 2, 3),)))(weights)


CHECKED = [
    Case(mode, directions=directions, layout=layout, projected=projected, T=3, B=2, I=2, H=2)
    for mode, directions, layout, projected in product(
        MODES, (1, 2), ("dense", "unsorted"), (False, True)
    )
    if CELLS[mode].projectable or not projected
]


@once
@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_gradcheck_of_every_order_and_mode(case: Case) -> None:
    p = Problem(ours, case)
    names, states = list(p.parameters), len(p.hx)

    def f(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        p.hx, weights = rest[:states], rest[states:]
        return p.outputs(dict(zip(names, weights, strict=True)), x)

    leaves = [t.clone().requires_grad_() for t in (p.x, *p.hx, *p.parameters.values())]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@once
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_penalty(mode: str) -> None:
    """The cotangents need no gradient, but their factors do."""
    found = []
    for make in (ours, theirs):
        case = small(mode)
        d, m = data(case, F64), make(case, F64)
        x = d.x.requires_grad_()
        output = call(m, case, x, None, d.hx)[0]
        (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (output.square().sum() + dx.square().sum()).backward()
        found.append([x.grad, *(p.grad for p in m.parameters())])
    assert_same(*found)


@once
@pytest.mark.parametrize("mode", MODES)
def test_tangents_without_gradients(mode: str) -> None:
    """A dual tensor need not require a gradient, nor be the input."""
    found = []
    for make in (ours, theirs):
        case = small(mode)
        d, m = data(case, F64), make(case, F64).requires_grad_(False)
        with forward_ad.dual_level():
            hx = tuple(forward_ad.make_dual(s, s.cos()) for s in d.hx)
            outputs = call(m, case, d.x, None, hx)
            found.append([forward_ad.unpack_dual(y) for y in outputs])
            assert all(tangent is not None for _, tangent in found[-1])
    assert_same(*found)


@once
@pytest.mark.parametrize("mode", MODES)
def test_tangents_of_gradients(mode: str) -> None:
    """Forward mode over an earlier graph, and many gradients at once under no_grad."""
    found = []
    for make in (ours, theirs):
        case = small(mode)
        d, m = data(case, F64), make(case, F64)
        x, cotangent = d.x.requires_grad_(), d.cotangents[0]
        y = call(m, case, x, None, d.hx)[0]
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent, cotangent.cos())
            (dx,) = torch.autograd.grad(y, x, dual, retain_graph=True)
            (ddx,) = torch.autograd.grad(g, x, forward_ad.make_dual(x.detach(), x.detach().cos()))
            found.append([*forward_ad.unpack_dual(dx), *forward_ad.unpack_dual(ddx)])
        with torch.no_grad():
            found[-1].append(jacrev(lambda x: call(m, case, x, None, d.hx)[0])(d.x.detach()))  # noqa: B023
    assert_same(*found)


@once
@pytest.mark.parametrize("mode", MODES)
def test_autocast_leaves_the_derivatives_of_derivatives(mode: str) -> None:
    p = Problem(ours, small(mode))
    module, x = p.module.float(), p.x.float()

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].sin().sum()

    def second(x: Tensor) -> Tensor:
        return grad(lambda x: grad(loss)(x).sin().sum())(x)

    expected = second(x)
    x = x.requires_grad_()
    g = torch.autograd.grad(loss(x), x, create_graph=True)[0].sin().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(g, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_with_lengths(mode: str) -> None:
    """Under every transform the results are those of the sequences without their padding."""
    m, lengths = LAYERS[mode][0](3, 4, dtype=F64), [5, 0, 3]
    x, t = torch.randn(2, 5, 3, 3, dtype=F64).unbind()

    def f(x: Tensor) -> Tensor:
        output, final = m(x, lengths=lengths)
        return output.square().sum() + sum(s.square().sum() for s in tree_leaves(final))

    def alone(x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for k, n in enumerate(lengths):
            if n:
                output, final = m(x[:n, k])
                total = total + output.square().sum()
                total = total + sum(s.square().sum() for s in tree_leaves(final))
        return total

    torch.testing.assert_close(grad(f)(x), grad(alone)(x))
    torch.testing.assert_close(jvp(f, (x,), (t,)), jvp(alone, (x,), (t,)))
    torch.testing.assert_close(hessian(f)(x), hessian(alone)(x))
    xs = torch.stack([x, t])
    torch.testing.assert_close(vmap(grad(f))(xs), torch.stack([grad(alone)(x) for x in xs]))
    with pytest.raises(RuntimeError, match="lengths that are the same for all samples"):
        vmap(lambda x, n: m(x, lengths=n)[0])(xs, torch.tensor([lengths, lengths]))
