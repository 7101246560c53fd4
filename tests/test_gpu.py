"""The Triton kernels on a GPU, with the plans of the table: `make test-gpu`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import (
    LAYERS,
    STEPS,
    Case,
    assert_equal,
    assert_near_in_norm,
    data,
    evaluate,
    ours,
)
from test_operators import ANY_SIZE, Calls
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.kernels.triton import plans

if os.environ.get("FASTRNN_TEST_GPU") != "1" or not torch.cuda.is_available():
    pytest.skip("`make test-gpu` on a machine with a GPU runs these", allow_module_level=True)

DEVICE = "cuda"
F32, F64 = torch.float32, torch.float64
# How far every result may be from the reference in float64, in the norm.
MAX_ERROR = {
    ("ieee", F32): 1e-5,
    ("tf32", F32): 5e-3,
    ("ieee", torch.float16): 5e-3,
    ("ieee", torch.bfloat16): 2e-2,
}
HIDDEN = (1, 33, 64, 100, 128, 200, 256, 512, 700, 1024, 2048)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """The precision of float32 products in the block, in torch's RNNs and elsewhere."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    for b in backends:
        b.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for b, allowed in zip(backends, before, strict=True):
            b.allow_tf32 = allowed


@pytest.fixture(params=MAX_ERROR, ids=lambda key: f"{key[0]}-{key[1]}")
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, float]]:
    """A dtype and the largest error, with products of that precision."""
    with products(request.param[0]):
        yield request.param[1], MAX_ERROR[request.param]


def assert_matches_reference(case: Case, dtype: torch.dtype, max_error: float) -> None:
    d, module = data(case, dtype, seed=3), ours(case, dtype)
    found = evaluate(copy.deepcopy(module).to(DEVICE), case, d.to(DEVICE), "triton")
    actual = {name: result.cpu() for name, result in found.items()}
    expected = evaluate(module.double(), case, d.to(F64), "reference")
    assert_near_in_norm(actual, expected, max_error)


@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("mode", ("RNN_TANH", "GRU", "LSTM"))
def test_every_row_of_the_table(mode: str, H: int, kind: tuple[torch.dtype, float]) -> None:
    if H == 1 and kind[1] > MAX_ERROR["ieee", F32]:
        pytest.skip("a gradient of one element is a sum that may cancel")
    assert_matches_reference(Case(mode, directions=2, B=19, I=48, H=H), *kind)


@pytest.mark.parametrize("H", (33, 256, 2048))
@pytest.mark.parametrize("layout,projected", [("unsorted", True), ("packed", False)])
def test_packed_and_projected(
    layout: str, projected: bool, H: int, kind: tuple[torch.dtype, float]
) -> None:
    assert_matches_reference(
        Case(
            "LSTM", directions=2, layers=2, layout=layout, projected=projected, T=5, B=37, I=17, H=H
        ),
        *kind,
    )


@pytest.mark.parametrize("kind", [("ieee", F32)], indirect=True, ids=str)
@pytest.mark.parametrize("H", (64, 512))
def test_relu_without_bias(H: int, kind: tuple[torch.dtype, float]) -> None:
    """In TF32 the sign of a pre-activation near zero may be another."""
    assert_matches_reference(
        Case(
            "RNN_RELU", layers=2, bias=False, layout="batch_first", hx=False, T=5, B=20, I=17, H=H
        ),
        *kind,
    )


@pytest.mark.parametrize("H", (128, 1024))
def test_more_groups_than_run_at_once(H: int) -> None:
    assert_matches_reference(Case("LSTM", directions=2, T=3, B=16 * 150 + 3, I=16, H=H), F32, 5e-3)


@pytest.mark.parametrize("H", (64, 256, 2048))
def test_backward_is_deterministic(H: int) -> None:
    case = Case("GRU", directions=2, layout="unsorted", T=20, B=100, I=32, H=H)
    d = data(case, F32).to(DEVICE)
    runs = [evaluate(ours(case, F32).to(DEVICE), case, d, "triton") for _ in range(3)]
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


