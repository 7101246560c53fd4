"""Types of csrc/bindings.cpp. A tensor is identified by its attributes, not by its class."""

from collections.abc import Callable

from torch import Tensor

_Tensors = tuple[Tensor, ...]
_Weights = tuple[tuple[Tensor | None, ...], ...]

class Scratch:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def forward(
    isa: str,
    cell: int,
    threads: int,
    deterministic: bool,
    batch_sizes: Tensor | None,
    x: Tensor,
    weights: _Weights,
    state: _Tensors | None,
    save: bool,
    /,
) -> tuple[Tensor, _Tensors, Tensor | None]: ...
def backward(
    isa: str,
    cell: int,
    threads: int,
    deterministic: bool,
    batch_sizes: Tensor | None,
    x: Tensor,
    weights: _Weights,
    state: _Tensors | None,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: tuple[Tensor | None, ...] | None,
    needed: tuple[bool, ...],
    /,
) -> tuple[Tensor | None, ...]: ...
def make_large(bytes: int, make: Callable[..., Tensor]) -> None: ...
def cells() -> tuple[tuple[str, int, int, int, int, bool], ...]: ...
def isas() -> tuple[str, ...]: ...
def threading() -> str | None: ...
def release() -> None: ...
def poison(on: bool) -> None: ...
