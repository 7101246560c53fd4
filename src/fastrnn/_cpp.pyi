"""Types of csrc/bindings.cpp. Tensors are asked for what they are, whatever their class."""

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
    batch_sizes: Tensor | None,
    N: int,
    B: int,
    I: int,
    H: int,
    P: int,
    D: int,
    x: Tensor,
    weights: _Weights,
    state: _Tensors | None,
    out: Tensor,
    final: _Tensors,
    saved: Tensor | None,
    /,
) -> None: ...
def backward(
    isa: str,
    cell: int,
    threads: int,
    batch_sizes: Tensor | None,
    N: int,
    B: int,
    I: int,
    H: int,
    P: int,
    D: int,
    weights: _Weights,
    state: _Tensors | None,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: tuple[Tensor | None, ...] | None,
    dpre: Tensor,
    dbias: Tensor,
    dstate: _Tensors,
    dh: Tensor | None,
    /,
) -> None: ...
def matmul(isa: str, threads: int, a: Tensor, b: Tensor, c: Tensor, add: bool, /) -> None: ...
def cells() -> tuple[tuple[str, int, int, int, int, bool], ...]: ...
def isas() -> tuple[str, ...]: ...
def threading() -> str | None: ...
def release() -> None: ...
def poison(on: bool) -> None: ...
