"""Which backend runs a layer: the one asked for, or the first that can.

An argument beats :func:`use_backend`, which beats the environment variable ``FASTRNN_BACKEND``
(read once, when fastrnn is imported), which beats the automatic choice. What was asked for by name
never falls back: if it cannot run, :class:`BackendError` says what is missing.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from threading import Lock
from typing import Any, cast

import torch

from fastrnn.backends import Backend, Choosable, Sizes, Stacks
from fastrnn.cells import Cell

__all__ = ["BACKENDS", "BackendError", "Choice", "choose", "empty_cache", "load", "use_backend"]

BACKENDS = ("cpp", "numba", "triton", "torch", "reference")
"""Every backend by name, in the order of the automatic choice: the first that does not refuse."""

_environment = os.environ.get("FASTRNN_BACKEND") or None
_unwarned = Lock()  # whoever takes it warns, and nobody gives it back
_context: ContextVar[str | None] = ContextVar("fastrnn_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run, or none can."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs and why.

    Attributes:
        backend: its name.
        reason: who asked for it, and how it runs here.
        rejected: the faster backends that cannot, each with the reason.
    """

    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        return "\n".join(lines)


@cache
def load(name: str) -> Choosable:
    """The module of a backend.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    return cast(Choosable, import_module(f"fastrnn.backends.{name}"))


def empty_cache() -> None:
    """Give back the memory that backends keep for reuse, as after the one large batch of a day.

    What a live graph or a running call holds stays. The next call takes memory anew.
    """
    for name in BACKENDS:
        if module := sys.modules.get(f"fastrnn.backends.{name}"):
            cast(Choosable, module).empty_cache()


def _unknown(name: str) -> str:
    return f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}"


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every layer called inside the block on one backend; ``None`` undoes an outer block.

    The choice belongs to the thread (or the asyncio task) that enters the block. The backward pass
    runs where the forward pass ran; but what ``torch.utils.checkpoint`` computes again, it computes
    when and where the backward pass is called, on a GPU in a thread of autograd's: set
    ``FASTRNN_BACKEND`` there.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: it cannot run on this machine.

    >>> import torch, fastrnn
    >>> with fastrnn.use_backend("reference"):
    ...     output, h_n = fastrnn.GRU(3, 4)(torch.randn(5, 2, 3))
    """
    if name is not None:
        if name not in BACKENDS:  # which need not be something to remember
            raise ValueError(_unknown(name))
        _require(name, load(name).missing())
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def _require(name: str, problem: str | None) -> None:
    if problem is not None:
        raise BackendError(f"the backend {name!r} was asked for and cannot run: {problem}")


def choose(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    sizes: Sizes | None = None,
) -> Choice:
    """Which backend runs ``cell`` on tensors of ``dtype`` on ``device``, and why.

    On a GPU it also depends on sizes; without them the answer is that for some small layer.

    Raises:
        ValueError: the one asked for does not exist.
        BackendError: the one asked for cannot run this.
    """
    return _choose(cell, dtype, device, sizes, *_asked(backend))


def _choose(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None,
    name: str | None,
    who: str,
) -> Choice:
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"{_unknown(name)}, asked for by {who}")
        module = load(name)
        _require(name, module.missing() or module.refuses(cell, dtype, device, sizes))
        return Choice(name, f"asked for by {who}; {module.describe()}")
    rejected: dict[str, str] = {}
    for name in BACKENDS:
        module = load(name)
        problem = module.missing() or module.refuses(cell, dtype, device, sizes, automatic=True)
        if problem is None:
            return Choice(name, f"automatic choice; {module.describe()}", rejected)
        rejected[name] = problem
    raise BackendError(
        f"no backend can run this: {'; '.join(f'{b}: {why}' for b, why in rejected.items())}"
    )


def _asked(backend: str | None) -> tuple[str | None, str]:
    if backend is not None:
        return backend, "the argument backend="
    context = _context.get()
    if context is not None:
        return context, "use_backend"
    return _environment, "FASTRNN_BACKEND"


@lru_cache(maxsize=4096)
def _chosen(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None,
    name: str | None,
    who: str,
    setting: object,
) -> Backend | Stacks:
    choice = _choose(cell, dtype, device, sizes, name, who)
    if name is None and device.type == "cpu":
        _warn_without_extension()
    return cast("Backend | Stacks", load(choice.backend))


def _warn_without_extension() -> None:
    problem = load("cpp").missing()
    if problem is None or not _unwarned.acquire(blocking=False):
        return
    numba: Any = load("numba")
    fused = numba.missing() is None and numba.broken() is None
    warnings.warn(
        f"fastrnn runs without its C++ backend: {problem}. "
        + (
            "The Numba backend stands in for it, or torch's own operators, and both are slower"
            if fused
            else "`pip install fastrnn[numba]` brings fused kernels that need no compiler; until "
            "then torch's own operators run"
        )
        + "; `python -m fastrnn info` says more",
        RuntimeWarning,
        stacklevel=_level_of_caller(),
    )


def _level_of_caller() -> int:
    """How far up whoever called a layer is, for a warning of the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fastrnn",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


@cache
def sizes_matter(on_cpu: bool) -> bool:
    """Whether a choice may depend on sizes: the C++ backend is the fastest at all of them."""
    return not on_cpu or load("cpp").missing() is not None


def pick(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None,
    backend: str | None,
) -> Backend | Stacks:
    """The module that :func:`choose` names; remembered, since every call asks."""
    setting = None if device.type == "cpu" else _precision()
    return _chosen(cell, dtype, device, sizes, *_asked(backend), setting)


def _precision() -> object:
    """Of float32 RNNs on a GPU, on which a choice depends; before torch 2.9 of all cuDNN."""
    cudnn = torch.backends.cudnn
    return getattr(getattr(cudnn, "rnn", None), "fp32_precision", None) or cudnn.allow_tf32
