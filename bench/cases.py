"""The grid of shapes and the cells that every benchmark walks."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Steps T, batch B, input size I, hidden size H."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"({self.T}, {self.B}, {self.I}, {self.H})"


EVEN = [
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
]
ODD = [
    Shape(37, 5, 48, 96),
    Shape(80, 17, 40, 200),
    Shape(128, 24, 300, 384),
    Shape(60, 3, 23, 127),
]
GRID = EVEN + ODD

CELLS = ("RNN", "GRU", "LSTM")
PASSES = ("inference", "training")
