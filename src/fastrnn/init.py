r"""Initialisations for recurrent layers.

Each takes a layer or a cell of fastrnn or torch.nn, changes its parameters in place and returns it.
W_ih is unchanged; use :mod:`torch.nn.init` for it.

>>> import torch, fastrnn
>>> rnn = fastrnn.init.identity_(fastrnn.RNN(8, 16, nonlinearity="relu"))
>>> lstm = fastrnn.init.forget_bias_(fastrnn.init.orthogonal_(fastrnn.LSTM(8, 16)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastrnn.cells import CELLS

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_"]

Module = TypeVar("Module", bound=nn.Module)


def identity_(module: Module, scale: float = 1.0) -> Module:
    """Set ``W_hh = scale * I`` and zero biases, which carry the state through time unchanged.

    For an :class:`~fastrnn.RNN` with ``nonlinearity="relu"``: an IRNN.

    Raises:
        TypeError: the module is not a recurrent layer or cell.
        ValueError: it is not an RNN with relu.

    Source: Le, Jaitly and Hinton 2015, "A Simple Way to Initialize Recurrent Networks of Rectified
    Linear Units".
    """
    if (mode := _mode(module)) != "RNN_RELU":
        raise ValueError(f"expected an RNN with nonlinearity 'relu', got {mode}")
    with torch.no_grad():
        for direction in _directions(module):
            direction.w_hh.copy_(scale * torch.eye(len(direction.w_hh)))
            for bias in direction.biases:
                bias.zero_()
    return module


def orthogonal_(module: Module, gain: float = 1.0) -> Module:
    """Set each gate's block of W_hh, ``[H, H]`` or ``[H, P]``, to ``gain`` times an orthogonal one.

    Raises:
        TypeError: the module is not a recurrent layer or cell.
        ValueError: it is an RNNCell whose nonlinearity torch does not have.

    Source: Saxe, McClelland and Ganguli 2014, "Exact solutions to the nonlinear dynamics of
    learning in deep linear neural networks".
    """
    gates = len(CELLS[_mode(module)].gates)
    with torch.no_grad():
        for direction in _directions(module):
            for block in direction.w_hh.chunk(gates):
                block.copy_(nn.init.orthogonal_(torch.empty_like(block), gain))
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Set the bias of the gate that keeps the state to ``value``: the LSTM's f, the GRU's z.

    Only the sum of both biases matters. ``bias_ih`` becomes ``value`` and ``bias_hh`` zero there.

    Raises:
        TypeError: the module is not a recurrent layer or cell.
        ValueError: it has no such gate, or no biases.

    Source: Gers, Schmidhuber and Cummins 2000, "Learning to Forget"; Jozefowicz, Zaremba and
    Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures".
    """
    gate = _keep_gate(module)
    with torch.no_grad():
        for direction in _directions(module):
            direction.set_bias(gate, torch.as_tensor(value))
    return module


def chrono_(module: Module, longest: int) -> Module:
    r"""Spread the times for which the gates remember evenly up to ``longest`` steps.

    ``longest`` is the longest dependency in the data.

    The bias of the gate that keeps the state is :math:`\log u` with u uniform in
    ``[1, longest - 1]``; that of the LSTM's input gate is its negative.

    Raises:
        TypeError: the module is not a recurrent layer or cell.
        ValueError: it has no such gate, or no biases, or ``longest`` is below 3.

    Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?".
    """
    if longest < 3:
        raise ValueError(f"expected a longest dependency of 3 steps or more, got {longest}")
    keep_gate, input_gate = _keep_gate(module), CELLS[_mode(module)].input_gate
    with torch.no_grad():
        for direction in _directions(module):
            bias = direction.biases[0]
            times = torch.empty(len(bias) // len(direction.gates)).uniform_(1, longest - 1).log()
            direction.set_bias(keep_gate, times)
            if input_gate is not None:
                direction.set_bias(input_gate, -times)
    return module


class _Direction:
    """The recurrent parameters of one layer and direction."""

    def __init__(self, gates: Sequence[str], w_hh: Tensor, biases: Sequence[Tensor]) -> None:
        self.gates, self.w_hh, self.biases = gates, w_hh, biases

    def set_bias(self, gate: str, values: Tensor) -> None:
        ih, hh = (bias.chunk(len(self.gates))[self.gates.index(gate)] for bias in self.biases)
        ih.copy_(values)
        hh.zero_()


def _mode(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return str(module.mode)
    if isinstance(module, nn.RNNCell):
        if (mode := f"RNN_{module.nonlinearity.upper()}") not in CELLS:
            raise ValueError(f"expected an RNNCell with tanh or relu, got {module.nonlinearity!r}")
        return mode
    if isinstance(module, nn.LSTMCell | nn.GRUCell):
        return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"
    raise TypeError(f"expected a recurrent layer or cell, got {type(module).__name__}")


def _keep_gate(module: nn.Module) -> str:
    """The gate that keeps the state, in a module with biases."""
    mode = _mode(module)
    gate = CELLS[mode].keep_gate
    if gate is None:
        raise ValueError(f"expected a cell with a gate that keeps the state, got {mode}")
    if not module.bias:
        raise ValueError("expected a module with biases, got bias=False")
    return gate


def _directions(module: nn.Module) -> Iterator[_Direction]:
    gates = CELLS[_mode(module)].gates
    for name in dict(module.named_parameters()):
        if name.startswith("weight_hh"):
            suffix = name.removeprefix("weight_hh")
            kinds = ("bias_ih", "bias_hh") if module.bias else ()
            biases = [getattr(module, kind + suffix) for kind in kinds]
            yield _Direction(gates, getattr(module, name), biases)
