"""torch.nn's contract for recurrent layers and cells, and nothing else.

The layers derive from :class:`torch.nn.RNNBase` and not from ``nn.LSTM`` and its siblings, because
``torch.compile`` refuses every instance of those three. The price: ``isinstance(m, nn.LSTM)`` is
False.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional, onnx
from fastrnn.autograd import transformed, unwrapped
from fastrnn.cells import CELLS, Cell, State, Weights
from fastrnn.checks import check_batch_sizes, check_like
from fastrnn.dispatch import BackendError, Choice, choose, load
from fastrnn.operators import exporting, tracing
from fastrnn.rows import live

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "explain",
]


class RNNBase(nn.RNNBase):
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
        # torch's own constructor knows its four modes only.
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
        cell = self._cell
        rows = len(cell.gates) * hidden_size
        h_size = proj_size or hidden_size
        directions = ("", "_reverse") if bidirectional else ("",)
        self._all_weights = []
        for layer in range(num_layers):
            size = h_size * len(directions) if layer else input_size
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, size),
                "weight_hh": (rows, h_size),
            }
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
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

    @property
    def _cell(self) -> Cell:
        return CELLS[self.mode]

    # Weights are read by attribute at every call, so there is no list of them to keep in step:
    # parametrisations, functional_call, tied and replaced weights just work.

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        """Code written for torch.nn sets the list after it has set the weights: nothing is new."""
        names = self._flat_weights_names
        # A parametrised weight is a new tensor each time.
        pairs = zip(names, weights, strict=False)
        if len(weights) != len(names) or any(self._parameters.get(n, w) is not w for n, w in pairs):
            raise RuntimeError(
                f"expected {self._name}'s own weights in _flat_weights, which are read by attribute"
                " at every call, got other tensors: set weight_hh_l0 and its like instead"
            )

    def _init_flat_weights(self) -> None:
        # torch's own looks at what cuDNN could run, by a mode that it knows.
        if self.mode in ("RNN_TANH", "RNN_RELU", "LSTM", "GRU"):
            self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    # torch's own of these three keep that list.

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What torch's layer kept, if it was saved and ours has taken its name since.
        lists = ("_flat_weights", "_flat_weight_refs")
        nn.Module.__setstate__(self, {k: v for k, v in state.items() if k not in lists})

    def _weights(self) -> list[list[Weights]]:
        """``[layer][direction]``, as :func:`fastrnn.functional.rnn` takes them."""
        flat: list[Weights] = []
        for names in self._all_weights:
            w = _lookup(self, names)
            if not self.bias:
                w = (*w[:2], None, None, *w[2:])
            flat.append(w if self.proj_size else (*w, None))
        if not self.bidirectional:
            return [[w] for w in flat]
        return [flat[k : k + 2] for k in range(0, len(flat), 2)]

    def __prepare_scriptable__(self) -> nn.Module:
        raise _no_script()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers; see the class for shapes and errors."""
        if isinstance(input, fx.Proxy):
            return _leaf(self, input, hx, lengths)
        if lengths is not None:
            _check_no_export()
            return _eagerly(RNNBase._forward_lengths, self, input, hx, lengths)
        if isinstance(input, PackedSequence):
            _check_no_export()
            return _eagerly(RNNBase._forward_packed, self, input, hx)
        cell = self._cell
        weights = self._weights()
        self._check_dimensions(input)
        dim = input.dim()
        state = None if hx is None else self._check_rank(cell, hx, dim)
        if dim == 2:
            input = input.unsqueeze(1)
        elif self.batch_first:
            input = input.transpose(0, 1)
        self._check_input(input, weights[0][0][0])
        try:
            output, final = functional.rnn(
                cell, input, weights, state, dropout=self.dropout, training=self.training
            )
        except RuntimeError:
            # Checked below already, at no cost to a call that is right; here in torch's words.
            if state is not None:
                self._check_state(cell, state, input.shape[1])
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
        if (dim := _rank(data, "a PackedSequence of a Tensor")) != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {dim}")
        self._check_input(data, weights[0][0][0])
        state = None
        if hx is not None:
            state = self._check_rank(cell, hx, 3)
            self._check_state(cell, state, check_batch_sizes(batch_sizes, len(data)))
            state = _permute(state, sorted_indices)
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
        final = _permute(final, unsorted_indices)
        return packed, final if len(final) > 1 else final[0]

    def _forward_lengths(self, input: Any, hx: Any, lengths: Any) -> tuple[Tensor, Any]:
        """A padded batch, of which sequences without a step keep their state."""
        if tracing():
            raise RuntimeError(
                "torch.jit.trace: expected an input without lengths, whose numbers the trace would "
                "keep; pack_padded_sequence is recorded with those of each call"
            )
        if not isinstance(input, Tensor) or input.dim() != 3:
            got = f"{input.dim()}D" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"{self._name}: Expected a 3D tensor with lengths, got {got}")
        cell, weights = self._cell, self._weights()
        T, B = input.shape[:2] if not self.batch_first else input.shape[1::-1]
        counts = _checked_lengths(lengths, T, B)
        self._check_input(input, weights[0][0][0])
        # Nothing below checks what belongs to sequences without a step.
        check_like("input", input, input)
        dtype = functional.autocast_dtype(input)
        state = None
        if hx is not None:
            state = self._check_rank(cell, hx, 3)
            self._check_state(cell, state, B)
            for s in () if dtype else state:
                check_like("initial state", s, input)
        P, H, D = self.proj_size or self.hidden_size, self.hidden_size, 1 + bool(self.bidirectional)
        rows = input.flatten(0, 1)
        final = state or cell.zero_state(input, (self.num_layers * D, B), H, P)
        if counts.any():
            some, batch_sizes, places = live(counts, T, self.batch_first)
            some, places = some.to(input.device), places.to(input.device)
            y, new = functional.rnn(
                cell,
                rows.index_select(0, places),
                weights,
                None if state is None else tuple(s.index_select(1, some) for s in state),
                batch_sizes=batch_sizes,
                dropout=self.dropout,
                training=self.training,
            )
            final = tuple(
                s.to(n.dtype).index_copy(1, some, n) for s, n in zip(final, new, strict=True)
            )
            output = y.new_zeros(T * B, D * P).index_copy_(0, places, y)
        else:
            output = rows.new_zeros(T * B, D * P, dtype=dtype)
            final = tuple(s.to(output.dtype, copy=True) for s in final)
            # Everything has a gradient, and it is zero.
            for t in (input, *(w for layer in weights for each in layer for w in each)):
                if t is None:
                    continue
                if not dtype:
                    check_like("weights", t, input)
                output = output + t.flatten()[:0].sum().to(output.dtype)
        output = output.unflatten(0, input.shape[:2])
        return output, final if len(final) > 1 else final[0]

    @property
    def _name(self) -> str:
        return "RNN" if self.mode.startswith("RNN_") else self.mode

    def _check_dimensions(self, input: Tensor) -> None:
        if (dim := _rank(input, "a Tensor or a PackedSequence")) not in (2, 3):
            raise ValueError(
                f"{self._name}: Expected input to be 2D or 3D, got {dim}D tensor instead"
            )

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        if input.dtype is not weight.dtype and functional.autocast_dtype(input) is None:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: "
                f"model.to({input.dtype})"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.shape[-1]}"
            )

    def _check_rank(self, cell: Cell, hx: Any, dim: int) -> State:
        """``hx`` as one batched tensor per state."""
        state = _as_state(cell, hx)
        for s in state:
            if s.dim() != dim:
                which = "batched 3-D" if dim == 3 else "unbatched 2-D"
                names = "hx" if len(state) == 1 else "hx and cx"
                got = ", ".join(f"{s.dim()}-D" for s in state)
                raise RuntimeError(
                    f"For {which} input, {names} should also be {dim}-D but got ({got}) tensors"
                )
        return state if dim == 3 else tuple(s.unsqueeze(1) for s in state)

    def _check_state(self, cell: Cell, state: State, batch: int) -> None:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for k, s in enumerate(state):
            expected = (rows, batch, self.hidden_size if k else self.proj_size or self.hidden_size)
            if s.shape != expected:
                name = "hidden" if len(state) == 1 else f"hidden[{k}]"
                raise RuntimeError(f"Expected {name} size {expected}, got {list(s.shape)}")

    # The names under which torch.nn has these checks, for code that calls them.

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        self._check_input(input, cast(Tensor, self._flat_weights[0]))

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        rows, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        _, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        self._check_state(self._cell, _as_state(self._cell, hidden), batch)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        state = _permute(_as_state(self._cell, hx), permutation)
        return state if len(state) > 1 else state[0]


