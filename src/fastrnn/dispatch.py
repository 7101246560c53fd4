"""Which backend runs a layer: the selected one, or the first that can.

An argument beats :func:`use_backend`, which beats the environment variable ``FASTRNN_BACKEND``
(read once, when fastrnn is imported), which beats the automatic choice. A backend that was selected
by name never falls back: if it cannot run, :class:`BackendError` names the reason.
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

from fastrnn.backends import Backend, LayerBackend, StackSizes
from fastrnn.cells import Cell

__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "empty_cache",
    "explain_choice",
    "load_backend",
    "load_layer_backend",
    "resolve_backend",
    "sizes_matter",
    "use_backend",
]

BACKENDS = ("cpp", "numba", "triton", "torch", "reference")
"""Every backend by name, in the order of the automatic choice: the first that does not refuse."""

_environment = os.environ.get("FASTRNN_BACKEND") or None
_unwarned = Lock()  # acquired by the first thread that warns, and never released
_context: ContextVar[str | None] = ContextVar("fastrnn_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was selected by name cannot run, or no backend can."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why.

    Attributes:
        backend: its name.
        reason: how it was selected, and how it runs here.
        rejected: the backends earlier in the order, each with the reason why it was not chosen.
    """

    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        return "\n".join(lines)


@cache
def load_backend(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    return cast(Backend, import_module(f"fastrnn.backends.{name}"))


def load_layer_backend(name: str) -> LayerBackend:
    """The module of a backend that runs single layers.

    Raises:
        ValueError: there is no such backend of that name.
    """
    backend = load_backend(name)
    if backend.kind != "layer":
        raise ValueError(f"expected a backend that runs single layers, got {name!r}")
    return backend


def empty_cache() -> None:
    """Free the memory that backends keep for reuse, e.g. after an unusually large batch.

    Memory that a live graph or a running call uses is not affected. The next call allocates anew.
    """
    for name in BACKENDS:
        if module := sys.modules.get(f"fastrnn.backends.{name}"):
            cast(Backend, module).empty_cache()


def _unknown(name: str) -> str:
    return f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}"


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every layer called inside the block on one backend; ``None`` undoes an outer block.

    The choice holds for the thread (or the asyncio task) that enters the block. The backward pass
    runs on the backend of the forward pass. ``torch.utils.checkpoint`` is different: it repeats the
    forward pass when and where the backward pass is called, on a GPU in an autograd thread. Set
    ``FASTRNN_BACKEND`` there.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: it cannot run on this machine.

    >>> import torch, fastrnn
    >>> with fastrnn.use_backend("reference"):
    ...     output, h_n = fastrnn.GRU(3, 4)(torch.randn(5, 2, 3))
    """
    if name is not None:
        if name not in BACKENDS:  # the name may not be hashable, as load_backend's cache needs
            raise ValueError(_unknown(name))
        _require(name, load_backend(name).missing())
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def _require(name: str, problem: str | None) -> None:
    if problem is not None:
        raise BackendError(f"the backend {name!r} was selected and cannot run: {problem}")


def explain_choice(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    sizes: StackSizes | None = None,
) -> Choice:
    """The backend that runs ``cell`` on tensors of ``dtype`` on ``device``, and why.

    Where the choice depends on sizes (see :func:`sizes_matter`), the answer without them is that
    for some small layer.

    Raises:
        ValueError: the selected backend does not exist.
        BackendError: the selected backend cannot run this.
    """
    return _select(cell, dtype, device, sizes, *_requested(backend))


def _select(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: StackSizes | None,
    name: str | None,
    source: str,
) -> Choice:
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"{_unknown(name)}, selected by {source}")
        module = load_backend(name)
        _require(name, module.missing() or module.refuses(cell, dtype, device, sizes))
        return Choice(name, f"selected by {source}; {module.describe()}")
    rejected: dict[str, str] = {}
    for name in BACKENDS:
        module = load_backend(name)
        problem = module.missing() or module.refuses(cell, dtype, device, sizes, automatic=True)
        if problem is None:
            return Choice(name, f"automatic choice; {module.describe()}", rejected)
        rejected[name] = problem
    raise BackendError(
        f"no backend can run this: {'; '.join(f'{b}: {why}' for b, why in rejected.items())}"
    )


def _requested(backend: str | None) -> tuple[str | None, str]:
    """The name of the selected backend, and where it was selected."""
    if backend is not None:
        return backend, "the argument backend="
    context = _context.get()
    if context is not None:
        return context, "use_backend"
    return _environment, "FASTRNN_BACKEND"


@lru_cache(maxsize=4096)
def _select_cached(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: StackSizes | None,
    name: str | None,
    source: str,
    precision: object,
) -> Backend:
    choice = _select(cell, dtype, device, sizes, name, source)
    if name is None and device.type == "cpu":
        _warn_without_extension()
    return load_backend(choice.backend)


def _warn_without_extension() -> None:
    problem = load_backend("cpp").missing()
    if problem is None or not _unwarned.acquire(blocking=False):
        return
    numba: Any = load_backend("numba")
    fused = numba.missing() is None and numba.broken() is None
    warnings.warn(
        f"fastrnn runs without its C++ backend: {problem}. "
        + (
            "The Numba backend or torch's own operators run in its place, and both are slower"
            if fused
            else "`pip install fastrnn[numba]` adds fused kernels that need no compiler; without "
            "them torch's own operators run"
        )
        + "; see `python -m fastrnn info`",
        RuntimeWarning,
        stacklevel=_level_of_caller(),
    )


def _level_of_caller() -> int:
    """The stack level of the first frame outside fastrnn and torch, for ``stacklevel=``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fastrnn",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


@cache
def sizes_matter(on_cpu: bool) -> bool:
    """Whether the choice may depend on sizes: not with C++ on a CPU, the fastest at all of them."""
    return not on_cpu or load_backend("cpp").missing() is not None


def resolve_backend(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: StackSizes | None,
    backend: str | None,
) -> Backend:
    """The module that :func:`explain_choice` names, from a cache, since every call asks."""
    precision = None if device.type == "cpu" else _cudnn_precision()
    return _select_cached(cell, dtype, device, sizes, *_requested(backend), precision)


def _cudnn_precision() -> str:
    # Imported when a GPU is used: importing fastrnn loads no kernels.
    from fastrnn.kernels.triton.plans import cudnn_precision

    setting: str = cudnn_precision()
    return setting
