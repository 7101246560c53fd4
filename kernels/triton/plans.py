"""How a layer is divided among programs, and which plan is taken: no triton is imported here.

A plan is looked up by architecture, cell, precision and hidden size, never by T or B. The table in
``table.py`` was chosen by what the compiler says a kernel takes, and ``python -m fastrnn aot``
compiles and checks every row of it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

__all__ = [
    "BUCKETS",
    "LIMITS",
    "MODES",
    "Plan",
    "Plans",
    "Target",
    "find",
    "precision",
    "program",
    "resident",
    "streaming",
]


@dataclass(frozen=True)
class Plan:
    """How a layer is divided among programs.

    Args:
        sync: how programs that share sequences meet: "program", "grid" or "launch"; see
            ``sequence.py``.
        resident: whether a program's weights stay with it for all steps; else they are read at
            every step.
        units: hidden units of a program, and elements of a projected h; with ``sync="program"``
            they are all its own.
        depth: a product's K is cut into tiles of so many, times ``split``.
        split: so many parts of K are summed side by side, for products with too few columns to
            give every warp some.
        warps: of a program.
        rows: sequences of a program.
    """

    sync: str
    resident: bool
    units: int
    depth: int
    split: int
    warps: int
    rows: int = 16

    def apart(self) -> Plan:
        """With a launch for each step and small tiles, where not all programs fit on the device."""
        return replace(self, sync="launch", resident=False, depth=16)

    def __str__(self) -> str:
        if self.sync == "program":
            return f"program({self.warps})"
        name = "stepwise" if self.sync == "launch" else "resident" if self.resident else "streaming"
        return f"{name}({self.units}, {self.depth}, {self.split}, {self.warps})"


def program(warps: int) -> Plan:
    """All steps and all units in one program: small H."""
    return Plan("program", True, 0, 16, 1, warps)


def resident(units: int, depth: int, split: int, warps: int) -> Plan:
    """All steps in one launch, units over programs that keep their weights."""
    return Plan("grid", True, units, depth, split, warps)


def streaming(units: int, depth: int, split: int, warps: int) -> Plan:
    """All steps in one launch, units over programs that read their weights at every step."""
    return Plan("grid", False, units, depth, split, warps)


class Plans(NamedTuple):
    forward: Plan
    backward: Plan


class Target(NamedTuple):
    """What a plan is run on.

    Attributes:
        precision: as :func:`precision` says.
        programs_at_once: how many surely run at the same time, and so may wait for each other.
        amd: whether it is a GPU of AMD's.
    """

    precision: str
    programs_at_once: int
    amd: bool


class Limits(NamedTuple):
    """What a program of an architecture may take.

    Attributes:
        shared: bytes of shared memory.
        registers: of 32 bits, of all threads of a program together.
        warp: threads of a warp.
        processors: that a plan of the table may count on. A device with fewer, whole or a part of
            one, gets a launch for each step where that is too few.
    """

    shared: int
    registers: int
    warp: int
    processors: int


# Of the CUDA programming guide's table of compute capabilities, and of the CDNA3 instruction set:
# four SIMDs of 512 registers times 64 lanes.
LIMITS = {
    "cuda:80": Limits(163 << 10, 64 << 10, 32, 108),
    "cuda:90": Limits(227 << 10, 64 << 10, 32, 114),
    "cuda:100": Limits(227 << 10, 64 << 10, 32, 132),
    "hip:gfx942": Limits(64 << 10, 128 << 10, 64, 228),
}

BUCKETS = (64, 128, 256, 512, 1024, 2048)
"""Hidden sizes up to which a row of the table reaches; there are no kernels beyond the last."""

# Modes that differ in a function of one argument share their plans.
_FAMILY = {"RNN_TANH": "RNN", "RNN_RELU": "RNN", "GRU": "GRU", "LSTM": "LSTM"}
MODES = tuple(_FAMILY)


def family(mode: str) -> str | None:
    return _FAMILY.get(mode)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How products are computed: "16-bit", or float32 like torch's cuDNN RNNs, "tf32" or "ieee"."""
    if dtype.itemsize == 2:
        return "16-bit"
    if hip:
        return "ieee"
    # torch before 2.9 has one setting for all of cuDNN.
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is not None and rnn.fp32_precision != "none":
        return "tf32" if rnn.fp32_precision == "tf32" else "ieee"
    return "tf32" if rnn is None and torch.backends.cudnn.allow_tf32 else "ieee"


@cache
def find(architecture: str, mode: str, precision: str, H: int) -> Plans | None:
    """The plans of a row of the table; None if there is none."""
    from fastrnn.kernels.triton.table import TABLE

    bucket = next((b for b in BUCKETS if b >= H), None)
    plans: Plans | None = TABLE.get((architecture, family(mode), precision, bucket))
    return plans


class Device(NamedTuple):
    """What a step cannot be faster than; bytes and flops a second, seconds.

    Attributes:
        shared: bandwidth of one processor's shared memory.
        ingest: what one processor can read from L2.
        cache: what all read from L2 together.
        flops: of all processors, 16-bit products.
        barrier: from a store in one processor to a load in another, and back.
        launch: between dependent kernels of a graph.
    """

    processors: int
    shared: float
    ingest: float
    cache: float
    flops: float
    barrier: float
    launch: float


# Processors, clock and flops of the H100 SXM's data sheet; the rest is assumed: 128 bytes a cycle
# of 1.75 GHz from shared memory, 64 from L2.
H100 = Device(132, 128 * 1.75e9, 64 * 1.75e9, 5.5e12, 990e12, 0.7e-6, 2e-6)


def least_time(plan: Plan, gates: int, H: int, B: int, device: Device) -> dict[str, float]:
    """Seconds of a forward step of 16-bit weights on paper, by what they are spent on."""
    groups = -(-B // plan.rows)
    programs = 1 if plan.sync == "program" else -(-H // plan.units)
    at_once = max(1, min(groups, device.processors // programs))
    waves = -(-groups // at_once)
    weights, h = 2.0 * gates * H * H, 2.0 * plan.rows * H
    if plan.resident:
        weights_take = weights / programs / device.shared
    else:
        weights_take = at_once * weights / device.cache
    h_takes = 0.0
    if plan.sync != "program":
        h_takes = max(h / device.ingest, at_once * programs * h / device.cache)
    multiply = 2.0 * plan.rows * gates * H * H / programs * device.processors / device.flops
    barrier = 0.0 if plan.sync == "program" else device.barrier
    parts = {"weights": weights_take, "h": h_takes, "products": multiply, "barrier": barrier}
    return {name: waves * seconds for name, seconds in parts.items()}


def launched_time(gates: int, H: int, B: int, device: Device) -> float:
    """A step that is launched, reads its weights from L2, and is otherwise perfect."""
    weights, flops = 2.0 * gates * H * H, 2.0 * B * gates * H * H
    return device.launch + max(weights / device.cache, flops / device.flops)
