"""The arguments of a module: what has the wrong type or rank is refused in torch's words."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, cast

from torch import Tensor, nn

from fastrnn.cells import Cell, State
from fastrnn.layer import Weights

__all__ = ["as_state", "permuted", "rank", "rnn_mode", "weights_of"]


def weights_of(module: nn.Module, names: Sequence[str]) -> Weights:
    """The attributes of these names; parameters skip the cost of ``nn.Module.__getattr__``."""
    try:
        return Weights(*itemgetter(*names)(module._parameters))
    except KeyError:
        return Weights(*[getattr(module, name) for name in names])


def rank(input: Any, expected: str) -> int:
    """The number of dimensions of a tensor; a TypeError for anything else."""
    try:
        return cast(int, input.dim())
    except AttributeError:
        raise TypeError(f"expected {expected}, got {type(input).__name__}") from None


def as_state(cell: Cell, hx: Any) -> State:
    """``hx`` as a tuple of one tensor per state."""
    if len(cell.states) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"expected hx to be a Tensor, got {type(hx).__name__}")
        return (hx,)
    if not isinstance(hx, (tuple, list)) or len(hx) != len(cell.states):
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(
            f"expected hx to be a tuple of {len(cell.states)} tensors "
            f"({', '.join(f'{s}_0' for s in cell.states)}), got {got}"
        )
    for s in hx:
        if not isinstance(s, Tensor):
            raise TypeError(f"expected hx to hold tensors, got {type(s).__name__}")
    return tuple(hx)


def permuted(state: State, permutation: Tensor | None) -> State:
    """The state with its sequences in another order."""
    if permutation is None:
        return state
    return tuple(s.index_select(1, permutation) for s in state)


def rnn_mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"RNN_{nonlinearity.upper()}"
