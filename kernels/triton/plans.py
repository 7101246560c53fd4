"""How a layer is divided among programs, and the choice of a plan. Does not import triton.

A plan is looked up by architecture, cell, precision and hidden size, never by T or B. In
``table.py``, the plans of sm_90 were chosen by time on an H200; the others were chosen by the
resources that the compiler reports for a kernel. ``python -m fastrnn.kernels.triton`` compiles and
checks every entry again.
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
    "cudnn_precision",
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
        sync: how programs that share sequences synchronise: "program", "grid" or "launch"; see
            ``sequence.py``.
        resident: whether a program keeps its weights for all steps; otherwise it reads them at
            every step.
        units: hidden units of a program, and elements of a projected h; unused with
            ``sync="program"``, where a program has all of them.
        depth: a product's K is cut into tiles of ``depth * split``.
        split: the number of parts of K that are summed side by side, for products with too few
            columns to occupy every warp.
        warps: per program.
        rows: sequences per program.
    """

    sync: str
    resident: bool
    units: int
    depth: int
    split: int
    warps: int
    rows: int = 16

    def programs(self, H: int) -> int:
        """The number of programs that share the units of a layer."""
        return 1 if self.sync == "program" else -(-H // self.units)

    def as_stepwise(self) -> Plan:
        """One launch per step and small tiles, where the programs do not all fit on the device."""
        return replace(self, sync="launch", resident=False, units=self.units or 16, depth=16)

    def kinds(self) -> list[Plan]:
        """The plan, and the one that replaces it where its programs do not all fit at once."""
        return [self, self.as_stepwise()] if self.sync == "grid" else [self]

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
    """The device that runs a plan.

    Attributes:
        precision: as returned by :func:`precision`.
        programs_at_once: the number of programs that are guaranteed to run at the same time, and
            so may wait for each other.
        amd: whether it is an AMD GPU.
    """

    precision: str
    programs_at_once: int
    amd: bool


class Limits(NamedTuple):
    """The resources of an architecture.

    Attributes:
        shared: bytes of shared memory per program.
        registers: 32-bit registers of all threads of a program together.
        warp: threads per warp.
        processors: the number that a plan of the table may rely on. A device with fewer, or a
            partition of a device, runs one launch per step where a plan needs more.
    """

    shared: int
    registers: int
    warp: int
    processors: int


# From the table of compute capabilities in the CUDA programming guide, and from the CDNA3
# instruction set: four SIMDs of 512 registers times 64 lanes.
LIMITS = {
    "cuda:80": Limits(163 << 10, 64 << 10, 32, 108),
    "cuda:90": Limits(227 << 10, 64 << 10, 32, 132),
    "cuda:100": Limits(227 << 10, 64 << 10, 32, 132),
    "hip:gfx942": Limits(64 << 10, 128 << 10, 64, 228),
}

BUCKETS = (64, 128, 256, 512, 1024, 2048)
"""The largest hidden size of each entry of the table; there are no kernels beyond the last."""

# Modes that differ only in a function of one argument share plans, except where one has an entry
# of its own.
_FAMILY = {"RNN_TANH": "RNN", "RNN_RELU": "RNN", "GRU": "GRU", "LSTM": "LSTM"}
MODES = tuple(_FAMILY)


def shares(mode: str) -> bool:
    """Whether the mode uses its family's entries, except where one does not hold for it."""
    return mode == "RNN_RELU"


def names(mode: str) -> tuple[str, ...]:
    """The names under which the plan table may have an entry for a mode; the first found counts."""
    return (mode, _FAMILY[mode]) if mode in _FAMILY else ()


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How products are computed: "16-bit", or "tf32" or "ieee" as torch sets it for cuDNN RNNs."""
    if dtype.itemsize == 2:
        return "16-bit"
    return "ieee" if hip else cudnn_precision()


def cudnn_precision() -> str:
    """torch's setting for float32 RNNs in cuDNN, "tf32" or "ieee"."""
    cudnn = torch.backends.cudnn
    # torch before 2.9 has one setting for all of cuDNN.
    setting = getattr(getattr(cudnn, "rnn", None), "fp32_precision", None)
    return "tf32" if setting == "tf32" or (setting is None and cudnn.allow_tf32) else "ieee"


@cache
def find(
    architecture: str, mode: str, precision: str, H: int, gates: int = 1, proj_size: int = 0
) -> Plans | None:
    """The plans of an entry of the table; None if there is none.

    Resident weights include those of a projection, so a projection counts as more units, up to the
    last bucket: there weights are read at every step, and any number fits.
    """
    from fastrnn.kernels.triton.table import TABLE

    limit = BUCKETS[-1]
    if limit >= H:
        H = min(limit, H + -(-proj_size // gates))
    bucket = next((b for b in BUCKETS if b >= H), None)
    entries = (TABLE.get((architecture, name, precision, bucket)) for name in names(mode))
    return next((plans for plans in entries if plans), None)


def has_own_entry(architecture: str, mode: str, precision: str, bucket: int) -> bool:
    """False if the mode only reuses an entry that another mode of its family has."""
    from fastrnn.kernels.triton.table import TABLE

    return not shares(mode) or (architecture, mode, precision, bucket) in TABLE


class Device(NamedTuple):
    """A GPU, from its data sheet.

    Attributes:
        clock: cycles per second.
        flops: per processor and cycle, by the precision of products.
    """

    processors: int
    clock: float
    flops: dict[str, int]


# The same for all devices. Bytes per cycle and processor: from shared memory, from L2, and from L2
# while all processors read. Seconds, chosen to predict best which was faster on an H200: from a
# store in one processor to a load in another, with all else that a step waits for; and the overhead
# of a step that a library launches.
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
    """The cost model of one step of a layer, forward.

    The backward pass multiplies the same weights with as many sequences.

    Attributes:
        B: sequences of all directions together.
    """

    gates: int
    H: int
    proj_size: int
    B: int
    precision: str

    @property
    def weights(self) -> int:
        """Weights that each sequence is multiplied with."""
        return self.gates * self.H * (self.proj_size or self.H) + self.proj_size * self.H

    @property
    def syncs(self) -> int:
        """Barriers per step."""
        return 2 if self.proj_size else 1

    @property
    def itemsize(self) -> int:
        return 2 if self.precision == "16-bit" else 4

    def least_time(self, plan: Plan, device: Device) -> dict[str, float]:
        """The least seconds per step that a plan takes, by what they are spent on."""
        groups, programs = -(-self.B // plan.rows), plan.programs(self.H)
        at_once = max(1, min(groups, device.processors // programs))
        waves = -(-groups // at_once)
        weights = self.itemsize * self.weights
        if plan.resident:
            weights_time = weights / programs / (SHARED * device.clock)
        else:
            weights_time = at_once * weights / (device.processors * CACHE * device.clock)
        h_time = 0.0
        if plan.sync != "program":
            # The elements that every program reads after the barriers.
            passed = plan.rows * ((self.proj_size or self.H) + self.H * (self.syncs - 1))
            bandwidth = min(INGEST, device.processors * CACHE / (at_once * programs))
            h_time = self.itemsize * passed / (bandwidth * device.clock)
        flops = 2.0 * plan.rows * self.weights / programs
        parts = {
            "weights": weights_time,
            "h": h_time,
            "products": flops / (device.flops[self.precision] * device.clock),
            "barrier": 0.0 if plan.sync == "program" else self.syncs * BARRIER,
        }
        return {name: waves * seconds for name, seconds in parts.items()}

    def launched_time(self, device: Device) -> float:
        """Seconds if each step is launched, reads its weights from L2, and is otherwise ideal."""
        cycles = max(
            self.itemsize * self.weights / CACHE,
            2.0 * self.B * self.weights / device.flops[self.precision],
        )
        return float(self.syncs * LAUNCH + cycles / (device.processors * device.clock))
