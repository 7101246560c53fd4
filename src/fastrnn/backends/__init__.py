"""The contract between a backend and everything above it.

A backend is a module with the functions of :class:`Backend`, or, where torch has the operator, of
:class:`Stacks`. The former runs one layer, all its directions at once, over rows in time-major
order: the rows of step 0, then those of step 1, and so on. In a
dense batch every step has B rows; in a packed one step t has ``batch_sizes[t]``, longest sequences
first, as in :class:`torch.nn.utils.rnn.PackedSequence`. Direction 1 runs backward in time.

Backends may rely on a contiguous ``x``, and unless they say that they check for themselves, on what
:mod:`fastrnn.functional` has checked: shapes, one dtype, one device. Sizes: T steps, N rows in all,
B rows at the widest step, D directions, input size I, hidden size H, and P, the size of h, which is
H unless the layer is projected.

Backends are imported by :mod:`fastrnn.dispatch` when first chosen and never from here: an import of
Triton or Numba costs more than torch's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, get_num_threads, set_num_threads

from fastrnn.cells import Cell, State, Weights

__all__ = ["Backend", "Gradients", "Sizes", "Stacks", "installed", "one_thread_in_a_child"]

_in_a_child = False


def _forked() -> None:
    global _in_a_child
    _in_a_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def one_thread_in_a_child() -> None:
    """OpenMP's threads do not survive a fork, and torch would wait for them for ever."""
    if _in_a_child and get_num_threads() > 1:
        set_num_threads(1)


# Metadata is a file to find and parse, and use_backend asks at every entry.
@cache
def installed(*packages: str) -> tuple[int, ...] | None:
    """The version of the first that is installed, without its import; None if none says so."""
    for name in packages:
        try:
            return tuple(map(int, re.findall(r"\d+", version(name))[:2]))
        except PackageNotFoundError:
            continue
    return None


Gradients = tuple[Tensor | None, ...]
"""Of x, of each direction's five weights, and of the states if there are any; None: not needed."""


class Sizes(NamedTuple):
    """What a choice of backend may depend on besides the cell, the dtype and the device.

    ``compiled``: for the graph of a compiler or of ``torch.export``, which has a layer as one
    operator of ours, so that torch's own are no alternative, however fast.
    """

    layers: int
    directions: int
    batch: int
    input_size: int
    hidden_size: int
    proj_size: int = 0
    packed: bool = False
    one_step: bool = False
    compiled: bool = False


class Choosable(Protocol):
    """What every module in :mod:`fastrnn.backends` offers.

    Attributes:
        STACKS: whether it is one of :class:`Stacks`, or else a :class:`Backend`.
    """

    __name__: str
    STACKS: bool

    def missing(self) -> str | None:
        """What is missing for the backend to run at all on this machine; None if nothing."""

    def refuses(
        self,
        cell: Cell,
        dtype: torch.dtype,
        device: torch.device,
        sizes: Sizes | None = None,
        automatic: bool = False,
    ) -> str | None:
        """Why the backend cannot run this cell on such tensors; None if it can.

        With ``automatic``, also why the next one is the better choice.
        """

    def empty_cache(self) -> None:
        """Give back the memory that is kept from call to call."""

    def describe(self) -> str:
        """A few words on how it runs here, for ``explain`` and bug reports."""


class Stacks(Choosable, Protocol):
    """A backend that runs whole stacks of layers, and that torch differentiates."""

    def rnn(
        self,
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

    def step(self, cell: Cell, input: Tensor, hx: State | None, weights: Weights) -> State:
        """As :func:`fastrnn.functional.step`."""


class Backend(Choosable, Protocol):
    """A backend that runs one layer, forward and in reverse.

    Attributes:
        CHECKS: whether ``forward`` itself raises ValueError where the weights and the state do not
            fit together and ``x``, in size, dtype or device. Otherwise functional checks first.
        MULTIPLE: of what the hidden size of ``saved`` is a multiple; it is the next one of H.
        WIDE: whether ``saved`` is float32 where the tensors are of 16 bits.
    """

    CHECKS: bool
    MULTIPLE: int
    WIDE: bool

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        weights: Sequence[Weights],
        state: State | None,
        batch_sizes: Tensor | None,
        batch: int,
        save: bool,
    ) -> tuple[Tensor, State, Tensor | None]:
        """Run a layer: ``x [*, I]`` to ``out [*, D*P]``, the final state, and what is saved.

        ``*`` is ``T, B`` in a dense batch, ``B`` alone for one step of a cell, and ``N`` in a
        packed batch.

        ``state=None`` is a zero state. ``saved`` has the shape ``[D, N, cell.saved_slots, H]``: v,
        s[1:] before the step, and the cell's own output m if projected; None unless ``save``.
        """

    def backward(
        self,
        cell: Cell,
        x: Tensor,
        weights: Sequence[Weights],
        state: State | None,
        batch_sizes: Tensor | None,
        batch: int,
        out: Tensor,
        saved: Tensor,
        dout: Tensor | None,
        dfinal: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> Gradients:
        """Run the layer in reverse: the gradients that are ``needed``, in the order of the result.

        None in ``dout`` or ``dfinal`` stands for zero. A backend in Python runs the recurrence and
        leaves the rest to :mod:`fastrnn.backends.products`.
        """
