"""Windows of a long sequence: the same values, and the gradients of each window alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastrnn

pytestmark = pytest.mark.contract


def setting(name: str, batch_first: bool) -> tuple[Any, Tensor, Tensor]:
    m = getattr(fastrnn, name)(3, 4, batch_first=batch_first, dtype=torch.float64)
    shape = (2, 10) if batch_first else (10, 2)
    x = torch.randn(*shape, 3, dtype=torch.float64)
    return m, x, torch.randn(*shape, 4, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("window", [1, 3, 10, 99])
def test_windows(name: str, batch_first: bool, window: int) -> None:
    """The gradients of a sum over time, against a loop that detaches the state by hand."""
    m, x, y = setting(name, batch_first)
    dim = int(batch_first)

    def step(x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = m(x, state)
        return (output - y).square().sum(), state

    loss = 0.0
    for part, state in fastrnn.tbptt(step, (x, y), window, dim=dim):
        part.backward()
        loss += part.item()
        assert all(not s.requires_grad for s in (state if name == "LSTM" else [state]))
    found = [p.grad.clone() for p in m.parameters()]
    whole, last = step(x, y, None)
    torch.testing.assert_close(loss, whole.item())
    torch.testing.assert_close(state, tree_map(Tensor.detach, last))

    m.zero_grad()
    given: Any = None
    for k in range(0, 10, window):
        part, given = step(*(t.narrow(dim, k, min(window, 10 - k)) for t in (x, y)), given)
        part.backward()
        given = tree_map(Tensor.detach, given)
    for p, g in zip(m.parameters(), found, strict=True):
        assert torch.equal(p.grad, g)
    full = torch.autograd.grad(whole, list(m.parameters()))
    same = [torch.allclose(a, b, rtol=1e-12) for a, b in zip(full, found, strict=True)]
    assert all(same) if window >= 10 else not all(same)


def test_one_sequence_and_a_first_state() -> None:
    m, x, _ = setting("GRU", False)
    h = torch.randn(1, 2, 4, dtype=torch.float64)
    outputs = [y for y, _ in fastrnn.tbptt(m, x, 4, h)]
    assert [len(y) for y in outputs] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(outputs), m(x, h)[0])


def test_wrong_arguments() -> None:
    m, x, y = setting("GRU", False)
    with pytest.raises(ValueError, match="a window of 1 step or more, got 0"):
        fastrnn.tbptt(m, x, 0)
    with pytest.raises(ValueError, match=r"of one length, got \[7, 10\]"):
        fastrnn.tbptt(m, (x, y[:7]), 3)
    with pytest.raises(ValueError, match=r"of one length, got \[\]"):
        fastrnn.tbptt(m, (), 3)
    with pytest.raises(TypeError, match="sequences of tensors, got int"):
        fastrnn.tbptt(m, [1, 2], 3)
    with pytest.raises(TypeError, match="window to be an int, got float"):
        fastrnn.tbptt(m, x, 2.5)
    with pytest.raises(TypeError, match="window to be an int, got bool"):
        fastrnn.tbptt(m, x, True)
    with pytest.raises(ValueError, match="with a dimension None"):
        fastrnn.tbptt(m, x, 2, dim=None)
    with pytest.raises(ValueError, match=r"with a dimension 3, got \[10, 2, 3\]"):
        fastrnn.tbptt(m, x, 3, dim=3)
