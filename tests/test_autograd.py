"""Autograd: when a graph is made, what it holds, and what it refuses."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from support import (
    LAYERS,
    STEPS,
    Case,
    assert_equal,
    assert_near,
    call,
    data,
    evaluate,
    layered,
    ours,
    theirs,
)
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.dispatch import explain_choice, load_backend

MODES = list(LAYERS)
F64 = torch.float64


@pytest.fixture(params=layered(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastrnn.use_backend(request.param):
        yield request.param


# For facts of the autograd Function, which is the same for all backends.
once = pytest.mark.parametrize("backend", layered()[:1], indirect=True)


def small(mode: str, **changes: Any) -> Case:
    return Case(mode, **{"directions": 2, "layers": 2} | changes)


def final_states(final: Any) -> tuple[Tensor, ...]:
    return (final,) if isinstance(final, Tensor) else tuple(final)


@contextmanager
def spied(
    monkeypatch: pytest.MonkeyPatch, target: ModuleType | Any, name: str
) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """The keywords and the result of every call of ``target.name`` in the block."""
    calls: list[tuple[dict[str, Any], Any]] = []
    original = getattr(target, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((kwargs, result))
        return result

    with monkeypatch.context() as m:
        m.setattr(target, name, spy)
        yield calls


# No graph, nothing saved


QUIET = {
    "frozen": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("how", QUIET)
@pytest.mark.parametrize("mode", CELLS)
def test_nothing_is_saved_when_no_gradient_is_needed(
    mode: str, how: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small(mode)
    d = data(case, torch.float32)
    m = ours(case, torch.float32).requires_grad_(how != "frozen")
    with spied(monkeypatch, load_backend(backend), "forward") as calls, QUIET[how]():
        output, final = m(d.x, d.hx if len(d.hx) > 1 else d.hx[0])
    assert [kwargs["save"] for kwargs, _ in calls] == [False] * case.layers
    for t in (output, *final_states(final)):
        assert not t.requires_grad
        assert t.grad_fn is None


@pytest.mark.parametrize("mode", MODES)
def test_a_cell_saves_nothing_when_no_gradient_is_needed(
    mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = STEPS[mode][0](3, 4).requires_grad_(False)
    with spied(monkeypatch, load_backend(backend), "forward") as calls:
        new = cell(torch.randn(2, 3))
    assert [kwargs["save"] for kwargs, _ in calls] == [False]
    assert all(t.grad_fn is None for t in final_states(new))


@once
@pytest.mark.parametrize("which", ["input", "h_0", "weight_ih_l0", "bias_hh_l0_reverse"])
def test_one_tensor_that_needs_a_gradient_is_enough(which: str) -> None:
    case = small("LSTM", layers=1)
    d = data(case, torch.float32)
    m = ours(case, torch.float32).requires_grad_(False)
    x, hx = d.x, d.hx
    tensors = {"input": x, "h_0": hx[0], **dict(m.named_parameters())}
    tensors[which].requires_grad_()
    output, final = m(x, hx)
    assert output.requires_grad
    assert all(t.requires_grad for t in final)
    output.sum().backward()
    assert [n for n, t in tensors.items() if t.grad is not None] == [which]


# Gradients


def gradients(outputs: Any, leaves: list[Tensor], **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(9)
    flat = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = torch.autograd.grad(
        flat, leaves, [torch.randn_like(t) for t in flat], allow_unused=True, **kwargs
    )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def graph(case: Case, make: Any, seed: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of one call of a new module, and the leaves."""
    d = data(case, F64, seed)
    m = make(case, F64)
    x, hx = d.x.requires_grad_(), [s.requires_grad_() for s in d.hx]
    return list(call(m, case, x, d.lengths, hx)), [x, *hx, *m.parameters()]


