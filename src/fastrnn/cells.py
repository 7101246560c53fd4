r"""The cells: what happens to one hidden unit in one time step, forward and backward.

Everything else (the loop over time, the recurrent product, packing, directions, projection) is the
driver's work. A cell is written once per language. This file is the Python one, and the place where
the derivations stand.

Pre-activations
---------------
A layer computes two products in each step, ``gx = W_ih x + b_ih`` and ``gh = W_hh h + b_hh``, each
with H values per *gate*. The leading ``summed`` gates only need ``gx + gh``. The other gates need
both parts: the GRU multiplies ``gh_n`` by ``r``. A cell receives its *pre-activations* in this
order: the sums of the summed gates, then the x parts of the other gates, then their h parts. These
are ``num_preacts = 2 * gates - summed`` values per unit, and the cell's backward function returns
the gradient of the loss with respect to exactly these values. The gradient of ``gx`` is then
pre-activations ``[0, gates)``, that of ``gh`` is ``[0, summed)`` and ``[gates, num_preacts)``.

Notation: ``s`` is the state before the step and ``y`` the state after it (``s[0]`` and ``y[0]`` are
h), ``v`` the values that the forward function saves for the backward one, a leading ``d`` a
gradient. A driver saves ``s[1:]`` too, and passes all of it to ``backward``. Where h is projected,
``y[0]`` is the h before the projection, which drivers call ``h_cell``. With sigma' = sigma
(1 - sigma) and tanh' = 1 - tanh^2:

RNN    ``h' = act(a)``
       ``da = dh' act'``, where act' is ``1 - h'^2`` (tanh) or ``[h' > 0]`` (relu): h' is enough.

LSTM   ``i, f, o = sigma(a_i), sigma(a_f), sigma(a_o); g = tanh(a_g)``
       ``c' = f c + i g; h' = o tanh(c')``
       With ``t = tanh(c')`` (recomputed, not saved) the whole gradient that reaches c' is
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
    "register",
]

Values = Sequence[Tensor]

State = tuple[Tensor, ...]
"""One tensor per state of the cell: ``h [D, B, P]``, and the others ``[D, B, H]``.

