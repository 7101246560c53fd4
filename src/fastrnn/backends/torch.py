"""torch's own recurrent operators, cuDNN's and MIOpen's among them, where no kernel of ours runs.

Unlike the other backends this one runs whole stacks, and torch differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import Sizes, one_thread_in_a_child
from fastrnn.backends.products import in_own_dtype
from fastrnn.cells import Cell, State, Weights

__all__ = ["CHECKS", "STACKS", "describe", "empty_cache", "missing", "refuses", "rnn", "step"]

CHECKS = False
STACKS = True

_RNN: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "LSTM": torch.lstm,
    "GRU": torch.gru,
}
_STEP: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "LSTM": torch.lstm_cell,
    "GRU": torch.gru_cell,
}


def missing() -> str | None:
    return None


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None = None,
    automatic: bool = False,
) -> str | None:
    if cell.mode not in _RNN:
        return f"torch has no operator for the cell {cell.mode}"
    if not dtype.is_floating_point:
        return f"expected a real floating-point dtype, got {dtype}"
    if sizes is not None and sizes.compiled:
        return "compilers and torch.export would take it apart, step by step"
    return None


def empty_cache() -> None:
    pass


def describe() -> str:
    return "torch's own operator"


@in_own_dtype
def rnn(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Sequence[Weights]],
    hx: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, State]:
    """As :func:`fastrnn.functional.rnn`."""
    one_thread_in_a_child()
    directions = list(chain(*weights))
    flat = [w for direction in directions for w in direction if w is not None]
    P = directions[0][1].shape[1]
    if hx is None:
        H = directions[0][1].shape[0] // len(cell.gates)
        hx = cell.zero_state(input, (len(directions), batch), H, P)
    states = hx if len(hx) > 1 else hx[0]
    options = (directions[0][2] is not None, len(weights), dropout, training, len(weights[0]) == 2)
    if batch_sizes is None:
        output, *final = _RNN[cell.mode](input, states, flat, *options, False)
    else:
        output, *final = _RNN[cell.mode](input, batch_sizes, states, flat, *options)
    return output, tuple(final)


@in_own_dtype
def step(cell: Cell, input: Tensor, hx: State | None, weights: Weights) -> State:
    """As :func:`fastrnn.functional.step`."""
    one_thread_in_a_child()
    w_ih, w_hh, b_ih, b_hh, _ = weights
    if hx is None:
        hx = cell.zero_state(input, input.shape[:1], w_hh.shape[1], w_hh.shape[1])
    result = _STEP[cell.mode](input, hx if len(hx) > 1 else hx[0], w_ih, w_hh, b_ih, b_hh)
    return (result,) if isinstance(result, Tensor) else tuple(result)
