"""The layers: :class:`RNN`, :class:`LSTM` and :class:`GRU`, and their base."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional
from fastrnn.capture import check_not_exporting, fx_node, is_jit_tracing, run_outside_graph
from fastrnn.cells import CELLS
from fastrnn.layer import Weights, check_batch_sizes
from fastrnn.modules.arguments import permuted, rank, rnn_mode, weights_of
from fastrnn.modules.compat import TorchLayer
from fastrnn.modules.lengths import checked_lengths, rnn_with_lengths

__all__ = ["GRU", "LSTM", "RNN", "RNNBase"]


class RNNBase(TorchLayer):
    """A stack of recurrent layers around one cell; base of :class:`RNN`, :class:`LSTM` and
    :class:`GRU`, which document the shapes.

    Args:
        mode: a key of :data:`fastrnn.cells.CELLS`. All others are torch.nn's.

    Raises:
        TypeError, ValueError: as torch.nn, for the same arguments and in the same order.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # torch's own constructor only knows its four modes.
        nn.Module.__init__(self)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._check_arguments(dropout)
        gate_size = len(self._cell.gates) * hidden_size
        h_size = proj_size or hidden_size
        directions = ("", "_reverse") if bidirectional else ("",)
        self._all_weights = []
        for layer in range(num_layers):
            size = h_size * len(directions) if layer else input_size
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gate_size, size),
                "weight_hh": (gate_size, h_size),
            }
            if bias:
                shapes |= {"bias_ih": (gate_size,), "bias_hh": (gate_size,)}
            if proj_size:
                shapes["weight_hr"] = (proj_size, hidden_size)
            for suffix in directions:
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name, parameter)
                self._all_weights.append(names)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self.reset_parameters()
        self._init_flat_weights()

    def _check_arguments(self, dropout: object) -> None:
        if (
            not isinstance(dropout, numbers.Number)
            or isinstance(dropout, bool)
            or not 0 <= self.dropout <= 1
        ):
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an "
                f"element being zeroed, got {dropout!r}"
            )
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={self.num_layers}",
                stacklevel=4,
            )
        for name in ("bias", "batch_first"):
            if not isinstance(getattr(self, name), bool):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name} should be of type bool, got: {got}")
        for name in ("input_size", "hidden_size"):
            size = getattr(self, name)
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        if self.num_layers <= 0:
            raise ValueError(f"num_layers must be greater than zero, got {self.num_layers}")
        if self.proj_size < 0:
            raise ValueError(
                "proj_size should be a positive integer or zero to disable projections, "
                f"got {self.proj_size}"
            )
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size has to be smaller than hidden_size {self.hidden_size}, "
                f"got {self.proj_size}"
            )
        if self.mode not in CELLS:
            raise ValueError(
                f"Unrecognized RNN mode: {self.mode}; expected one of {', '.join(CELLS)}"
            )

    def _weights(self) -> list[list[Weights]]:
        """``[layer][direction]``, as :func:`fastrnn.functional.rnn` takes them."""
        flat: list[Weights] = []
        for names in self._all_weights:
            w = weights_of(self, names)
            if self.proj_size and not self.bias:
                w = w._replace(bias_ih=None, hr=w.bias_ih)
            flat.append(w)
        if not self.bidirectional:
            return [[w] for w in flat]
        return [flat[k : k + 2] for k in range(0, len(flat), 2)]

    def _time_major(self, input: Tensor) -> Tensor:
        """An input of one sequence or of a padded batch, as ``[T, B, I]``."""
        if input.dim() == 2:
            return input.unsqueeze(1)
        return input.transpose(0, 1) if self.batch_first else input

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers; see the class for shapes and errors."""
        if isinstance(input, fx.Proxy):
            own = type(self).forward is RNNBase.forward
            return fx_node(self, own, input, hx, lengths)
        if lengths is not None:
            check_not_exporting()
            return run_outside_graph(RNNBase._forward_lengths, self, input, hx, lengths)
        if isinstance(input, PackedSequence):
            check_not_exporting()
            return run_outside_graph(RNNBase._forward_packed, self, input, hx)
        cell, weights = CELLS[self.mode], self._weights()
        dim = self._check_dimensions(input)
        state = None if hx is None else self._check_rank(cell, hx, dim)
        input = self._time_major(input)
        self._check_input(input, weights[0][0].ih)
        try:
            output, final = functional.rnn(
                cell, input, weights, state, dropout=self.dropout, training=self.training
            )
        except RuntimeError:
            # Lazy validation, as in functional._run_layer: repeated here for torch's own message.
            if state is not None:
                self._check_state(state, input.shape[1])
            raise
        if dim == 2:
            output = output.squeeze(1)
            final = tuple(s.squeeze(1) for s in final)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, final if len(final) > 1 else final[0]

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        cell, weights = self._cell, self._weights()
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if (dim := rank(data, "a PackedSequence of a Tensor")) != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {dim}")
        self._check_input(data, weights[0][0].ih)
        state = None
        if hx is not None:
            state = self._check_rank(cell, hx, 3)
            self._check_state(state, check_batch_sizes(batch_sizes, len(data)))
            state = permuted(state, sorted_indices)
        output, final = functional.rnn(
            cell,
            data,
            weights,
            state,
            batch_sizes=batch_sizes,
            dropout=self.dropout,
            training=self.training,
        )
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        final = permuted(final, unsorted_indices)
        return packed, final if len(final) > 1 else final[0]

    def _forward_lengths(self, input: Any, hx: Any, lengths: Any) -> tuple[Tensor, Any]:
        if is_jit_tracing():
            raise RuntimeError(
                "torch.jit.trace: expected an input without lengths, whose values the trace would "
                "keep as constants; use pack_padded_sequence instead"
            )
        if not isinstance(input, Tensor) or input.dim() != 3:
            got = f"{input.dim()}D" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"{self._name}: Expected a 3D tensor with lengths, got {got}")
        cell, weights = self._cell, self._weights()
        T, B = self._time_major(input).shape[:2]
        counts = checked_lengths(lengths, T, B)
        self._check_input(input, weights[0][0].ih)
        state = None
        if hx is not None:
            state = self._check_rank(cell, hx, 3)
            self._check_state(state, B)
        output, final = rnn_with_lengths(
            cell,
            input,
            weights,
            state,
            counts,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
        )
        return output, final if len(final) > 1 else final[0]


_Parameters = ParamSpec("_Parameters")


def _without_mode(
    base: Callable[Concatenate[Any, str, _Parameters], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _Parameters], None]]:
    """Tell type checkers that a constructor takes the parameters of its base after the mode."""
    return lambda own: own


class RNN(RNNBase):
    r"""Elman network, as :class:`torch.nn.RNN`.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or with ReLU in place of tanh.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: layers L, each reading the output of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[B, T, *]``, not ``[T, B, *]``; the state is not.
        dropout: probability of zeroing an element between layers, in training.
        bidirectional: also run the reverse direction, from the last step to the first; D = 2.
        device, dtype: of the parameters.

    Inputs: ``input, hx, lengths``
        ``input`` is ``[T, I]``, ``[T, B, I]``, or a :class:`PackedSequence`; ``hx`` the initial
        state ``[L*D, H]`` or ``[L*D, B, H]``, zero by default. ``lengths`` are B integers from 0 to
        T, a list or a tensor on any device: the number of steps of each sequence in ``[T, B, I]``.
        With them T may be 0, and the batch need not be sorted or packed.

    Outputs: ``output, h_n``
        The last layer's h at every step, ``[T, D*H]``, ``[T, B, D*H]`` or packed, and the final
        state, shaped like ``hx``. With ``lengths`` the output is zero after the end of a sequence,
        and its final state is that of its last step, or the initial one if it has no step.

    Raises:
        ValueError: rank or dtype of the input, or the number or range of ``lengths``.
        RuntimeError: sizes, T = 0 without ``lengths``, the rank or size of ``hx``.
        TypeError: ``hx`` is not a tensor (LSTM: not a pair of tensors), or ``lengths`` are not
            integers.
        fastrnn.BackendError: a backend was selected by name and cannot run this.

    >>> import torch, fastrnn
    >>> rnn = fastrnn.RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    if TYPE_CHECKING:  # like torch's, the constructor takes any arguments and checks them itself

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Any = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    else:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _refuse_projection(kwargs)
            if len(args) > 3:
                self.nonlinearity = args[3]
                args = args[:3] + args[4:]
            else:
                self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
            super().__init__(rnn_mode(self.nonlinearity), *args, **kwargs)