def _no_script() -> RuntimeError:
    return RuntimeError(
        "torch.jit.script cannot compile fastrnn's layers: torch.jit.trace and torch.export record "
        "them, and fastrnn.revert(model) makes them torch.nn's"
    )


def _rank(input: Any, expected: str) -> int:
    try:
        return cast(int, input.dim())
    except AttributeError:
        raise TypeError(f"expected {expected}, got {type(input).__name__}") from None


def _check_no_export() -> None:
    where = "export to ONNX" if onnx.exporting() else "torch.export" if exporting() else None
    if where:
        raise RuntimeError(
            f"{where}: expected a padded input without lengths, got a packed one or lengths"
        )


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _eagerly(
    method: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """What ``torch.compile`` calls as it is, since its graphs would hold for some lengths only."""
    # To switch the compiler off takes long beside a short layer, and mostly nobody compiles.
    compiling = torch.compiler.is_dynamo_compiling()
    if not compiling and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:
        return method(*args, **kwargs)
    if method not in _uncompiled:
        _uncompiled[method] = torch.compiler.disable(method)
    return cast(_Result, _uncompiled[method](*args, **kwargs))


_uncompiled: dict[Callable[..., Any], Any] = {}
# As torch.compiler.disable, which imports the compiler.
_eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]
_eagerly._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "fastrnn's layers are compiled for padded inputs without lengths"
)


