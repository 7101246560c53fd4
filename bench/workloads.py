"""The cases of every benchmark, and the tensors of each case."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

CELLS = ("RNN", "GRU", "LSTM")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
PASSES = ("inference", "training")


class Shape(NamedTuple):
    """Steps T, batch B, input size I, hidden size H."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"({self.T}, {self.B}, {self.I}, {self.H})"


@dataclass(frozen=True)
class Case:
    """One measurement: a forward pass, and in training also a full backward pass.

    Attributes:
        packed: sequences have uniformly random lengths, at least one of them T steps.
        last: the output of the last step is the only one that has a gradient, as when a network is
            trained on one label per sequence. The gradient fades on its way to the first step.
        one_step: uses the cell module, such as ``nn.LSTMCell``; T is 1.
        threads: None for the number of threads of the run.
        deterministic: runs under ``torch.use_deterministic_algorithms``, where calls of few rows
            cost more.
    """

    cell: str
    which: str
    shape: Shape
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    last: bool = False
    one_step: bool = False
    threads: int | None = None
    deterministic: bool = False

    @property
    def training(self) -> bool:
        return self.which == "training"

    @property
    def variant(self) -> str:
        names = {
            "2 layers": self.layers == 2,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
            "last": self.last,
            "cell": self.one_step,
            "1 thread": self.threads == 1,
            "deterministic": self.deterministic,
        }
        return ", ".join(name for name, applies in names.items() if applies)

    def __str__(self) -> str:
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.cell}-{self.which}-{'x'.join(map(str, self.shape))}{variant}".replace(
            " ", ""
        )


EVEN = (
    Shape(1, 1, 64, 64),
    Shape(1, 1, 512, 512),
    Shape(100, 1, 64, 64),
    Shape(100, 1, 256, 256),
    Shape(100, 1, 512, 512),
    Shape(100, 32, 64, 64),
    Shape(100, 32, 256, 256),
    Shape(50, 64, 512, 512),
    Shape(25, 64, 1024, 1024),
    Shape(200, 128, 128, 128),
    Shape(1000, 8, 32, 32),
)
# Maps each odd shape to an even neighbour. Their throughput is compared in the same rounds.
ODD = {
    Shape(37, 5, 48, 96): Shape(37, 6, 48, 96),
    Shape(80, 17, 40, 200): Shape(80, 18, 48, 208),
    Shape(128, 24, 300, 384): Shape(128, 24, 304, 384),
    Shape(60, 3, 23, 127): Shape(60, 4, 32, 128),
}
LAST = (
    Shape(200, 16, 64, 64),
    Shape(300, 32, 256, 256),
    Shape(500, 32, 128, 128),
    Shape(1000, 16, 64, 64),
)


def cases() -> list[Case]:
    grid = [Case(*c) for c in product(CELLS, PASSES, (*EVEN, *ODD))]
    variants = [
        replace(Case(cell, which, shape), **change)
        for cell, which in product(CELLS, PASSES)
        for shape, change in (
            (Shape(1, 1, 64, 64), {"one_step": True}),
            (Shape(1, 1, 64, 64), {"deterministic": True}),
            (Shape(1, 1, 512, 512), {"deterministic": True}),
            (Shape(100, 1, 64, 64), {"bidirectional": True}),
            (Shape(100, 32, 64, 64), {"bidirectional": True}),
            (Shape(100, 32, 64, 64), {"layers": 2}),
            (Shape(100, 32, 64, 64), {"packed": True}),
            (Shape(100, 32, 256, 256), {"packed": True}),
            (Shape(100, 32, 64, 64), {"threads": 1}),
            (Shape(100, 32, 256, 256), {"threads": 1}),
            (Shape(50, 64, 512, 512), {"threads": 1}),
        )
    ]
    last = [
        Case(cell, "training", shape, last=last)
        for cell, shape, last in product(CELLS, LAST, (True, False))
    ]
    return grid + variants + last


@dataclass
class Problem:
    """The tensors of a case, the same for every competitor."""

    module: nn.Module
    x: Tensor  # [T, B, I]; for one step, [B, I]
    state: tuple[Tensor, ...]  # [L*D, B, H] each; for one step, [B, H]
    cotangent: Tensor  # gradient of the output, [T, B, D*H]; for one step, [B, H]
    lengths: Tensor | None

    @property
    def hx(self) -> Tensor | tuple[Tensor, ...]:
        return self.state if len(self.state) > 1 else self.state[0]

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """A copy on another device; the lengths of a packed batch stay on the CPU."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype, copy=True)

        return replace(
            self,
            module=copy.deepcopy(self.module).to(device, dtype),
            x=moved(self.x),
            state=tuple(map(moved, self.state)),
            cotangent=moved(self.cotangent),
        )

    def pack(self, padded: Tensor) -> PackedSequence:
        assert self.lengths is not None
        return pack_padded_sequence(padded, self.lengths)


def make(library: Any, case: Case) -> nn.Module:
    """The module of a case, from a library with the class names of torch.nn."""
    _, _, I, H = case.shape
    if case.one_step:
        return getattr(library, f"{case.cell}Cell")(I, H)
    return getattr(library, case.cell)(I, H, case.layers, bidirectional=case.bidirectional)


def problem(case: Case) -> Problem:
    torch.manual_seed(0)
    T, B, I, H = case.shape
    D = 2 if case.bidirectional else 1
    module = make(nn, case).train(case.training)
    states = 2 if case.cell == "LSTM" else 1
    if case.one_step:
        state = tuple(torch.randn(B, H) for _ in range(states))
        return Problem(module, torch.randn(B, I), state, torch.randn(B, H), None)
    lengths = None
    if case.packed:
        lengths = torch.randint(1, T + 1, (B,)).sort(descending=True).values
        lengths[0] = T
    cotangent = torch.randn(T, B, D * H)
    if case.last:
        cotangent[:-1] = 0
    return Problem(
        module,
        torch.randn(T, B, I),
        tuple(torch.randn(case.layers * D, B, H) for _ in range(states)),
        cotangent,
        lengths,
    )


def flops(case: Case) -> float:
    """Flops of the matrix products alone, the least that any implementation needs.

    With ``last``, those of the forward pass: how far back the gradient reaches is not known.
    """
    T, B, I, H = case.shape
    D = 2 if case.bidirectional else 1
    rows = float(T * B) if not case.packed else float(problem(case).lengths.sum())  # type: ignore[union-attr]
    total = 0.0
    for layer in range(case.layers):
        forward = 2.0 * rows * GATES[case.cell] * H * ((D * H if layer else I) + H) * D
        total += 3 * forward if case.training and not case.last else forward
    return total


def weight_bytes(case: Case) -> list[tuple[float, float]]:
    """Bytes of W_ih and of W_hh for each layer, summed over its directions."""
    _, _, I, H = case.shape
    D = 2 if case.bidirectional else 1
    column = 4.0 * GATES[case.cell] * H * D
    return [(column * (D * H if layer else I), column * H) for layer in range(case.layers)]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
