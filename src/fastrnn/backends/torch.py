"""torch's own recurrent operators, including cuDNN and MIOpen, where no fastrnn kernel runs.

Unlike the other backends it runs whole stacks, and torch differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastrnn.backends import StackSizes, one_thread_in_a_child
from fastrnn.backends.products import in_own_dtype
from fastrnn.cells import Cell, State
from fastrnn.layer import Layer

__all__ = ["describe", "empty_cache", "kind", "missing", "refuses", "run_stack", "run_step"]

kind: Literal["stack"] = "stack"

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
    sizes: StackSizes | None = None,
    automatic: bool = False,
) -> str | None:
    if cell.mode not in _RNN:
        return f"torch has no operator for the cell {cell.mode}"
    if not dtype.is_floating_point:
        return f"expected a real floating-point dtype, got {dtype}"
    if sizes is not None and sizes.compiled:
        return "compilers and torch.export decompose it into single steps"
    return None


def empty_cache() -> None:
    pass


def describe() -> str:
    return "torch's own operator"


@in_own_dtype
def run_stack(
    layers: Sequence[Layer], x: Tensor, hx: State | None, dropout: float, training: bool
) -> tuple[Tensor, State]:
    one_thread_in_a_child()
    first = layers[0]
    flat = [t for layer in layers for w in layer.weights for t in w if t is not None]
    if hx is None:
        leading = (len(layers) * first.D, first.rows.B)
        hx = first.cell.zero_state(x, leading, first.H, first.P)
    states = hx if len(hx) > 1 else hx[0]
    bias = first.weights[0].bias_ih is not None
    options = (bias, len(layers), dropout, training, first.D == 2)
    operator, batch_sizes = _RNN[first.cell.mode], first.rows.batch_sizes
    if batch_sizes is None:
        output, *final = operator(x, states, flat, *options, False)
    else:
        output, *final = operator(x, batch_sizes, states, flat, *options)
    return output, tuple(final)


@in_own_dtype
def run_step(layer: Layer, x: Tensor) -> State:
    one_thread_in_a_child()
    (w,) = layer.weights
    state = layer.state or layer.zero_state(x)
    states = state if len(state) > 1 else state[0]
    result = _STEP[layer.cell.mode](x, states, w.ih, w.hh, w.bias_ih, w.bias_hh)
    return (result,) if isinstance(result, Tensor) else tuple(result)
