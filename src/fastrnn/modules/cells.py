"""The cells: :class:`RNNCell`, :class:`LSTMCell` and :class:`GRUCell`, and their base."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fastrnn import functional
from fastrnn.capture import fx_node, no_script_error
from fastrnn.cells import CELLS, Cell, State
from fastrnn.layer import Weights
from fastrnn.modules.arguments import as_state, rank, rnn_mode, weights_of

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "RNNCellBase"]


class RNNCellBase(nn.RNNCellBase):
    """One step of one cell; base of :class:`RNNCell`, :class:`LSTMCell` and :class:`GRUCell`.

    Inputs: ``input, hx``
        ``input`` is ``[B, I]`` or ``[I]``; ``hx`` the state ``[B, H]`` or ``[H]`` (a tuple of two
        for the LSTM), zero by default.

    Outputs: the new state, shaped like ``hx``.

    Raises:
        ValueError: rank.
        RuntimeError: sizes and dtypes.
        TypeError, fastrnn.BackendError: as the layers.
    """

    @property
    def _cell(self) -> Cell:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_script_error()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step; see the class for shapes and errors."""
        if isinstance(input, fx.Proxy):
            return fx_node(self, type(self).forward is RNNCellBase.forward, input, hx)
        cell = self._cell
        weights = self._weights()
        dim = self._check_dimensions(input)
        batched = dim == 2
        state = None if hx is None else self._check_rank(cell, hx, dim)
        self._check_input(input, weights.ih)
        if not batched:
            input = input.unsqueeze(0)
        new = functional.step(cell, input, state, weights)
        if not batched:
            new = tuple(s.squeeze(0) for s in new)
        return new if len(new) > 1 else new[0]

    def _weights(self) -> Weights:
        return weights_of(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    @property
    def _name(self) -> str:
        return f"{self._cell.mode.split('_')[0]}Cell"

    def _check_rank(self, cell: Cell, hx: Any, dim: int) -> State:
        """``hx`` as one tensor ``[B, H]`` per state."""
        state = as_state(cell, hx)
        if any(s.dim() != dim for s in state):
            names = "hidden" if len(state) == 1 else "hx[0] and hx[1]"
            got = ", ".join(f"{s.dim()}D" for s in state)
            if any(s.dim() not in (1, 2) for s in state):
                raise ValueError(
                    f"{self._name}: Expected {names} to be 1D or 2D, got {got} instead"
                )
            raise RuntimeError(
                f"{self._name}: Expected {names} to be {dim}D like the input, got {got} instead"
            )
        return state if dim == 2 else tuple(s.unsqueeze(0) for s in state)

    def _check_dimensions(self, input: Tensor) -> int:
        if (dim := rank(input, "a Tensor")) not in (1, 2):
            raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {dim}D instead")
        return dim

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        if input.dtype is not weight.dtype and functional.autocast_dtype(input) is None:
            raise RuntimeError(
                f"expected input of the weights' dtype {weight.dtype}, got {input.dtype}"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]}, "
                f"expected {self.input_size}"
            )


class RNNCell(RNNCellBase, nn.RNNCell):
    """One step of an Elman network, as :class:`torch.nn.RNNCell`; the formula is :class:`RNN`'s.

    >>> import torch, fastrnn
    >>> fastrnn.RNNCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    @property
    def _cell(self) -> Cell:
        try:
            return CELLS[rnn_mode(self.nonlinearity)]
        except ValueError as error:  # torch raises this type at a call
            raise RuntimeError(*error.args) from None


class LSTMCell(RNNCellBase, nn.LSTMCell):
    """One step of an LSTM, as :class:`torch.nn.LSTMCell`; the formula is :class:`LSTM`'s.

    >>> import torch, fastrnn
    >>> h, c = fastrnn.LSTMCell(10, 20)(torch.randn(3, 10))
    >>> h.shape, c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    @property
    def _cell(self) -> Cell:
        return CELLS["LSTM"]


class GRUCell(RNNCellBase, nn.GRUCell):
    """One step of a GRU, as :class:`torch.nn.GRUCell`; the formula is :class:`GRU`'s.

    >>> import torch, fastrnn
    >>> fastrnn.GRUCell(10, 20)(torch.randn(3, 10)).shape
    torch.Size([3, 20])
    """

    @property
    def _cell(self) -> Cell:
        return CELLS["GRU"]