@pytest.mark.parametrize(
    ("mode", "which"), [(m, k) for m in MODES for k in range(1 + len(CELLS[m].states))]
)
def test_gradient_through_one_output_only(mode: str, which: int) -> None:
    case = small(mode)
    results = []
    for make in (ours, theirs):
        outputs, leaves = graph(case, make)
        results.append(gradients(outputs[which], leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# The engine keeps memory for reuse for large tensors only.
sizes = pytest.mark.parametrize("sizes", [{}, {"T": 40, "B": 16, "H": 90}], ids=["small", "large"])


@sizes
@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("layout", ["dense", "unsorted"])
def test_retain_graph(mode: str, layout: str, sizes: dict[str, int]) -> None:
    outputs, leaves = graph(small(mode, layout=layout, **sizes), ours)
    first = gradients(outputs, leaves, retain_graph=True)
    second = gradients(outputs, leaves, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    gradients(outputs, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(outputs, leaves)


@sizes
@pytest.mark.parametrize("mode", CELLS)
def test_two_live_graphs(mode: str, sizes: dict[str, int]) -> None:
    case = small(mode, **sizes)
    alone = [gradients(*graph(case, ours, seed)) for seed in (2, 3)]
    a, b = graph(case, ours, 2), graph(case, ours, 3)
    got_b = gradients(*b)
    c = graph(case, ours, 3)  # may get the buffers that b has freed
    got_a, got_c = gradients(*a), gradients(*c)
    for expected, got in zip((*alone, alone[1]), (got_a, got_b, got_c), strict=True):
        for e, g in zip(expected, got, strict=True):
            assert torch.equal(e, g)


@once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_backward_accumulates_and_works_in_eval(mode: str, training: bool) -> None:
    grads = []
    for make in (ours, theirs):
        m = make(small(mode), F64).train(training)
        torch.manual_seed(4)
        for _ in range(2):
            m(torch.randn(4, 3, 5, dtype=F64))[0].sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


FROZEN: dict[str, Callable[[str], bool]] = {
    "weight_ih": lambda n: "weight_ih" in n,
    "weight_hh": lambda n: "weight_hh" in n,
    "weight_hr": lambda n: "weight_hr" in n,
    "bias_ih": lambda n: "bias_ih" in n,
    "bias_hh": lambda n: "bias_hh" in n,
    "layer 0": lambda n: "_l0" in n,
    "layer 1": lambda n: "_l1" in n,
    "reverse": lambda n: n.endswith("_reverse"),
    "all": lambda n: True,
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_weights(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not needed is not computed, and the other gradients stay the same."""
    case = small("LSTM", projected=True, hx=False, B=2)
    d = data(case, F64)
    full = evaluate(ours(case, F64), case, d)
    m = ours(case, F64)
    for n, p in m.named_parameters():
        p.requires_grad_(not FROZEN[kind](n))
    x = d.x.requires_grad_()
    output, final = m(x)
    with spied(monkeypatch, load_backend(backend), "backward") as made:
        torch.autograd.backward([output, *final], d.cotangents)
    assert torch.equal(x.grad, full["grad of input"])
    for n, p in m.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, full[f"grad of {n}"]), n
        else:
            assert p.grad is None, n
    gradients = [g for _, (_, *layer) in reversed(made) for g in layer]
    assert [g is not None for g in gradients] == [p.requires_grad for p in m.parameters()]


@pytest.mark.parametrize("mode", CELLS)
def test_a_frozen_layer_below_has_no_backward_pass(
    mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small(mode)
    m = ours(case, F64)
    for n, p in m.named_parameters():
        p.requires_grad_("_l1" in n)
    output, _ = m(data(case, F64).x)
    with spied(monkeypatch, load_backend(backend), "backward") as calls:
        output.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("mode", CELLS)
def test_an_input_without_gradient(mode: str) -> None:
    case = small(mode)
    d = data(case, F64)
    full = evaluate(ours(case, F64), case, d)
    m = ours(case, F64)
    output, final = m(d.x, d.hx[0] if len(d.hx) == 1 else d.hx)
    torch.autograd.backward([output, *final_states(final)], d.cotangents)
    assert d.x.grad is None
    for n, p in m.named_parameters():
        assert torch.equal(p.grad, full[f"grad of {n}"]), n


@pytest.mark.parametrize("mode", CELLS)
def test_a_gradient_of_zero(mode: str) -> None:
    outputs, leaves = graph(small(mode), ours)
    (outputs[0] * 0).sum().backward()
    for leaf in leaves:
        assert leaf.grad.eq(0).all()


# Hooks, checkpoints, threads


@once
@pytest.mark.parametrize("mode", MODES)
def test_hooks_see_what_torchs_see(mode: str) -> None:
    seen: list[list[Any]] = []
    for make in (ours, theirs):
        case = small(mode)
        m = make(case, F64)
        x = data(case, F64).x.requires_grad_()
        log: list[Any] = []
        seen.append(log)
        m.register_forward_pre_hook(lambda m, args, log=log: log.append(args[0].detach()))
        m.register_forward_hook(lambda m, args, out, log=log: log.append(out[0].detach()))
        m.register_full_backward_hook(lambda m, gi, go, log=log: log.extend([*gi, *go]))
        m.weight_hh_l0.register_hook(lambda g, log=log: log.append(g))
        m.weight_hh_l1.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad))
        output, _ = m(x)
        output.register_hook(lambda g, log=log: log.append(g))
        (output * torch.arange(output.shape[-1])).sum().backward()
        log.append(x.grad)
    for a, b in zip(*seen, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@once
@pytest.mark.parametrize("mode", MODES)
def test_a_hook_may_change_a_gradient(mode: str) -> None:
    case = small(mode)
    outputs, leaves = graph(case, ours)
    expected = gradients(outputs, leaves)
    outputs, leaves = graph(case, ours)
    for t in outputs:
        t.register_hook(lambda g: 2 * g)
    for a, b in zip(gradients(outputs, leaves), expected, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-10, atol=1e-12)


SAVERS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": save_on_cpu,
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("how", SAVERS)
@pytest.mark.parametrize("mode", CELLS)
def test_saved_tensors_may_be_moved(mode: str, how: str) -> None:
    case = small(mode, layout="unsorted")
    d = data(case, F64)
    m = ours(case, F64)
    expected = evaluate(m, case, d)
    with SAVERS[how]():
        assert_equal(evaluate(m, case, d), expected)


def test_everything_saved_goes_through_the_hooks() -> None:
    packed, unpacked = [], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t)
        return t

    m = fastrnn.LSTM(5, 6)
    with saved_tensors_hooks(pack, unpack):
        output, _ = m(torch.randn(4, 3, 5))
    output.sum().backward()
    assert len(packed) == len(unpacked) > 0
    assert sum(t.numel() for t in packed) >= 4 * 3 * 6 * 5  # the gates and c, of every step


@once
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(mode: str, reentrant: bool) -> None:
    grads = []
    for wrap in (False, True):
        case = small(mode)
        m, x = ours(case, F64), data(case, F64).x.requires_grad_()
        m.dropout = 0.5
        torch.manual_seed(6)
        output, _ = checkpoint(m, x, use_reentrant=reentrant) if wrap else m(x)
        output.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", CELLS)
def test_backward_in_another_thread(mode: str) -> None:
    """A thread in which neither use_backend nor the grad mode of this one is in force."""
    case = small(mode)
    expected = gradients(*graph(case, ours))
    outputs, leaves = graph(case, ours)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(gradients(outputs, leaves)))
    thread.start()
    thread.join()
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", CELLS)
def test_backward_runs_where_forward_ran(
    mode: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, leaves = graph(small(mode), ours)
    others = [b for b in layered() if b != backend]
    with spied(monkeypatch, load_backend(backend), "backward") as calls:
        for other in others or [backend]:
            with fastrnn.use_backend(other):
                gradients(outputs, leaves, retain_graph=True)
    assert len(calls) == 2 * len(others or [backend])


@pytest.fixture(params=["usual memory", "kept memory"])
def memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine's own memory for results of any size, and not only for large ones."""
    cpp: Any = load_backend("cpp")
    if cpp.missing() is not None or request.param == "usual memory":
        yield
        return
    cpp._cpp.make_large(1, cpp._large)
    yield
    cpp._cpp.make_large(cpp.LARGE, cpp._large)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("mode", MODES)
def test_results_are_tensors_like_any_other(mode: str) -> None:
    m, cell = LAYERS[mode][0](5, 6), STEPS[mode][0](5, 6)
    x = torch.randn(4, 3, 5, requires_grad=True)
    for t in (final_states(m(x)[1])[-1], *final_states(cell(x[0]))[1:]):
        t.mul_(2).sum().backward()  # unlike the output, which backward needs
    assert not x.grad._is_view()
    with torch.no_grad():
        y, _ = m(x)
    y.add_(m.weight_hh_l0[0])
    y.sum().backward()
    assert torch.equal(pickle.loads(pickle.dumps(y.detach())), y)
    assert y.detach().share_memory_().is_shared()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 2, 0])
def test_states_may_be_detached_in_place(mode: str, layers: int) -> None:
    """As in truncated backpropagation through time. ``layers=0`` is a cell."""
    if layers:
        m, x = ours(small(mode, layers=layers), torch.float32), torch.randn(4, 3, 5)
    else:
        m, x = STEPS[mode][0](5, 6), torch.randn(3, 5)
    state = None
    for _ in range(2):
        result = m(x, state)
        state = result[1] if layers else result
        for s in final_states(state):
            s.detach_()
            assert s.grad_fn is None


# Refusals: an error, never a wrong number

EDITED = ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]


@once
@pytest.mark.parametrize("name", EDITED)
def test_an_edit_before_backward_is_noticed(name: str) -> None:
    case = small("LSTM", layers=1, directions=1, projected=True)
    d = data(case, F64)
    m = ours(case, F64)
    # The result of an operator, since a leaf cannot be edited.
    x, h, c = (t.requires_grad_() * 1 for t in (d.x, *d.hx))
    output, _ = m(x, (h, c))
    tensors = {"input": x, "h_0": h, "c_0": c, **dict(m.named_parameters())}
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@once
@pytest.mark.parametrize("mode", MODES)
def test_an_edit_of_the_output_is_noticed(mode: str) -> None:
    outputs, leaves = graph(small(mode), ours)
    with pytest.raises(RuntimeError, match="inplace"):  # noqa: PT012
        outputs[0].relu_()
        gradients(outputs, leaves)


@pytest.mark.parametrize("mode", MODES)
def test_a_final_state_may_be_edited(mode: str) -> None:
    results = []
    for make in (ours, theirs):
        outputs, leaves = graph(small(mode), make)
        outputs[1].relu_()
        results.append(gradients(outputs, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@once
def test_batched_gradients_are_refused() -> None:
    x = torch.randn(5, 2, 3, requires_grad=True)
    y, _ = fastrnn.GRU(3, 4)(x)
    with pytest.raises(RuntimeError, match="no batched gradients"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


def test_a_choice_of_backend_is_not_part_of_the_graph() -> None:
    """The rest of the graph may run on any other backend."""
    a, b = fastrnn.GRU(3, 4, dtype=F64), fastrnn.GRU(4, 4, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    grads = []
    for name in [*layered(), "torch"]:
        y, _ = a(x)
        with fastrnn.use_backend(name):
            assert explain_choice(CELLS["GRU"], F64, x.device).backend == name
            z, _ = b(y)
        names = [n for n, _ in a.named_parameters()]
        grads.append(dict(zip(names, torch.autograd.grad(z.sum(), a.parameters()), strict=True)))
    for other in grads[1:]:
        assert_near(other, grads[0], F64)
