r"""The cells: what happens to one hidden unit in one time step, forward and in reverse.

Everything else (the loop over time, the recurrent product, packing, directions, projection) is a
driver's business. A cell is written once per language; this file is the Python one, and the place
where the derivations stand.

Slots
-----
A layer computes two products a step, ``gx = W_ih x + b_ih`` and ``gh = W_hh h + b_hh``, each with
one row of H values per *gate*. The leading ``shared`` gates are only ever used as ``gx + gh``; of
the others the cell wants both parts (the GRU multiplies ``gh_n`` by ``r``). What a cell is given
are *slots*: first the shared gates, each as the sum; then the x parts of the other gates; then
their h parts. That is ``slots = 2 * gates - shared`` values per unit, and the cell's reverse
returns the gradient of the loss with respect to exactly these values: the gradient of ``gx`` is
then slots ``[0, gates)``, that of ``gh`` slots ``[0, shared)`` and ``[gates, slots)``.

Notation: ``s`` is the state before the step and ``y`` the state after it (``s[0]`` and ``y[0]`` are
h), ``v`` what the forward pass keeps for the reverse, a leading ``d`` a gradient. A driver keeps
``s[1:]`` too, and hands all of it to ``backward``. With sigma' = sigma (1 - sigma) and
tanh' = 1 - tanh^2:

RNN    ``h' = act(a)``
       ``da = dh' act'``, where act' is ``1 - h'^2`` (tanh) or ``[h' > 0]`` (relu): h' is enough.

LSTM   ``i, f, o = sigma(a_i), sigma(a_f), sigma(a_o); g = tanh(a_g)``
       ``c' = f c + i g; h' = o tanh(c')``
       With ``t = tanh(c')`` (recomputed, not kept) the whole gradient that reaches c' is
       ``e = dc' + dh' o (1 - t^2)``, and
       ``da_i = e g i (1-i)``, ``da_f = e c f (1-f)``, ``da_g = e i (1-g^2)``,
       ``da_o = dh' t o (1-o)``, ``dc = e f``. h reaches the step only through the product.

GRU    ``r, z = sigma(a_r), sigma(a_z); n = tanh(x_n + r h_n); h' = n + z (h - n)``
       ``dx_n = dh' (1-z) (1-n^2)``, ``dh_n = dx_n r``, ``da_r = dx_n h_n r (1-r)``,
       ``da_z = dh' (h-n) z (1-z)``; directly, ``dh = dh' z``.

Sources: Elman 1990; Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000;
Cho et al. 2014 in the form of torch.nn and cuDNN, where r multiplies after the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN_RELU",
    "RNN_TANH",
    "Cell",
    "State",
    "Weights",
    "register",
]

Values = Sequence[Tensor]

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""``w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H], b_hh [G*H], w_hr [P, H]`` of one direction."""

State = tuple[Tensor, ...]
"""One tensor per state of the cell: ``h [D, B, P]``, and the others ``[D, B, H]``.

Where a call is one step of a cell, they have no D.
"""


@dataclass(frozen=True, eq=False)  # a cell is itself alone, and quick to look up
class Cell:
    """The arithmetic of one hidden unit and what a driver must know about it.

    Every tensor that ``forward`` and ``backward`` see has the shape ``[rows, H]``, and both must be
    elementwise.

    Args:
        mode: name of the cell; torch's own ``mode`` where torch has the cell.
        gates: names of the gates, in the order of their rows in the weights.
        shared: how many leading gates are used only as ``gx + gh``.
        states: names of the states; the first is h, which is also the output.
        saved: names of what ``forward`` keeps for ``backward``, besides ``s[1:]``.
        forward: ``(pre[slots], s[states]) -> (y[states], v[saved])``.
        backward: ``(v[saved], s[states], h, dy[states]) -> (dpre[slots], ds[states])``, where ``h``
            is ``y[0]`` of the step, ``ds[0]`` is what reaches the old h other than through the
            product, and None stands for zero.
        projectable: whether ``proj_size`` may be used. A projected h has another size than the
            cell's own output, so such a cell must use neither ``s[0]`` nor ``h``.
        keep_gate: the gate that keeps the old state when it is 1, if there is one.
        input_gate: the gate that admits new input, if there is one of its own.

    Attributes:
        state_range: numbers of the states: 0 is h.
    """

    mode: str
    gates: tuple[str, ...]
    shared: int
    states: tuple[str, ...]
    saved: tuple[str, ...]
    forward: Callable[[Values, Values], tuple[Values, Values]]
    backward: Callable[
        [Values, Values, Tensor, Values],
        tuple[Values, Sequence[Tensor | None]],
    ]
    projectable: bool = False
    keep_gate: str | None = None
    input_gate: str | None = None
    state_range: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_range", range(len(self.states)))

    @property
    def slots(self) -> int:
        """Values that the two products give to one unit: ``2 * gates - shared``."""
        return 2 * len(self.gates) - self.shared

    @property
    def summed(self) -> int:
        return self.shared

    @property
    def num_preacts(self) -> int:
        return self.slots

    def num_saved(self, projected: bool) -> int:
        return self.saved_slots(projected)

    def saved_slots(self, projected: bool) -> int:
        """Values per unit and step that a driver keeps: ``v``, ``s[1:]``, and m if projected."""
        return len(self.saved) + len(self.states) - 1 + projected

    def zero_state(self, like: Tensor, leading: Sequence[Any], H: int, P: int) -> State:
        """The state that stands for none, ``[*leading, P or H]`` each, like a tensor."""
        return tuple(like.new_zeros(*leading, H if k else P) for k in self.state_range)


