"""The Triton backend: kernels/triton/, float32, float16 and bfloat16 on a CUDA or ROCm device.

Run on an H200 by this project, and for other GPUs compiled, and run in Triton's interpreter. With
``TRITON_INTERPRET=1`` it also runs on a CPU, slowly, if it is asked for by name.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from fastrnn.backends import Gradients, Sizes, installed
from fastrnn.backends.products import Recurrence, check_saved, gradients, in_own_dtype
from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.triton import plans

__all__ = [
    "CHECKS",
    "MULTIPLE",
    "STACKS",
    "WIDE",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "missing",
    "refuses",
]

CHECKS = False
MULTIPLE = 16
STACKS = False
WIDE = False

_R = TypeVar("_R")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = installed("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
    if found is not None and found < (3, 6):
        return f"expected triton 3.6 or newer, got {'.'.join(map(str, found))}"
    if not torch.cuda.is_available() and not _interpreted():
        return "torch sees no CUDA or ROCm device"
    return None


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"hip:{properties.gcnArchName.split(':')[0]}"
    return f"cuda:{properties.major}{properties.minor}"


@cache
def _programs_at_once(index: int) -> int:
    """Programs of any plan that surely run at the same time: one to a processor."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def _find(
    cell: Cell, dtype: torch.dtype, device: torch.device, H: int, proj_size: int
) -> tuple[plans.Plans | None, str, plans.Target]:
    """The plans of a layer, the architecture they are for, and what runs them."""
    if device.type == "cpu":
        # What the interpreter runs need not fit anywhere.
        architecture, at_once = "cuda:90", 1
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        architecture, at_once = _architecture(index), _programs_at_once(index)
    amd = architecture.startswith("hip")
    target = plans.Target(plans.precision(dtype, amd), at_once, amd)
    row = (architecture, cell.mode, target.precision, H, len(cell.gates), proj_size)
    return plans.find(*row), architecture, target


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes | None = None,
    automatic: bool = False,
) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"expected tensors on a CUDA or ROCm device, got {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}"
    most = plans.BUCKETS[-1]
    H, proj_size = (sizes.hidden_size, sizes.proj_size) if sizes else (1, 0)
    if most < H:
        return f"no plan divides a layer of hidden_size {H}: expected at most {most}"
    found, architecture, target = _find(cell, dtype, device, H, proj_size)
    if found is None:
        if cell.mode not in plans.MODES:
            return f"there is no kernel for the cell {cell.mode}"
        return f"there is no plan for {architecture} and {target.precision} products"
    if automatic and device.type == "cpu":
        return "the interpreter is for tests"
    if automatic and sizes is not None and not sizes.compiled:
        return _slower(cell, dtype, sizes, found, architecture, target)
    return None


def _slower(
    cell: Cell,
    dtype: torch.dtype,
    sizes: Sizes,
    found: plans.Plans,
    architecture: str,
    target: plans.Target,
) -> str | None:
    """Why torch's own operator is likely faster; None if it is not."""
    if sizes.one_step:
        return "one step is two products and one kernel in torch"
    if _cudnn_persists(cell, dtype, sizes):
        return "cuDNN computes all steps of such a layer in one launch, too"
    at_once, programs = target.programs_at_once, max(p.programs(sizes.hidden_size) for p in found)
    if programs > at_once:
        return (
            f"the {programs} programs of a layer cannot wait for each other on a device of "
            f"{at_once} processors, and a launch for each step takes longer"
        )
    D, device = sizes.directions, plans.DEVICES[architecture]._replace(processors=at_once)
    step = plans.Step(
        len(cell.gates), sizes.hidden_size, sizes.proj_size, sizes.batch, target.precision
    )
    both = step._replace(B=D * sizes.batch)
    ours = sum(seconds for plan in found for seconds in both.least_time(plan, device).values())
    theirs = len(found) * D * step.launched_time(device)
    if ours > theirs:
        return (
            f"on paper a step and its reverse take {1e6 * ours:.1f} µs, and if they are launched "
            f"and read the weights from the L2 cache {1e6 * theirs:.1f}"
        )
    return None


def _cudnn_persists(cell: Cell, dtype: torch.dtype, sizes: Sizes) -> bool:
    """As measured on an H200, cuDNN 9; see docs/gpu.md."""
    if torch.version.hip or dtype is torch.bfloat16 or sizes.packed or sizes.proj_size:
        return False
    if cell.mode == "GRU" and dtype is torch.float16:
        return False
    if sizes.hidden_size <= (256 if len(cell.gates) == 1 else 128):
        return True
    return (
        dtype is torch.float16
        and cell.mode == "LSTM"
        and sizes.layers == sizes.directions == 1
        and sizes.hidden_size <= 1024
        and sizes.hidden_size % 128 == sizes.input_size % 128 == 0
        and sizes.batch <= 32
        and sizes.batch % 8 == 0
    )


def empty_cache() -> None:
    pass


def describe() -> str:
    return "fused Triton" + (", interpreted" if _interpreted() else "")


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _plans(cell: Cell, x: Tensor, weights: Sequence[Weights]) -> tuple[plans.Plans, plans.Target]:
    _, w_hh, *_, w_hr = weights[0]
    H = w_hh.shape[0] // len(cell.gates)
    proj_size = 0 if w_hr is None else w_hr.shape[0]
    found, architecture, target = _find(cell, x.dtype, x.device, H, proj_size)
    if found is None:
        raise RuntimeError(f"no plan for {cell.mode}, hidden_size {H}, on {architecture}")
    return found, target


def _launched(plan: plans.Plan, layer: Callable[[plans.Plan], _R]) -> _R:
    """A layer by a plan; step by step, in small tiles, if its kernel takes more than there is."""
    from fastrnn.kernels.triton import launch

    try:
        return layer(plan)
    except launch.OutOfResources as error:
        warnings.warn(
            f"this version of triton makes a kernel of the plan {plan} that "
            f"this device cannot run ({error}): each step is launched by itself, which is slow. "
            "Please report this to fastrnn",
            RuntimeWarning,
            stacklevel=2,
        )
        return layer(plan.as_stepwise())


@in_own_dtype
def forward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
) -> tuple[Tensor, State, Tensor | None]:
    from fastrnn.kernels.triton import launch

    (plan, _), target = _plans(cell, x, weights)

    def layer(plan: plans.Plan) -> tuple[Tensor, State, Tensor | None]:
        result: tuple[Tensor, State, Tensor | None] = launch.forward(
            plan, target, cell, x, weights, state, batch_sizes, batch, save, launch.run
        )
        return result

    with _on(x):
        return _launched(plan, layer)


@in_own_dtype
def backward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Gradients:
    from fastrnn.kernels.triton import launch

    (_, plan), target = _plans(cell, x, weights)
    layer = (cell, x, weights, state, batch_sizes, batch, out)
    check_saved(*layer, saved)

    def reverse(plan: plans.Plan) -> Recurrence:
        return Recurrence(*launch.backward(plan, target, *layer, saved, dout, dfinal, launch.run))

    with _on(x):
        recurrence = _launched(plan, reverse)
        own = saved[..., : recurrence.dpre.shape[-1]]
        return gradients(*layer, own, needed, recurrence)
