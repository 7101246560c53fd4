"""The gradient at each step, against a loop over a cell that keeps every state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import LAYERS, STEPS, layered
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import diagnostics

pytestmark = pytest.mark.contract

MODES = list(LAYERS)


def by_a_loop(m: Any, mode: str, x: Tensor, hx: list[Tensor]) -> tuple[list[list[Tensor]], Tensor]:
    """The states of each layer and direction after each step, and the loss, from torch's cells."""
    D, T = 1 + m.bidirectional, len(x)
    kept: list[list[Tensor]] = []
    last = []
    for layer in range(m.num_layers):
        outs = []
        for d in range(D):
            cell = STEPS[mode][1](x.shape[2], m.hidden_size, dtype=x.dtype)
            suffix = f"_l{layer}" + "_reverse" * d
            with torch.no_grad():
                for name, p in cell.named_parameters():
                    p.copy_(getattr(m, name + suffix))
            state: Any = tuple(s[layer * D + d].detach() for s in hx)
            state = state if len(state) > 1 else state[0]
            states: list[Any] = [None] * T
            for t in range(T) if d == 0 else reversed(range(T)):
                state = tree_map(lambda s: 1 * s, cell(x[t], state))  # c apart from h's path
                for s in tree_leaves(state):
                    s.requires_grad_().retain_grad()
                states[t] = state
            kept.append(states)
            outs.append(torch.stack([tree_leaves(s)[0] for s in states]))
            last.append(tree_leaves(state)[0])
        x = torch.cat(outs, 2)
    return kept, sum(h.sum() for h in last[-D:])  # type: ignore[return-value]


@pytest.mark.parametrize("backend", layered())
@pytest.mark.parametrize("mode", MODES)
def test_every_steps_gradient(mode: str, backend: str) -> None:
    m = LAYERS[mode][0](3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    hx = [torch.randn(4, 2, 5, dtype=torch.float64) for _ in m._cell.states]
    kept, loss = by_a_loop(m, mode, x, hx)
    loss.backward()
    with fastrnn.use_backend(backend):
        flow = diagnostics.gradient_flow(m, x, tuple(hx) if len(hx) > 1 else hx[0])
    assert list(flow.gradient) == list(m._cell.states)
    for k, found in enumerate(flow.gradient.values()):
        grads = [[tree_leaves(s)[k].grad for s in states] for states in kept]
        expected = [[0.0 if g is None else g.norm() for g in each] for each in grads]
        torch.testing.assert_close(found.flatten(0, 1), torch.tensor(expected, dtype=torch.float64))
    assert all(p.grad is None for p in m.parameters())


def test_a_projected_layer_and_the_users_loss() -> None:
    """Against a finite difference, through the h that comes before."""
    torch.manual_seed(0)
    m = fastrnn.LSTM(3, 5, proj_size=2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 6, 3, dtype=torch.float64)

    def loss(output: Tensor, final: tuple[Tensor, ...]) -> Tensor:
        return output.square().sum() + final[1].sin().sum()

    flow = diagnostics.gradient_flow(m, x, loss=loss)
    for t in range(5):
        output, state = m(x[:, : t + 1])
        state = tuple(s.detach().requires_grad_() for s in state)
        rest, final = m(x[:, t + 1 :], state)
        before = torch.cat([output[:, :t].detach(), state[0].transpose(0, 1)], 1)
        grads = torch.autograd.grad(loss(torch.cat([before, rest], 1), final), state)
        for found, g in zip(flow.gradient.values(), grads, strict=True):
            torch.testing.assert_close(found[0, 0, t], g.norm())


def test_saturation() -> None:
    x, large = torch.randn(6, 4, 3), 50.0
    lstm = fastrnn.LSTM(3, 8)
    assert all(s.max() == 0 for s in diagnostics.gradient_flow(lstm, 0 * x).saturation.values())
    torch.nn.init.constant_(lstm.bias_ih_l0, large)
    shares = diagnostics.gradient_flow(lstm, x).saturation
    assert {n: s.min().item() for n, s in shares.items()} == dict.fromkeys("ifgo", 1.0)
    gru = fastrnn.init.forget_bias_(fastrnn.GRU(3, 8), large)
    shares = diagnostics.gradient_flow(gru, 0 * x).saturation
    assert shares["z"].min() == 1 and shares["r"].max() == 0 == shares["n"].max()
    relu = fastrnn.RNN(3, 8, nonlinearity="relu")
    torch.nn.init.constant_(relu.bias_ih_l0, -large)
    assert diagnostics.gradient_flow(relu, x).saturation["h"].min() == 1


def test_one_sequence_and_a_plot() -> None:
    flow = diagnostics.gradient_flow(fastrnn.GRU(3, 4, 2), torch.randn(9, 3))
    assert flow.gradient["h"].shape == (2, 1, 9) == flow.saturation["z"].shape
    pytest.importorskip("matplotlib").use("agg")
    figure = flow.plot()
    assert [len(ax.lines) for ax in figure.axes] == [2, 6]
    assert all(len(line.get_xdata()) == 9 for ax in figure.axes for line in ax.lines)


@pytest.mark.parametrize(
    "module,input,error,message",
    [
        (torch.nn.LSTM(3, 4), torch.randn(5, 2, 3), TypeError, "convert makes one"),
        (fastrnn.LSTM(3, 4), [1.0], TypeError, "expected a Tensor, got list"),
        (fastrnn.LSTM(3, 4), torch.randn(5, 2, 4), RuntimeError, "Expected 3, got 4"),
    ],
)
def test_bad_input(module: Any, input: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnostics.gradient_flow(module, input)