For one step of a cell the dimension D is missing.
"""


@dataclass(frozen=True, eq=False)  # compared by identity, which is also a fast hash
class Cell:
    """The arithmetic of one hidden unit and what a driver must know about it.

    Every tensor that ``forward`` and ``backward`` see has the shape ``[rows, H]``, and both must be
    elementwise.

    Args:
        mode: name of the cell; torch's own ``mode`` where torch has the cell.
        gates: names of the gates, in the order of their blocks of H rows in the weights.
        summed: the number of leading gates that only need ``gx + gh``.
        states: names of the states; the first is h, which is also the output.
        saved: names of the values that ``forward`` saves for ``backward``, besides ``s[1:]``.
        forward: ``(pre[num_preacts], s[states]) -> (y[states], v[saved])``.
        backward: ``(v[saved], s[states], h, dy[states]) -> (dpre[num_preacts], ds[states])``,
            where ``h`` is ``y[0]`` of the step. ``ds[0]`` is the gradient that reaches the old h
            other than through the product. None stands for zero.
        projectable: whether ``proj_size`` may be used. A projected h has another size than the
            cell's own output, so such a cell must use neither ``s[0]`` nor ``h``.
        activations: the activation of each gate, "sigmoid", "tanh" or "relu", in the order of
            ``gates``. :mod:`fastrnn.diagnostics` reads it for gates that are saved, and for a gate
            named after the output; an empty tuple excludes the cell from that.
        keep_gate: the gate that preserves the old state where it is 1, for
            :func:`fastrnn.init.forget_bias_` and :func:`fastrnn.init.chrono_`.
        input_gate: the gate that admits new input where it is 1, for :func:`fastrnn.init.chrono_`.

    Attributes:
        state_range: indices of the states; 0 is h.
    """

    mode: str
    gates: tuple[str, ...]
    summed: int
    states: tuple[str, ...]
    saved: tuple[str, ...]
    forward: Callable[[Values, Values], tuple[Values, Values]]
    backward: Callable[
        [Values, Values, Tensor, Values],
        tuple[Values, Sequence[Tensor | None]],
    ]
    projectable: bool = False
    activations: tuple[str, ...] = ()
    keep_gate: str | None = None
    input_gate: str | None = None
    state_range: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_range", range(len(self.states)))

    @property
    def num_preacts(self) -> int:
        """Pre-activations per unit: ``2 * gates - summed``."""
        return 2 * len(self.gates) - self.summed

    def num_saved(self, projected: bool) -> int:
        """Values per unit and step that a driver saves: ``v``, ``s[1:]``, h_cell if projected."""
        return len(self.saved) + len(self.states) - 1 + projected

    def zero_state(self, like: Tensor, leading: Sequence[Any], H: int, P: int) -> State:
        """A state of zeros, ``[*leading, P]`` and ``[*leading, H]``, like a tensor."""
        return tuple(like.new_zeros(*leading, H if k else P) for k in self.state_range)


CELLS: dict[str, Cell] = {}
"""Every known cell by its mode. Tests and backends iterate over it."""


def register(cell: Cell) -> Cell:
    """Add ``cell`` to :data:`CELLS` and return it.

    Raises:
        ValueError: the mode is taken, or the fields of the cell contradict each other.
    """
    if cell.mode in CELLS:
        raise ValueError(f"a cell with mode {cell.mode!r} is registered already")
    if not cell.gates or not cell.states:
        raise ValueError(f"{cell.mode}: a cell needs at least one gate and one state")
    if not 0 <= cell.summed <= len(cell.gates):
        raise ValueError(
            f"{cell.mode}: expected 0 <= summed <= {len(cell.gates)} gates, got {cell.summed}"
        )
    if cell.activations and len(cell.activations) != len(cell.gates):
        raise ValueError(
            f"{cell.mode}: expected one activation for each of {len(cell.gates)} gates, "
            f"got {len(cell.activations)}"
        )
    if unknown := set(cell.activations) - {"sigmoid", "tanh", "relu"}:
        raise ValueError(
            f"{cell.mode}: expected activations among sigmoid, tanh and relu, "
            f"got {', '.join(sorted(unknown))}"
        )
    for gate in (cell.keep_gate, cell.input_gate):
        if gate is not None and gate not in cell.gates:
            raise ValueError(
                f"{cell.mode}: expected one of the gates {', '.join(cell.gates)}, got {gate!r}"
            )
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


RNN_TANH = register(
    Cell(
        "RNN_TANH",
        gates=("h",),
        summed=1,
        states=("h",),
        saved=(),
        forward=_rnn_tanh_forward,
        backward=_rnn_tanh_backward,
        activations=("tanh",),
    )
)
RNN_RELU = register(
    Cell(
        "RNN_RELU",
        gates=("h",),
        summed=1,
        states=("h",),
        saved=(),
        forward=_rnn_relu_forward,
        backward=_rnn_relu_backward,
        activations=("relu",),
    )
)
LSTM = register(
    Cell(
        "LSTM",
        gates=("i", "f", "g", "o"),
        summed=4,
        states=("h", "c"),
        saved=("i", "f", "g", "o"),
        forward=_lstm_forward,
        backward=_lstm_backward,
        projectable=True,
        activations=("sigmoid", "sigmoid", "tanh", "sigmoid"),
        keep_gate="f",
        input_gate="i",
    )
)
GRU = register(
    Cell(
        "GRU",
        gates=("r", "z", "n"),
        summed=2,
        states=("h",),
        saved=("r", "z", "n", "h_n"),
        forward=_gru_forward,
        backward=_gru_backward,
        activations=("sigmoid", "sigmoid", "tanh"),
        keep_gate="z",
    )
)
