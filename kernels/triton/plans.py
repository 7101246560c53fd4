"""How a layer is divided among programs, and which plan is taken: no triton is imported here.

A plan is looked up by architecture, cell, precision and hidden size, never by T or B. Those of
sm_90 in ``table.py`` were chosen by time on an H200, the others by what the compiler says a kernel
takes.
``python -m fastrnn aot`` compiles and checks every row again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

__all__ = [
    "BUCKETS",
    "DEVICES",
    "LIMITS",
    "MODES",
    "Plan",
    "Plans",
    "Step",
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

    def programs(self, H: int) -> int:
        """How many share a layer's units."""
        return 1 if self.sync == "program" else -(-H // self.units)

    def apart(self) -> Plan:
        """With a launch for each step and small tiles, where programs do not fit on the device."""
        return replace(self, sync="launch", resident=False, units=self.units or 16, depth=16)

    def kinds(self) -> list[Plan]:
        """The plan, and what runs instead where not all of its programs fit at once."""
        return [self, self.apart()] if self.sync == "grid" else [self]

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
    "cuda:90": Limits(227 << 10, 64 << 10, 32, 132),
    "cuda:100": Limits(227 << 10, 64 << 10, 32, 132),
    "hip:gfx942": Limits(64 << 10, 128 << 10, 64, 228),
}

BUCKETS = (64, 128, 256, 512, 1024, 2048)
"""Hidden sizes up to which a row of the table reaches; there are no kernels beyond the last."""

# Modes that differ in a function of one argument share their plans, but for rows of their own.
_FAMILY = {"RNN_TANH": "RNN", "RNN_RELU": "RNN", "GRU": "GRU", "LSTM": "LSTM"}
MODES = tuple(_FAMILY)


def shares(mode: str) -> bool:
    """Whether the mode only has rows of its own where those of its family do not hold for it."""
    return mode == "RNN_RELU"


def names(mode: str) -> tuple[str, ...]:
    """Under which names the plan table may have a mode's row; the first that it has is the one."""
    return (mode, _FAMILY[mode]) if mode in _FAMILY else ()


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How products are computed: "16-bit", or float32 like torch's cuDNN RNNs, "tf32" or "ieee"."""
    if dtype.itemsize == 2:
        return "16-bit"
    if hip:
        return "ieee"
    # torch before 2.9 has one setting for all of cuDNN.
    setting = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    if setting is None:
        setting = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


@cache
def find(
    architecture: str, mode: str, precision: str, H: int, gates: int = 1, proj_size: int = 0
) -> Plans | None:
    """The plans of a row of the table; None if there is none.

    The weights of a projection stay with a program too, so they count like more units; where
    weights are read at every step, all have room.
    """
    from fastrnn.kernels.triton.table import TABLE

    most = BUCKETS[-1]
    if most >= H:
        H = min(most, H + -(-proj_size // gates))
    bucket = next((b for b in BUCKETS if b >= H), None)
    rows = (TABLE.get((architecture, name, precision, bucket)) for name in names(mode))
    return next((plans for plans in rows if plans), None)


def has_own_row(architecture: str, mode: str, precision: str, bucket: int) -> bool:
    """Whether a row of the table is for this mode alone, or for all that share it."""
    from fastrnn.kernels.triton.table import TABLE

    return not shares(mode) or (architecture, mode, precision, bucket) in TABLE


class Device(NamedTuple):
    """What data sheets say of a GPU.

    Attributes:
        clock: cycles a second.
        flops: of a processor and cycle, by the precision of products.
    """

    processors: int
    clock: float
    flops: dict[str, int]


# Taken for all of them. Bytes a cycle and processor: from its own memory, from L2, and from L2 if
# all read at once. Seconds, as they decide best what an H200 measured: from a store in a processor
# to a load in another, with what else a step waits for; and of a step that a library launches.
SHARED, INGEST, CACHE = 128, 64, 24
BARRIER, LAUNCH = 1.8e-6, 5e-6

# A100 SXM, H100 SXM, B200, MI300X.
DEVICES = {
    "cuda:80": Device(108, 1.41e9, {"16-bit": 2048, "tf32": 1024, "ieee": 128}),
    "cuda:90": Device(132, 1.83e9, {"16-bit": 4096, "tf32": 2048, "ieee": 256}),
    "cuda:100": Device(148, 1.85e9, {"16-bit": 8192, "tf32": 4096, "ieee": 256}),
    "hip:gfx942": Device(304, 2.1e9, {"16-bit": 2048, "ieee": 256}),
}


class Step(NamedTuple):
    """A step of a layer on paper, forward; in reverse the same weights meet as many sequences.

    Attributes:
        B: sequences, of all directions.
    """

    gates: int
    H: int
    proj_size: int
    B: int
    precision: str

    @property
    def weights(self) -> int:
        """Elements that a sequence is multiplied with."""
        return self.gates * self.H * (self.proj_size or self.H) + self.proj_size * self.H

    @property
    def meetings(self) -> int:
        return 2 if self.proj_size else 1

    @property
    def itemsize(self) -> int:
        return 2 if self.precision == "16-bit" else 4

    def least_time(self, plan: Plan, device: Device) -> dict[str, float]:
        """Seconds by a plan, by what they are spent on."""
        groups, programs = -(-self.B // plan.rows), plan.programs(self.H)
        at_once = max(1, min(groups, device.processors // programs))
        waves = -(-groups // at_once)
        weights = self.itemsize * self.weights
        if plan.resident:
            weights_take = weights / programs / (SHARED * device.clock)
        else:
            weights_take = at_once * weights / (device.processors * CACHE * device.clock)
        h_takes = 0.0
        if plan.sync != "program":
            # What each meeting passes on, to every program.
            passed = plan.rows * ((self.proj_size or self.H) + self.H * (self.meetings - 1))
            bandwidth = min(INGEST, device.processors * CACHE / (at_once * programs))
            h_takes = self.itemsize * passed / (bandwidth * device.clock)
        flops = 2.0 * plan.rows * self.weights / programs
        parts = {
            "weights": weights_take,
            "h": h_takes,
            "products": flops / (device.flops[self.precision] * device.clock),
            "barrier": 0.0 if plan.sync == "program" else self.meetings * BARRIER,
        }
        return {name: waves * seconds for name, seconds in parts.items()}

    def launched_time(self, device: Device) -> float:
        """Seconds if it is launched, reads its weights from L2, and is otherwise perfect."""
        cycles = max(
            self.itemsize * self.weights / CACHE,
            2.0 * self.B * self.weights / device.flops[self.precision],
        )
        return float(self.meetings * LAUNCH + cycles / (device.processors * device.clock))