CELLS: dict[str, Cell] = {}
"""Every known cell by its mode: what tests and backends walk."""


def register(cell: Cell) -> Cell:
    """Add ``cell`` to :data:`CELLS` and return it.

    Raises:
        ValueError: the mode is taken, or the numbers of the cell contradict each other.
    """
    if cell.mode in CELLS:
        raise ValueError(f"a cell with mode {cell.mode!r} is registered already")
    if not 0 <= cell.shared <= len(cell.gates):
        raise ValueError(
            f"{cell.mode}: expected 0 <= shared <= {len(cell.gates)} gates, got {cell.shared}"
        )
    if not cell.gates or not cell.states:
        raise ValueError(f"{cell.mode}: a cell needs at least one gate and one state")
    CELLS[cell.mode] = cell
    return cell


def _rnn_tanh_forward(pre: Values, s: Values) -> tuple[Values, Values]:
    return (pre[0].tanh(),), ()


def _rnn_tanh_backward(
    v: Values, s: Values, h: Tensor, dy: Values
) -> tuple[Values, Sequence[Tensor | None]]:
    return (dy[0] * (1 - h * h),), (None,)


def _rnn_relu_forward(pre: Values, s: Values) -> tuple[Values, Values]:
    return (pre[0].relu(),), ()


def _rnn_relu_backward(
    v: Values, s: Values, h: Tensor, dy: Values
) -> tuple[Values, Sequence[Tensor | None]]:
    return (dy[0].masked_fill(h <= 0, 0.0),), (None,)


def _lstm_forward(pre: Values, s: Values) -> tuple[Values, Values]:
    i, f, g, o = pre[0].sigmoid(), pre[1].sigmoid(), pre[2].tanh(), pre[3].sigmoid()
    c = f * s[1] + i * g
    return (o * c.tanh(), c), (i, f, g, o)


def _lstm_backward(
    v: Values, s: Values, h: Tensor, dy: Values
) -> tuple[Values, Sequence[Tensor | None]]:
    i, f, g, o = v
    c = s[1]
    t = (f * c + i * g).tanh()
    e = dy[1] + dy[0] * o * (1 - t * t)
    dpre = (
        e * g * i * (1 - i),
        e * c * f * (1 - f),
        e * i * (1 - g * g),
        dy[0] * t * o * (1 - o),
    )
    return dpre, (None, e * f)


def _gru_forward(pre: Values, s: Values) -> tuple[Values, Values]:
    r, z = pre[0].sigmoid(), pre[1].sigmoid()
    x_n, h_n = pre[2], pre[3]
    n = (x_n + r * h_n).tanh()
    return (n + z * (s[0] - n),), (r, z, n, h_n)


def _gru_backward(
    v: Values, s: Values, h: Tensor, dy: Values
) -> tuple[Values, Sequence[Tensor | None]]:
    r, z, n, h_n = v
    dx_n = dy[0] * (1 - z) * (1 - n * n)
    da_z = dy[0] * (s[0] - n) * z * (1 - z)
    da_r = dx_n * h_n * r * (1 - r)
    return (da_r, da_z, dx_n, dx_n * r), (dy[0] * z,)


RNN_TANH = register(Cell("RNN_TANH", ("h",), 1, ("h",), (), _rnn_tanh_forward, _rnn_tanh_backward))
RNN_RELU = register(Cell("RNN_RELU", ("h",), 1, ("h",), (), _rnn_relu_forward, _rnn_relu_backward))
LSTM = register(
    Cell(
        "LSTM",
        gates=("i", "f", "g", "o"),
        shared=4,
        states=("h", "c"),
        saved=("i", "f", "g", "o"),
        forward=_lstm_forward,
        backward=_lstm_backward,
        projectable=True,
        keep_gate="f",
        input_gate="i",
    )
)
GRU = register(
    Cell(
        "GRU",
        gates=("r", "z", "n"),
        shared=2,
        states=("h",),
        saved=("r", "z", "n", "h_n"),
        forward=_gru_forward,
        backward=_gru_backward,
        keep_gate="z",
    )
)
