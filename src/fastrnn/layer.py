"""One layer of a call: the object that :mod:`fastrnn.functional` makes and every backend receives.

A :class:`Layer` is a cell, the weights of its directions, its state and its rows. Names are those
of the C++ engine (``csrc/layer.h``, ``csrc/rows.h``). Sizes: T steps, N rows in all, B rows at the
widest step, D directions, G gates, input size I, hidden size H, and P, the size of h, which is H
unless the layer is projected.

What a backend may rely on is checked here for every caller: tensors that fit together.
The checks raise RuntimeError, or ValueError, with the expected and the actual value. The modules
check their user's arguments first, in torch's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastrnn.cells import Cell, State

__all__ = [
    "Layer",
    "Rows",
    "Weights",
    "castable",
    "check_batch_sizes",
    "check_like",
    "check_state",
    "check_strided",
    "filled",
    "rows_of",
    "rows_of_one_step",
    "to_dtype",
]


class Weights(NamedTuple):
    """The weights of one direction.

    Attributes:
        ih: ``[G*H, I]``.
        hh: ``[G*H, P]``.
        bias_ih, bias_hh: ``[G*H]``; both None without biases.
        hr: ``[P, H]``; None without projection.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class Rows(NamedTuple):
    """The rows of a batch in time-major order: those of step 0, then those of step 1, and so on.

    A dense batch has B rows at every step. A packed batch has ``batch_sizes[t]`` rows at step t,
    never more than at the step before, because its sequences are sorted by length: row r of a step
    is always sequence r.

    Attributes:
        batch_sizes: ``[T]``, int64, on the CPU; None for a dense batch.
        one_step: whether the batch is the input ``[B, I]`` of one step of a cell. The output and
            the states then have the shape ``[B, *]``. Otherwise states have the shape
            ``[D, B, *]``, and the input is ``[T, B, I]``, or ``[N, I]`` in a packed batch.
    """

    T: int
    B: int
    N: int
    batch_sizes: Tensor | None = None
    one_step: bool = False

    def steps(self, reverse: bool) -> list[slice]:
        """The rows of each step, in the direction's order of time."""
        if self.batch_sizes is None:
            sizes = [self.B] * (self.N // self.B if self.B else 0)
        else:
            # Not tolist(), which torch 2.6 refuses inside a transform.
            sizes = [int(n) for n in self.batch_sizes.unbind()]
        slices, offset = [], 0
        for n in sizes:
            slices.append(slice(offset, offset + n))
            offset += n
        return slices[::-1] if reverse else slices

    def previous(self, out: Tensor, first: Tensor, reverse: bool) -> Tensor:
        """For every row of ``out [N, P]``, the value one step earlier in its sequence.

        ``first [B, P]`` is the value before the first step of a sequence: its initial state.
        "Earlier" is in the direction's order of time: with ``reverse`` it is the row of step t + 1.
        """
        N, B = out.shape[0], first.shape[0]
        if N == 0:
            return out.clone()
        if self.batch_sizes is None:
            return torch.cat([out[B:], first]) if reverse else torch.cat([first, out[: N - B]])
        # Computed on the CPU, where the sizes are, so that nothing synchronises with a GPU.
        sizes, T = self.batch_sizes, self.batch_sizes.shape[0]
        starts = sizes.cumsum(0) - sizes
        t = torch.repeat_interleave(torch.arange(T, device="cpu"), sizes)
        r = torch.arange(N, device="cpu") - starts[t]
        before = t + 1 if reverse else t - 1
        active = (before >= 0) & (before < T)
        before = before.clamp(0, T - 1)
        active &= r < sizes[before]
        # Rows of `first` follow those of `out` in one gather.
        index = torch.where(active, starts[before] + r, N + r)
        if out.is_cuda:
            index = index.pin_memory().to(out.device, non_blocking=True)
        return torch.cat([out, first])[index]


def rows_of(input: Tensor, batch_sizes: Tensor | None = None) -> Rows:
    """The rows of a batch of sequences.

    Raises:
        ValueError: the rank of the input, or the dtype or device of ``batch_sizes``, is wrong.
        RuntimeError: T = 0, or the batch sizes do not fit the input or each other.
    """
    if batch_sizes is not None:
        if input.dim() != 2:
            raise ValueError(f"expected packed rows of 2 dimensions [N, I], got {input.dim()}")
        N = input.shape[0]
        B = check_batch_sizes(batch_sizes, N)
        return Rows(len(batch_sizes), B, N, batch_sizes)
    if input.dim() != 3:
        raise ValueError(f"expected an input of 3 dimensions [T, B, I], got {input.dim()}")
    T, B, _ = input.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN, got 0")
    return Rows(T, B, T * B)


def rows_of_one_step(input: Tensor) -> Rows:
    """The rows of one step of a cell.

    Raises:
        ValueError: the rank of the input is wrong.
    """
    if input.dim() != 2:
        raise ValueError(f"expected an input of 2 dimensions [B, I], got {input.dim()}")
    B = input.shape[0]
    return Rows(1, B, B, None, True)


class Layer:
    """One layer of a call; :meth:`check` validates it against its input.

    Immutable, as the type checker enforces. It is not a tuple, so that transforms of torch.func
    treat it as one opaque argument. The tensors that they must see are passed beside it
    (:meth:`tensors`).

    Args:
        weights: of each direction.
        state: the initial state; None is zero.
    """

    def __init__(
        self, cell: Cell, rows: Rows, weights: Sequence[Weights], state: State | None
    ) -> None:
        self.cell: Final = cell
        self.rows: Final = rows
        self.weights: Final = weights
        self.state: Final = state

    @property
    def D(self) -> int:
        return len(self.weights)

    @property
    def G(self) -> int:
        return len(self.cell.gates)

    @property
    def H(self) -> int:
        return self.weights[0].hh.shape[0] // len(self.cell.gates)

    @property
    def P(self) -> int:
        return self.weights[0].hh.shape[1]

    @property
    def projected(self) -> bool:
        return self.weights[0].hr is not None

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading sizes of a state."""
        return (self.rows.B,) if self.rows.one_step else (self.D, self.rows.B)

    def zero_state(self, like: Tensor) -> State:
        """The state that None stands for, with the dtype and the device of a tensor."""
        return self.cell.zero_state(like, self.leading, self.H, self.P)

    def saved_shape(self, units: int) -> tuple[int, ...]:
        """The shape of the saved activations: v, s[1:] before the step, and h_cell if projected."""
        return (self.D, self.rows.N, self.cell.num_saved(self.projected), units)

    def to(self, dtype: torch.dtype) -> Layer:
        """With weights and state of another dtype."""
        return Layer(
            self.cell,
            self.rows,
            [Weights(*to_dtype(dtype, w)) for w in self.weights],
            None if self.state is None else to_dtype(dtype, self.state),
        )

    def tensors(self) -> list[Tensor | None]:
        """The fields of each direction's weights, then the states, if any."""
        return [*chain(*self.weights), *(self.state or ())]

    def with_tensors(self, tensors: Sequence[Any]) -> Layer:
        """The same layer with other tensors, in the order of :meth:`tensors`."""
        count = len(Weights._fields)
        end = self.D * count
        weights = [Weights(*tensors[k : k + count]) for k in range(0, end, count)]
        return Layer(self.cell, self.rows, weights, tuple(tensors[end:]) or None)

    def without_tensors(self) -> Layer:
        """A template for :meth:`with_tensors` that keeps no tensor alive."""
        return Layer(self.cell, self.rows, [_NO_WEIGHTS] * len(self.weights), None)

    def check(self, x: Tensor) -> None:
        """Check the weights and the state against the input and each other.

        Raises:
            RuntimeError: sizes, dtypes, layouts or devices do not fit together.
        """
        check_strided("input", x)
        for weights in self.weights:
            _check_weights(self.cell, x, weights, self.weights[0])
        if self.state is not None:
            check_state(self.cell, self.state, self.leading, self.weights[0], x)


_NO_WEIGHTS = Weights._make([None] * len(Weights._fields))


def filled(flags: Sequence[bool], values: Iterable[Any]) -> list[Any]:
    """The next value for each flag that is set, and None for the others."""
    rest = iter(values)
    return [next(rest) if flag else None for flag in flags]


def castable(t: Tensor) -> bool:
    """Whether casts of a layer convert a tensor: real floating-point dtypes but float64."""
    return t.dtype.is_floating_point and t.dtype is not torch.float64


def to_dtype(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Tensors in another dtype, as autocast and 16-bit layers need them."""
    return tuple([t.to(dtype) if t is not None and castable(t) else t for t in tensors])


def _check_weights(cell: Cell, x: Tensor, weights: Weights, first: Weights) -> None:
    if first.hh.dim() != 2:
        raise RuntimeError(f"{cell.mode}: expected weight_hh of 2 dimensions, got {first.hh.dim()}")
    gate_size, P = map(int, first.hh.shape)  # torch.jit.trace may make tensors of them
    G = len(cell.gates)
    H, rest = divmod(gate_size, G)
    if H == 0:
        raise RuntimeError(f"{cell.mode}: expected hidden_size above 0, got {H}")
    if rest:
        raise RuntimeError(
            f"{cell.mode}: expected weight_hh of {G} x hidden_size rows, got {gate_size}"
        )
    _check_weight(cell, "weight_ih", weights.ih, (gate_size, x.shape[-1]), x)
    _check_weight(cell, "weight_hh", weights.hh, (gate_size, P), x)
    if weights.hr is not None:
        if not cell.projectable:
            raise RuntimeError(
                f"{cell.mode}: this cell cannot be projected, but weight_hr was given"
            )
        _check_weight(cell, "weight_hr", weights.hr, (P, H), x)
    elif P != H:
        raise RuntimeError(
            f"{cell.mode}: expected weight_hh of shape {[gate_size, H]} without projection, "
            f"got {[gate_size, P]}"
        )
    if (weights.bias_ih is None) != (weights.bias_hh is None):
        raise RuntimeError(f"{cell.mode}: expected both bias_ih and bias_hh or neither")
    if weights.bias_ih is not None and weights.bias_hh is not None:
        _check_weight(cell, "bias_ih", weights.bias_ih, (gate_size,), x)
        _check_weight(cell, "bias_hh", weights.bias_hh, (gate_size,), x)


def _check_weight(cell: Cell, name: str, w: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if w.shape != shape:
        raise RuntimeError(
            f"{cell.mode}: expected {name} of shape {list(shape)}, got {list(w.shape)}"
        )
    check_like(name, w, x)


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that a tensor has the input's dtype and device, and strides."""
    if tensor.dtype is not x.dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {tensor.dtype}")
    check_strided(name, tensor)
    if tensor.device != x.device:
        raise RuntimeError(
            f"expected all tensors on the input's device {x.device}, got {name} on {tensor.device}"
        )


def check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"expected {name} of layout torch.strided, got {tensor.layout}")


def check_state(
    cell: Cell, state: State, leading: tuple[int, ...], weights: Weights, x: Tensor
) -> None:
    """Check an initial state of the shape ``[*leading, P]`` or ``[*leading, H]``."""
    if len(state) != len(cell.states):
        raise RuntimeError(
            f"{cell.mode}: expected {len(cell.states)} initial states "
            f"({', '.join(cell.states)}), got {len(state)}"
        )
    gate_size, P = weights.hh.shape
    for k, s in enumerate(state):
        shape = (*leading, gate_size // len(cell.gates) if k else P)
        if s.shape != shape:
            raise RuntimeError(
                f"{cell.mode}: expected initial {cell.states[k]} of shape {list(shape)}, "
                f"got {list(s.shape)}"
            )
        check_like("initial state", s, x)


def check_batch_sizes(batch_sizes: Tensor, N: int) -> int:
    """Check the batch sizes of N packed rows, and return the number of sequences."""
    if batch_sizes.dtype is not torch.int64 or batch_sizes.device.type != "cpu":
        raise ValueError(
            "expected batch_sizes of dtype torch.int64 on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1 or batch_sizes.shape[0] == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN, "
            f"got batch_sizes of shape {list(batch_sizes.shape)}"
        )
    if (batch_sizes[1:] > batch_sizes[:-1]).any() or int(batch_sizes[-1]) <= 0:
        raise RuntimeError("expected batch_sizes that never increase and are above 0")
    B, total = int(batch_sizes[0]), int(batch_sizes.sum())
    # A sum can overflow back to N; its first term then cannot be that small.
    if total != N or B > N:
        raise RuntimeError(
            f"expected as many packed rows as batch_sizes add up to, {total}, got {N}"
        )
    return B
