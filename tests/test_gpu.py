"""The Triton kernels on a GPU, with the plans of the table: `make test-gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from cases import Case, assert_equal, assert_near_in_norm, data, evaluate, ours

import fastrnn
from fastrnn.kernels.triton import plans

if os.environ.get("FASTRNN_TEST_GPU") != "1" or not torch.cuda.is_available():
    pytest.skip("`make test-gpu` on a machine with a GPU runs these", allow_module_level=True)

DEVICE = "cuda"
F32, F64 = torch.float32, torch.float64
# How far every result may be from the reference in float64, in the norm.
MOST = {
    ("ieee", F32): 1e-5,
    ("tf32", F32): 5e-3,
    ("ieee", torch.float16): 5e-3,
    ("ieee", torch.bfloat16): 2e-2,
}
HIDDEN = (1, 33, 64, 100, 128, 200, 256, 512, 700, 1024, 2048)


@pytest.fixture(params=MOST, ids=lambda key: f"{key[0]}-{key[1]}")
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, float]]:
    """A dtype and how far results may be off, with cuDNN's RNNs set to compute so."""
    products, dtype = request.param
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    rnn = rnn if hasattr(rnn, "fp32_precision") else None  # since torch 2.9
    before = rnn.fp32_precision if rnn else torch.backends.cudnn.allow_tf32
    matmul = torch.backends.cuda.matmul.allow_tf32
    if rnn:
        rnn.fp32_precision = products
    else:
        torch.backends.cudnn.allow_tf32 = products == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
    yield dtype, MOST[request.param]
    torch.backends.cuda.matmul.allow_tf32 = matmul
    if rnn:
        rnn.fp32_precision = before
    else:
        torch.backends.cudnn.allow_tf32 = before


def judged(case: Case, dtype: torch.dtype, most: float) -> None:
    d, module = data(case, dtype, seed=3), ours(case, dtype)
    found = evaluate(module.to(DEVICE), case, d.to(DEVICE), "triton")
    actual = {name: result.cpu() for name, result in found.items()}
    expected = evaluate(module.cpu().double(), case, d.to(F64), "reference")
    assert_near_in_norm(actual, expected, most)


@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("mode", ("RNN_TANH", "GRU", "LSTM"))
def test_every_row_of_the_table(mode: str, H: int, kind: tuple[torch.dtype, float]) -> None:
    if H == 1 and kind[1] > MOST["ieee", F32]:
        pytest.skip("a gradient of one element is a sum that may cancel")
    judged(Case(mode, 2, 1, True, "dense", False, True, 4, 19, 48, H), *kind)


@pytest.mark.parametrize("H", (33, 256, 2048))
@pytest.mark.parametrize("layout,projected", [("unsorted", True), ("packed", False)])
def test_packed_and_projected(
    layout: str, projected: bool, H: int, kind: tuple[torch.dtype, float]
) -> None:
    judged(Case("LSTM", 2, 2, True, layout, projected, True, 5, 37, 17, H), *kind)


@pytest.mark.parametrize("kind", [("ieee", F32)], indirect=True, ids=str)
@pytest.mark.parametrize("H", (64, 512))
def test_relu_without_bias(H: int, kind: tuple[torch.dtype, float]) -> None:
    """In TF32 the sign of a pre-activation near zero may be another."""
    judged(Case("RNN_RELU", 1, 2, False, "batch_first", False, False, 5, 20, 17, H), *kind)


@pytest.mark.parametrize("H", (128, 1024))
def test_more_groups_than_run_at_once(H: int) -> None:
    judged(Case("LSTM", 2, 1, True, "dense", False, True, 3, 16 * 150 + 3, 16, H), F32, 5e-3)


@pytest.mark.parametrize("H", (64, 256, 2048))
def test_backward_is_deterministic(H: int) -> None:
    case = Case("GRU", 2, 1, True, "unsorted", False, True, 20, 100, 32, H)
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
    backend = fastrnn.dispatch.load("triton")
    monkeypatch.setattr(backend, "_programs_at_once", lambda _: 1)
    test_capture_in_a_graph(256)


def test_nothing_waits_for_the_host() -> None:
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
    architecture = fastrnn.dispatch.load("triton")._architecture(torch.cuda.current_device())
    expected = "triton" if architecture in plans.LIMITS else "torch"
    assert f"{expected}" in str(chosen)
