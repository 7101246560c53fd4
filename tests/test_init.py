"""The property of each initialisation, on layers and cells of fastrnn and of torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import init

LIBRARIES = [fastrnn, nn]


def modules(name: str, **options: Any) -> list[nn.Module]:
    """A layer of two directions and two layers, and a cell, of both libraries."""
    return [
        *(
            getattr(lib, name)(3, 8, num_layers=2, bidirectional=True, **options)
            for lib in LIBRARIES
        ),
        *(getattr(lib, f"{name}Cell")(3, 8, **options) for lib in LIBRARIES),
    ]


def after_5_steps(m: nn.Module, state: Any) -> Any:
    if "Cell" not in type(m).__name__:
        return m(torch.randn(5, 2, 3), state)[1]
    for x in torch.randn(5, 2, 3):
        state = m(x, state)
    return state


def initial(m: nn.Module) -> Tensor:
    return torch.rand(2, 8) if "Cell" in type(m).__name__ else torch.rand(4, 2, 8)


def test_identity_carries_the_state() -> None:
    for m in modules("RNN", nonlinearity="relu"):
        assert init.identity_(m) is m
        with torch.no_grad():
            for name, p in m.named_parameters():
                if name.startswith("weight_ih"):
                    p.zero_()
        h = initial(m)
        torch.testing.assert_close(after_5_steps(m, h), h)
        torch.testing.assert_close(after_5_steps(init.identity_(m, 0.5), h), h / 32)


@pytest.mark.parametrize("name,gates", [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_orthogonal_blocks(name: str, gates: int) -> None:
    projected = [fastrnn.LSTM(3, 8, proj_size=5)] if name == "LSTM" else []
    for m in (*modules(name), *projected):
        before = {n: p.clone() for n, p in m.named_parameters()}
        assert init.orthogonal_(m, 2.0) is m
        for n, p in m.named_parameters():
            if not n.startswith("weight_hh"):
                assert torch.equal(p, before[n])
                continue
            for block in p.detach().chunk(gates):
                product = block.T @ block
                torch.testing.assert_close(product, 4 * torch.eye(len(product)))


def test_forget_bias_keeps_the_state() -> None:
    kept = torch.sigmoid(torch.tensor(3.0)) ** 5
    for name in ("LSTM", "GRU"):
        for m in modules(name):
            for p in m.parameters():
                nn.init.zeros_(p)
            assert init.forget_bias_(m, 3.0) is m
            s = initial(m)
            state = (torch.zeros_like(s), s) if name == "LSTM" else s
            after = after_5_steps(m, state)
            torch.testing.assert_close(after[1] if name == "LSTM" else after, kept * s)


def test_chrono_spreads_the_times() -> None:
    torch.manual_seed(0)
    for library in LIBRARIES:
        for name, gates, keeps in (("LSTM", 4, 1), ("GRU", 3, 1)):
            m = init.chrono_(getattr(library, name)(3, 2000), 100)
            bias = (m.bias_ih_l0 + m.bias_hh_l0).detach().chunk(gates)
            gate = bias[keeps].sigmoid()
            times = 1 / (1 - gate)  # in which the state falls to 1/e, and a little more
            assert 2 <= times.min() < 4 and 98 < times.max() <= 100.01
            assert abs(times.mean() - 51) < 3
            if name == "LSTM":
                torch.testing.assert_close(bias[0].sigmoid(), 1 - gate)


ODD_CELL = nn.RNNCell(3, 4, nonlinearity="sigmoid")  # torch refuses it at a call


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: init.identity_(fastrnn.RNN(3, 4)), ValueError, "relu.*got RNN_TANH"),
        (lambda: init.identity_(fastrnn.LSTM(3, 4)), ValueError, "relu.*got LSTM"),
        (lambda: init.orthogonal_(nn.Linear(3, 4)), TypeError, "got Linear"),
        (lambda: init.orthogonal_(ODD_CELL), ValueError, "tanh or relu, got 'sigmoid'"),
        (lambda: init.forget_bias_(fastrnn.RNN(3, 4)), ValueError, "got RNN_TANH"),
        (lambda: init.forget_bias_(fastrnn.GRU(3, 4, bias=False)), ValueError, "bias=False"),
        (lambda: init.chrono_(fastrnn.LSTMCell(3, 4), 2), ValueError, "3 steps or more, got 2"),
        (lambda: init.chrono_(fastrnn.RNNCell(3, 4), 9), ValueError, "got RNN_TANH"),
    ],
)
def test_wrong_modules(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