@pytest.mark.parametrize("H", (64, 256))
def test_capture_in_a_graph(H: int) -> None:
    """A training step, captured and replayed on other numbers."""
    module = fastrnn.LSTM(32, H, device=DEVICE)
    x = torch.randn(10, 24, 32, device=DEVICE, requires_grad=True)

    def step() -> torch.Tensor:
        output, _ = module(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
        return torch.cat([output.detach().flatten(), *(g.flatten() for g in gradients)])

    with fastrnn.use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert torch.equal(result, step())


def test_capture_of_launched_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with too few processors for programs to wait for each other."""
    backend = fastrnn.dispatch.load_backend("triton")
    monkeypatch.setattr(backend, "_programs_at_once", lambda _: 1)
    test_capture_in_a_graph(256)


def test_no_synchronisation_with_the_host() -> None:
    module = fastrnn.GRU(32, 256, bidirectional=True, device=DEVICE)
    x = torch.randn(10, 24, 32, device=DEVICE)
    with fastrnn.use_backend("triton"):
        module(x)[0].sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(x)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_automatic_choice() -> None:
    module = fastrnn.GRU(32, 256, device=DEVICE)
    chosen = fastrnn.explain(module, torch.randn(10, 24, 32, device=DEVICE))
    architecture = fastrnn.dispatch.load_backend("triton")._architecture(
        torch.cuda.current_device()
    )
    assert chosen.backend == ("triton" if architecture in plans.LIMITS else "torch")


# A layer on the GPU, against the CPU in float64.


@pytest.fixture
def exact() -> Iterator[None]:
    with products("ieee"):
        yield


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module on the GPU, and its copy in float64 on the CPU."""
    return copy.deepcopy(module).to(DEVICE), module.double()


def assert_close(actual: Any, expected: Any, max_error: float = 1e-5) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert a.is_cuda
        assert (a.cpu().double() - e).norm() <= max_error * e.norm()


def trained(m: nn.Module, x: Tensor, run: Callable[..., Any] | None = None, **more: Any) -> Any:
    """All outputs, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    outputs = tree_leaves((m if run is None else run)(x, **more))
    outputs = [y for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]
    loss = torch.stack([y.float().square().sum() for y in outputs]).sum()
    return outputs, torch.autograd.grad(loss, [x, *m.parameters()])


def exactly(exact_module: nn.Module, x: Tensor, **more: Any) -> Any:
    """As :func:`trained`, on the CPU in float64."""
    with fastrnn.use_backend("reference"):
        return trained(exact_module, x.cpu().double(), **more)


def stacks(mode: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return pair(LAYERS[mode][0](20, 64, num_layers=2, bidirectional=True))


@pytest.mark.parametrize("backend", ("triton", None))
@pytest.mark.parametrize("mode", LAYERS)
def test_compiled_and_exported(mode: str, backend: str | None, exact: None) -> None:
    """Also where eager layers are torch's own operators."""
    m, exact_module = stacks(mode)
    torch._dynamo.reset()
    with fastrnn.use_backend(backend):
        compiled = torch.compile(m, fullgraph=True, dynamic=True)
        x = torch.randn(5, 3, 20, device=DEVICE)
        program = torch.export.export(m, (x,), dynamic_shapes=(ANY_SIZE,)).module()
        for T, B in ((7, 5), (4, 19)):
            x = torch.randn(T, B, 20, device=DEVICE)
            expected = exactly(exact_module, x)
            assert_close(trained(m, x, compiled), expected)
            with torch.no_grad():
                assert_close(compiled(x), expected[0])
                assert_close(program(x), expected[0])


@pytest.mark.parametrize("mode", LAYERS)
def test_operators_are_what_torch_expects(mode: str) -> None:
    m, _ = stacks(mode)
    with Calls() as seen, fastrnn.use_backend("triton"):
        trained(m, torch.randn(5, 3, 20, device=DEVICE))
    assert {op._opname for op, _ in seen.calls} == {"layer", "reverse"}
    seen.check()


def _squares(m: nn.Module, x: Tensor) -> Tensor:
    return sum((y.square().sum() for y in tree_leaves(m(x))), x.new_zeros(()))


def _sample(m: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(m, parameters, (x,))[0].square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jvp": lambda m, x: jvp(lambda x: m(x)[0], (x,), (x.cos(),)),
    "jacrev": lambda m, x: jacrev(lambda x: m(x)[0])(x),
    "jacfwd": lambda m, x: jacfwd(lambda x: m(x)[0])(x),
    "hessian": lambda m, x: hessian(lambda x: _squares(m, x))(x),
    "double backward": lambda m, x: grad(lambda x: grad(lambda x: _squares(m, x))(x).sin().sum())(
        x
    ),
    "vmap": lambda m, x: vmap(lambda x: m(x)[0])(torch.stack([x, x.cos()])),
    "per-sample gradients": lambda m, x: vmap(
        grad(lambda p, x: _sample(m, p, x)), in_dims=(None, 1)
    )({n: p.detach() for n, p in m.named_parameters()}, x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("mode", LAYERS)
def test_transforms(mode: str, name: str, exact: None) -> None:
    torch.manual_seed(0)
    m, exact_module = pair(LAYERS[mode][0](3, 33, bidirectional=True))
    x = torch.randn(4, 2, 3)
    with fastrnn.use_backend("triton"):
        found = TRANSFORMS[name](m, x.to(DEVICE))
    with fastrnn.use_backend("reference"):
        assert_close(found, TRANSFORMS[name](exact_module, x.double()))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("mode", LAYERS)
def test_autocast(mode: str, dtype: torch.dtype) -> None:
    """The error of all results is at most twice the error of torch.nn in that dtype.

    Under autocast torch runs cuDNN in float16, whichever dtype is selected.
    """
    m, exact_module = stacks(mode)
    theirs = LAYERS[mode][1](20, 64, num_layers=2, bidirectional=True).to(DEVICE, dtype)
    theirs.load_state_dict(m.state_dict())
    x = torch.randn(6, 5, 20)
    expected = tree_leaves(exactly(exact_module, x))

    def error(found: Any) -> float:
        pairs = zip(tree_leaves(found), expected, strict=True)
        return sum(((a.cpu().double() - e).norm() / e.norm()).item() for a, e in pairs)

    with fastrnn.use_backend("triton"), torch.autocast(DEVICE, dtype):
        outputs, gradients = trained(m, x.to(DEVICE))
    assert {y.dtype for y in outputs} == {dtype}
    assert {g.dtype for g in gradients} == {F32}
    assert error((outputs, gradients)) <= 2 * error(trained(theirs, x.to(DEVICE, dtype)))


@pytest.mark.parametrize("backend", ("triton", None))
@pytest.mark.parametrize("where", ("list", "cpu", DEVICE))
@pytest.mark.parametrize("mode", LAYERS)
def test_lengths(mode: str, where: str, backend: str | None, exact: None) -> None:
    m, exact_module = stacks(mode)
    x, lengths = torch.randn(7, 6, 20), [3, 0, 7, 1, 0, 5]
    n = lengths if where == "list" else torch.tensor(lengths, device=where)
    with fastrnn.use_backend(backend):
        found = trained(m, x.to(DEVICE), lengths=n)
    assert_close(found, exactly(exact_module, x, lengths=lengths))


@pytest.mark.parametrize("mode", STEPS)
def test_cells(mode: str, exact: None) -> None:
    torch.manual_seed(0)
    m, exact_module = pair(STEPS[mode][0](20, 64))
    x = torch.randn(5, 20)
    for backend in ("triton", "reference"):
        with fastrnn.use_backend(backend):
            found = trained(m, x.to(DEVICE))
        assert_close(found, exactly(exact_module, x))


def test_checkpoints_and_copies(monkeypatch: pytest.MonkeyPatch, exact: None) -> None:
    # A checkpoint is recomputed in an autograd thread, where use_backend is not in force.
    monkeypatch.setattr(fastrnn.dispatch, "_environment", "triton")
    m, exact_module = stacks("LSTM")
    x = torch.randn(6, 5, 20)
    expected = exactly(exact_module, x)
    with torch.device("meta"):
        other = fastrnn.LSTM(20, 64, num_layers=2, bidirectional=True)
    other = other.to_empty(device=DEVICE)
    other.load_state_dict(m.state_dict())
    assert_close(trained(other, x.to(DEVICE)), expected)
    again = trained(m, x.to(DEVICE), lambda x: checkpoint(m, x, use_reentrant=False))
    assert_close(again, expected)
    with torch.autograd.graph.save_on_cpu():
        assert_close(trained(m, x.to(DEVICE)), expected)


def test_convert_a_model_on_the_gpu(exact: None) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(20, 64, 2)}).to(DEVICE)
    parameters = dict(model.named_parameters())
    x = torch.randn(6, 5, 20, device=DEVICE)
    expected = trained(model["rnn"], x)
    fastrnn.convert(model)
    assert type(model["rnn"]) is fastrnn.LSTM
    assert all(parameters[n] is p for n, p in model.named_parameters())
    with fastrnn.use_backend("triton"):
        found = trained(model["rnn"], x)
    for a, e in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_tensors_on_other_devices_are_refused() -> None:
    m, x = fastrnn.GRU(20, 64, device=DEVICE), torch.randn(6, 5, 20)
    with pytest.raises(RuntimeError, match=r"cpu.*cuda|cuda.*cpu"):
        m(x)
    with pytest.raises(RuntimeError, match=r"cpu.*cuda|cuda.*cpu"):
        m(x.to(DEVICE), torch.zeros(1, 5, 64))
