"""The Triton backend: kernels/triton/, float32, float16 and bfloat16 on a CUDA or ROCm device.

This project has run it on an H200. For other GPUs its kernels were compiled, and run in Triton's
interpreter. With ``TRITON_INTERPRET=1`` it also runs on a CPU, slowly, if it is selected by name.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fastrnn.backends import Gradients, StackSizes, installed
from fastrnn.backends.products import Recurrence, check_saved, gradients, in_own_dtype
from fastrnn.cells import Cell, State
from fastrnn.kernels.padding import padded_sizes
from fastrnn.kernels.triton import plans
from fastrnn.layer import Layer

__all__ = [
    "VALIDATES",
    "backward",
    "describe",
    "empty_cache",
    "forward",
    "kind",
    "missing",
    "refuses",
    "saved_spec",
]

kind: Literal["layer"] = "layer"
VALIDATES = False

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
    """The number of programs of any plan that run at the same time: one on each processor."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def _find(
    cell: Cell, dtype: torch.dtype, device: torch.device, H: int, proj_size: int
) -> tuple[plans.Plans | None, str, plans.Target]:
    """The plans of a layer, their architecture, and the target that runs them."""
    if device.type == "cpu":
        # The interpreter has no limits.
        architecture, at_once = "cuda:90", 1
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        architecture, at_once = _architecture(index), _programs_at_once(index)
    amd = architecture.startswith("hip")
    target = plans.Target(plans.precision(dtype, amd), at_once, amd)
    key = (architecture, cell.mode, target.precision, H, len(cell.gates), proj_size)
    return plans.find(*key), architecture, target


def refuses(
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device,
    sizes: StackSizes | None = None,
    automatic: bool = False,
) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"expected tensors on a CUDA or ROCm device, got {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}"
    max_hidden = plans.BUCKETS[-1]
    H, proj_size = (sizes.hidden_size, sizes.proj_size) if sizes else (1, 0)
    if max_hidden < H:
        return f"expected a hidden_size of at most {max_hidden}, got {H}"
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
    sizes: StackSizes,
    found: plans.Plans,
    architecture: str,
    target: plans.Target,
) -> str | None:
    """The reason why torch's own operator is likely faster, or None."""
    if sizes.one_step:
        return "torch is faster at one step: two products and one kernel"
    if _cudnn_persists(cell, dtype, sizes):
        return "cuDNN also runs all steps of such a layer in one launch"
    at_once, programs = target.programs_at_once, max(p.programs(sizes.hidden_size) for p in found)
    if programs > at_once:
        return (
            f"the {programs} programs of a layer cannot synchronise on a device of {at_once} "
            f"processors, and one launch for each step is slower"
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
            f"cost model: {1e6 * ours:.1f} µs per step (forward and backward) for the fused "
            f"kernel, {1e6 * theirs:.1f} µs for one launch per step (cuDNN)"
        )
    return None


def _cudnn_persists(cell: Cell, dtype: torch.dtype, sizes: StackSizes) -> bool:
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


def _plans(layer: Layer, x: Tensor) -> tuple[plans.Plans, plans.Target]:
    cell, H, proj_size = layer.cell, layer.H, layer.P if layer.projected else 0
    found, architecture, target = _find(cell, x.dtype, x.device, H, proj_size)
    if found is None:
        raise RuntimeError(f"no plan for {cell.mode}, hidden_size {H}, on {architecture}")
    return found, target


def _run(plan: plans.Plan, launch_all: Callable[[plans.Plan], _R]) -> _R:
    """Run a layer by a plan, or by one launch per step if its kernel exceeds the device."""
    from fastrnn.kernels.triton import launch

    try:
        return launch_all(plan)
    except launch.OutOfResources as error:
        warnings.warn(
            f"kernel {plan} exceeds this device's resources with the installed triton ({error}); "
            "falling back to one launch per step, which is slow. Please report this to fastrnn",
            RuntimeWarning,
            stacklevel=2,
        )
        return launch_all(plan.as_stepwise())


def saved_spec(layer: Layer, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return layer.saved_shape(padded_sizes(layer).H_pad), dtype


@in_own_dtype
def forward(layer: Layer, x: Tensor, save: bool) -> tuple[Tensor, State, Tensor | None]:
    from fastrnn.kernels.triton import launch

    (plan, _), target = _plans(layer, x)

    def launch_all(plan: plans.Plan) -> tuple[Tensor, State, Tensor | None]:
        result: tuple[Tensor, State, Tensor | None] = launch.forward(
            plan, target, layer, x, save, launch.run
        )
        return result

    with _on(x):
        return _run(plan, launch_all)


@in_own_dtype
def backward(
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> Gradients:
    from fastrnn.kernels.triton import launch

    (_, plan), target = _plans(layer, x)
    check_saved(layer, x, out, saved, saved_spec(layer, x.dtype)[0])

    def launch_all(plan: plans.Plan) -> Recurrence:
        args = (layer, x, out, saved, dout, dfinal)
        return Recurrence(*launch.backward(plan, target, *args, launch.run))

    with _on(x):
        recurrence = _run(plan, launch_all)
        return gradients(layer, x, out, saved[..., : layer.H], needed, recurrence)