class LSTM(RNNBase):
    r"""Long short-term memory, as :class:`torch.nn.LSTM`.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t c_{t-1} + i_t g_t \\
        h_t &= o_t \tanh(c_t)

    With ``proj_size`` P > 0 the state is :math:`h_t = W_{hr} (o_t \tanh(c_t))`, of P features.

    Args: as :class:`RNN` without ``nonlinearity``, and
        proj_size: features of a projected h, below hidden_size; 0 for no projection.

    Inputs: ``input, (h_0, c_0)``
        As :class:`RNN`; ``h_0`` is ``[L*D, B, P]`` (P = H without projection) and ``c_0``
        ``[L*D, B, H]``, or both without B.

    Outputs: ``output, (h_n, c_n)``

    Raises: as :class:`RNN`.

    >>> import torch, fastrnn
    >>> lstm = fastrnn.LSTM(10, 20, batch_first=True)
    >>> output, (h_n, c_n) = lstm(torch.randn(3, 5, 10))
    >>> output.shape, c_n.shape
    (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    @_without_mode(RNNBase.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(RNNBase):
    r"""Gated recurrent unit, as :class:`torch.nn.GRU`.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) n_t + z_t h_{t-1}

    Args, inputs, outputs and errors: as :class:`RNN` without ``nonlinearity``.

    >>> import torch, fastrnn
    >>> gru = fastrnn.GRU(10, 20, bidirectional=True)
    >>> output, h_n = gru(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    @_without_mode(RNNBase.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
