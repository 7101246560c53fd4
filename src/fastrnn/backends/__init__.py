"""The contract between a backend and everything above it.

A backend is a module with the functions of :class:`LayerBackend`, or, where torch has the operator,
of :class:`StackBackend`. The former runs one :class:`~fastrnn.layer.Layer`, all its directions at
once. Direction 1 is the reverse direction, from the last step of each sequence to the first.

Backends may rely on a contiguous ``x`` and, unless they validate themselves, on
:meth:`fastrnn.layer.Layer.check`: shapes, one dtype, one device. Sizes are those of
:mod:`fastrnn.layer`.

Backends are imported by :mod:`fastrnn.dispatch` when first chosen, and never from here: importing
Triton or Numba takes longer than importing torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, get_num_threads, set_num_threads

from fastrnn.cells import Cell, State
from fastrnn.layer import Layer

__all__ = [
    "Backend",
    "Gradients",
    "LayerBackend",
    "StackBackend",
    "StackSizes",
    "installed",
    "one_thread_in_a_child",
]

_in_a_child = False


def _forked() -> None:
    global _in_a_child
    _in_a_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def one_thread_in_a_child() -> None:
    """Limit torch to one thread after a fork, which OpenMP's threads do not survive.

    torch would otherwise deadlock.
    """
    if _in_a_child and get_num_threads() > 1:
        set_num_threads(1)


# Reading metadata means finding and parsing a file, and use_backend asks at every entry.
@cache
def installed(*packages: str) -> tuple[int, ...] | None:
    """The version of the first package that is installed, without importing it, or None."""
    for name in packages:
        try:
            return tuple(map(int, re.findall(r"\d+", version(name))[:2]))
        except PackageNotFoundError:
            continue
    return None


Gradients = tuple[Tensor | None, ...]
"""The gradients of x, of each field of each direction's weights, and of the states if any.

None where a gradient is not needed.
"""


class StackSizes(NamedTuple):
    """The sizes of a stack of layers, on which a choice of backend may depend.

    ``compiled``: whether the stack is part of a graph of a compiler or of ``torch.export``. Such a
    graph has each layer as one operator of fastrnn, so torch's own operators are not available.
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


class BackendModule(Protocol):
    """What every module in :mod:`fastrnn.backends` offers."""

    __name__: str

    def missing(self) -> str | None:
        """The reason why the backend cannot run on this machine at all, or None."""

    def refuses(
        self,
        cell: Cell,
        dtype: torch.dtype,
        device: torch.device,
        sizes: StackSizes | None = None,
        automatic: bool = False,
    ) -> str | None:
        """The reason why the backend cannot run this cell on such tensors, or None.

        With ``automatic``, also the reason why the next backend is the better choice.
        """

    def empty_cache(self) -> None:
        """Free the memory that is kept from call to call."""

    def describe(self) -> str:
        """A few words on how it runs here, for ``explain`` and bug reports."""


class StackBackend(BackendModule, Protocol):
    """A backend that runs whole stacks of layers, and that torch differentiates."""

    kind: Literal["stack"]

    def run_stack(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        hx: State | None,
        dropout: float,
        training: bool,
    ) -> tuple[Tensor, State]:
        """Run layers from ``hx``, the state of the stack, as :func:`fastrnn.functional.rnn`."""

    def run_step(self, layer: Layer, x: Tensor) -> State:
        """Run one step of a cell, as :func:`fastrnn.functional.step`."""


class LayerBackend(BackendModule, Protocol):
    """A backend that runs one layer, forward and backward.

    Attributes:
        VALIDATES: whether ``forward`` itself raises ValueError where the weights, the state and
            ``x`` do not fit together in size, dtype or device. Otherwise the caller checks first.
    """

    kind: Literal["layer"]
    VALIDATES: bool

    def forward(self, layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
        """Run a layer: ``x [*, I]`` to ``out [*, D*P]``, the final state, and the saved tensor.

        ``*`` is ``T, B`` in a dense batch, ``N`` in a packed one, and ``B`` for one step of a cell.
        The saved tensor has the form of :meth:`saved_spec`; None unless ``save``.
        """

    def backward(
        self,
        layer: Layer,
        x: Tensor,
        out: Tensor,
        saved: Tensor,
        dout: Tensor | None,
        dfinal: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> Gradients:
        """Compute the gradients that are ``needed``, in the order of the result.

        None in ``dout`` or ``dfinal`` stands for zero. A backend in Python runs the recurrence and
        leaves the rest to :mod:`fastrnn.backends.products`.
        """

    def saved_spec(self, layer: Layer, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of the saved tensor, for an input of ``dtype``.

        The shape is ``[D, N, num_saved, units]``, with the H units of the layer, or more.
        """


Backend = LayerBackend | StackBackend