def _leaf(module: nn.Module, input: fx.Proxy, *args: Any) -> fx.Proxy:
    """A call of the module in a graph of torch.fx, which looks into all but torch.nn's.

    The graph is to call all of the module, of which fx has seen what is done before and after.
    """
    tracer: Any = input.tracer
    own = type(module).forward in (RNNBase.forward, RNNCellBase.forward)
    if not own or module._forward_pre_hooks or module._forward_hooks or module is tracer.root:
        raise RuntimeError(
            f"torch.fx: expected a {type(module).__name__} inside a model, without hooks and with "
            "fastrnn's own forward; with a Tracer whose is_leaf_module takes fastrnn.RNNBase and "
            "RNNCellBase it may have them"
        )
    while args and args[-1] is None:
        args = args[:-1]
    leaf: fx.Proxy = tracer.create_proxy(
        "call_module", tracer.path_of_module(module), (input, *args), {}
    )
    return leaf


def _lookup(module: nn.Module, names: Sequence[str]) -> tuple[Any, ...]:
    """Attributes by name; parameters are found without the cost of ``nn.Module.__getattr__``."""
    try:
        found: tuple[Any, ...] = itemgetter(*names)(module._parameters)
        return found
    except KeyError:
        return tuple([getattr(module, name) for name in names])


def _as_state(cell: Cell, hx: Any) -> State:
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


def _checked_lengths(lengths: Any, T: int, B: int) -> Tensor:
    """``lengths`` on the CPU, where packing wants them."""
    try:
        # A list would land on the default device.
        counts = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected lengths to be a tensor or a list of integers: {error}") from None
    if transformed():
        counts = unwrapped("lengths", counts)
    if counts.is_meta or counts.layout is not torch.strided:
        got = "a meta tensor" if counts.is_meta else f"a tensor of {counts.layout}"
        raise TypeError(f"expected lengths with numbers in a row, got {got}")
    dtype = counts.dtype
    if counts.numel() and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise TypeError(f"expected lengths of integers, got {dtype}")
    if counts.shape != (B,):
        raise ValueError(f"expected lengths of shape [{B}], got {list(counts.shape)}")
    counts = counts.to("cpu", torch.int64)
    if B and not 0 <= int(counts.min()) <= int(counts.max()) <= T:
        raise ValueError(f"expected lengths from 0 to {T}, got {counts.tolist()}")
    return counts


def _permute(state: State, permutation: Tensor | None) -> State:
    if permutation is None:
        return state
    return tuple(s.index_select(1, permutation) for s in state)


def _without_mode(
    base: Callable[Concatenate[Any, str, _Parameters], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _Parameters], None]]:
    """Tells type checkers that a constructor takes what its base's does after the mode."""
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
        bidirectional: run a second direction backward in time, D = 2.
        device, dtype: of the parameters.

    Inputs: ``input, hx, lengths``
        ``input`` is ``[T, I]``, ``[T, B, I]``, or a :class:`PackedSequence`; ``hx`` the initial
        state ``[L*D, H]`` or ``[L*D, B, H]``, zero by default. With ``lengths``, B integers from 0
        to T in a tensor on any device or a list, sequences of ``[T, B, I]`` end after so many
        steps: T may be 0, and nothing need be sorted or packed.

    Outputs: ``output, h_n``
        The last layer's h at every step, ``[T, D*H]``, ``[T, B, D*H]`` or packed, and the final
        state, shaped like ``hx``. With ``lengths`` the output is zero after the end of a sequence,
        and its final state that of its last step, or without a step the initial one.

    Raises:
        ValueError: rank or dtype of the input, how many ``lengths`` there are, or their range.
        RuntimeError: sizes, T = 0 without ``lengths``, the rank or size of ``hx``.
        TypeError: ``hx`` is no tensor (LSTM: no pair of tensors), or ``lengths`` are no integers.
        fastrnn.BackendError: a backend was asked for by name and cannot run this.

    >>> import torch, fastrnn
    >>> rnn = fastrnn.RNN(10, 20, num_layers=2)
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    if TYPE_CHECKING:  # torch's own constructor takes anything, too, and has errors of its own

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
            super().__init__(_rnn_mode(self.nonlinearity), *args, **kwargs)


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


def _rnn_mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"RNN_{nonlinearity.upper()}"


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
        raise _no_script()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step; see the class for shapes and errors."""
        if isinstance(input, fx.Proxy):
            return _leaf(self, input, hx)
        cell = self._cell
        weights = self._weights()
        self._check_dimensions(input)
        batched = input.dim() == 2
        state = None if hx is None else self._check_rank(cell, hx, input.dim())
        self._check_input(input, weights[0])
        if not batched:
            input = input.unsqueeze(0)
        new = functional.step(cell, input, state, weights)
        if not batched:
            new = tuple(s.squeeze(0) for s in new)
        return new if len(new) > 1 else new[0]

    def _weights(self) -> Weights:
        return (*_lookup(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")), None)

    @property
    def _name(self) -> str:
        return f"{self._cell.mode.split('_')[0]}Cell"

    def _check_rank(self, cell: Cell, hx: Any, dim: int) -> State:
        """``hx`` as one tensor ``[B, H]`` per state."""
        state = _as_state(cell, hx)
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

    def _check_dimensions(self, input: Tensor) -> None:
        if (dim := _rank(input, "a Tensor")) not in (1, 2):
            raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {dim}D instead")

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
            return CELLS[_rnn_mode(self.nonlinearity)]
        except ValueError as error:  # torch's type, where it is met at a call
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


def explain(module: RNNBase | RNNCellBase, input: Tensor | PackedSequence) -> Choice:
    """Say which backend would run ``module(input)`` here and now, and why.

    Where that is torch's own operator, the reason also says what a compiled or exported graph has
    instead.

    Raises:
        TypeError: the module is not one of fastrnn's, or the input no tensor.
        ValueError, RuntimeError: dtype or features of the input are not the module's.
        fastrnn.BackendError: a backend was asked for by name and cannot run this.

    >>> import torch, fastrnn
    >>> with fastrnn.use_backend("reference"):
    ...     print(fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(5, 2, 3)))
    reference: asked for by use_backend; plain torch, one step at a time
    """
    if not isinstance(module, (RNNBase, RNNCellBase)):
        raise TypeError(f"expected a layer or a cell of fastrnn, got {type(module).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    module._check_dimensions(data)
    if isinstance(module, RNNCellBase):
        weights = module._weights()
        module._check_input(data, weights[0])
        sizes = functional.sizes_of(module._cell, data, ((weights,),), data.shape[:-1].numel())
    else:
        stack = module._weights()
        module._check_input(data, stack[0][0][0])
        packed = False
        if isinstance(input, PackedSequence):
            packed = True
            batch, steps = int(input.batch_sizes[0]), len(input.batch_sizes)
        elif data.dim() == 2:
            batch, steps = 1, len(data)
        else:
            batch, steps = data.shape[:2] if module.batch_first else data.shape[1::-1]
        sizes = functional.sizes_of(module._cell, data, stack, batch, steps, packed)
    dtype = functional.autocast_dtype(data) or data.dtype
    choice = choose(module._cell, dtype, data.device, sizes=sizes)
    if load(choice.backend).STACKS:
        try:
            graph = choose(module._cell, dtype, data.device, sizes=sizes._replace(compiled=True))
        except BackendError:
            instead = "an error"
        else:
            instead = graph.backend
        reason = f"{choice.reason}; in a graph that is compiled or exported {instead}"
        choice = replace(choice, reason=reason)
    return choice
