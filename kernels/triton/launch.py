"""The tensors that the kernels read, and the launches of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from fastrnn.cells import State
from fastrnn.kernels.padding import (
    PaddedSizes,
    own_rows,
    own_states,
    padded,
    padded_gates,
    padded_rows,
    padded_sizes,
    running_states,
)
from fastrnn.kernels.triton import sequence
from fastrnn.kernels.triton.cells import CELLS
from fastrnn.kernels.triton.plans import Plan, Target
from fastrnn.layer import Layer

__all__ = ["Launch", "OutOfResources", "backward", "forward", "run"]


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]


Run = Callable[[Launch], None]


def run(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.constants)


INTERPRETED = isinstance(sequence.forward, InterpretedFunction)
"""Whether the kernels were defined under TRITON_INTERPRET=1."""


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor of all directions."""
    return tensors[0].contiguous() if len(tensors) == 1 else torch.stack(tensors)


def _offsets(batch_sizes: Tensor | None, like: Tensor) -> Tensor:
    """The first row of each step, and the end of the last; ``like``, unused, if dense."""
    if batch_sizes is None:
        return like
    offsets = torch.zeros(len(batch_sizes) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(batch_sizes, 0, out=offsets[1:])
    if like.is_cuda:
        return offsets.pin_memory().to(like.device, non_blocking=True)
    return offsets.to(like.device)


_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _launches(
    plan: Plan,
    kernel: Any,
    tensors: Sequence[Tensor],
    turns: int,
    parts: tuple[str, ...],
    sizes: PaddedSizes,
    depths: tuple[int, int],
    target: Target,
    **constants: Any,
) -> Iterator[Launch]:
    """The launches of a plan.

    Args:
        turns: iterations of the loop over time.
        parts: of a turn, in launches of their own where programs cannot synchronise within one.
        depths: K of the products with W_hh and W_hr.
    """
    x = tensors[0]
    padded_size = sizes.H_pad, sizes.P_pad
    groups = sizes.D * triton.cdiv(sizes.B, plan.rows)
    programs, units, elements = plan.programs(sizes.H_pad), plan.units, plan.units
    wider = padded_size != (sizes.H, sizes.P)
    if plan.sync == "program":
        units, elements = (max(16, triton.next_power_of_2(n)) for n in padded_size)
        wider |= (units, elements) != padded_size
    elif plan.sync == "grid" and (INTERPRETED or programs > target.programs_at_once):
        # The interpreter runs one program after another: none can wait for a later one.
        plan = plan.as_stepwise()
    tiles = [1, 1]
    if plan.sync != "program":
        tiles = [triton.cdiv(K, plan.depth * plan.split) for K in depths]
    if not plan.resident:
        tiles = [0, 0]  # any number
    # The interpreter's bfloat16 products are wrong.
    dot = tl.float32 if INTERPRETED else _DOT[x.dtype]
    constants |= dict(
        PROJECTED=len(parts) == 2,
        PADDED=wider,
        SYNC=plan.sync,
        RESIDENT=plan.resident,
        BB=plan.rows,
        BH=units,
        BP=elements,
        KC=plan.depth,
        NK=tiles[0],
        NKR=tiles[1],
        SPLIT=plan.split,
        DOT=dot,
        PRECISION="tf32" if target.precision == "tf32" else "ieee",
        num_warps=plan.warps,
        launch_cooperative_grid=plan.sync == "grid",
        enable_fp_fusion=True,
    )
    if kernel is sequence.forward:
        # A thread has two neighbouring columns of a product, and those at the stride that all warps
        # cover; with tiles of 64 rows, all columns of its row.
        several = constants["GATES"] > 1
        constants["LO"] = 2 if several and units < 8 * plan.warps and plan.rows < 64 else 1
    if not target.amd:
        # A processor runs one program: the assembler need not spill to make room for a second.
        constants["maxnreg"] = 255
    counters = torch.zeros(groups, 32, dtype=torch.int32, device=x.device)
    steps = [(0, turns)]
    if plan.sync == "launch":
        steps = [(k, k + 1) for k in range(turns)]
    else:
        parts = ("both",)
    # 65535 is the largest grid.
    wave = max(1, target.programs_at_once // programs) if plan.sync == "grid" else 65535
    for group in range(0, groups, wave):
        for first, end in steps:
            for part in parts:
                grid = (programs, min(wave, groups - group))
                # In the order of the kernels' parameters.
                args = (*tensors, counters, group, first, end, *sizes)
                yield Launch(kernel, grid, args, constants | dict(PART=part))


def forward(
    plan: Plan, target: Target, layer: Layer, x: Tensor, save: bool, run: Run
) -> tuple[Tensor, State, Tensor | None]:
    """As ``fastrnn.backends.LayerBackend.forward``, by a plan.

    Args:
        run: executes a launch.
    """
    sizes = padded_sizes(layer)
    _, N, B, H_pad, P_pad, D, H, P = sizes
    *leading, I = x.shape
    cell, G, projected = layer.cell, layer.G, layer.projected
    rows = x.flatten(0, -2)
    gx = x.new_empty(D, N, G * H_pad)
    for d, w in enumerate(layer.weights):
        torch.mm(rows, padded_gates(layer, w.ih, H_pad, I).t(), out=gx[d])
    w_hh = _stacked([padded_gates(layer, w.hh, H_pad, P_pad) for w in layer.weights])
    b_ih, b_hh, bias = x, x, layer.weights[0].bias_ih is not None
    if bias:
        b_ih, b_hh = (
            _stacked([padded_gates(layer, b, H_pad) for b in biases])
            for biases in zip(*((w.bias_ih, w.bias_hh) for w in layer.weights), strict=True)
        )
    h, s = running_states(layer, layer.state, sizes, x, torch.float32)
    hx = x.new_empty(2, D, B, P_pad)
    hx[0] = h
    out = x.new_empty(*leading, D * P_pad)
    saved = x.new_empty(layer.saved_shape(H_pad)) if save else None
    # Arguments that a launch does not need are x.
    tensors = (
        gx,
        w_hh,
        b_ih,
        b_hh,
        _projections(layer, sizes, x),
        hx,
        h,
        s,
        x.new_empty(D, B, H_pad) if projected else x,
        out,
        x if saved is None else saved,
        _offsets(layer.rows.batch_sizes, x),
    )
    for launch in _launches(
        plan,
        sequence.forward,
        tensors,
        sizes.T,
        ("cell", "projection") if projected else ("both",),
        sizes,
        (P_pad, H_pad),
        target,
        CELL=CELLS[cell.mode][0],
        GATES=G,
        SUMMED=cell.summed,
        STATES=len(cell.states),
        SAVED=len(cell.saved),
        BIAS=bias,
        SAVE=save,
        PACKED=layer.rows.batch_sizes is not None,
    ):
        run(launch)
    return own_rows(out, sizes), own_states(layer, h, s, sizes, x.dtype), saved


def _projections(layer: Layer, sizes: PaddedSizes, x: Tensor) -> Tensor:
    """W_hr of all directions; x without projection."""
    w_hr = [padded(w.hr, sizes.P_pad, sizes.H_pad) for w in layer.weights if w.hr is not None]
    return _stacked(w_hr) if w_hr else x


def backward(
    plan: Plan,
    target: Target,
    layer: Layer,
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    dout: Tensor | None,
    dfinal: Sequence[Tensor | None],
    run: Run,
) -> tuple[Tensor, State, Tensor | None]:
    """The recurrence backward, by a plan: the fields of ``backends.products.Recurrence``."""
    sizes = padded_sizes(layer)
    T, N, B, H_pad, P_pad, D, H, P = sizes
    cell, G, projected = layer.cell, layer.G, layer.projected
    w_hh = _stacked([padded_gates(layer, w.hh, H_pad, P_pad) for w in layer.weights])
    h0, _ = running_states(layer, layer.state and layer.state[:1], sizes, x, torch.float32)
    dh_n, ds_n = running_states(layer, dfinal, sizes, x, torch.float32)
    dpre = x.new_empty(D, N, cell.num_preacts, H_pad)
    dh = x.new_empty(D, N, P_pad) if projected else None
    tensors = (
        saved,
        padded_rows(out, sizes),
        x if dout is None else padded_rows(dout, sizes),
        h0.to(x.dtype),
        w_hh,
        _projections(layer, sizes, x),
        x if dh is None else dh,
        dpre,
        x.new_zeros(2, D, B, G, H_pad),
        dh_n,
        ds_n,
        _offsets(layer.rows.batch_sizes, x),
    )
    for launch in _launches(
        plan,
        sequence.backward,
        tensors,
        T + 1,
        ("product", "cell") if projected else ("both",),
        sizes,
        (G * H_pad, P_pad),
        target,
        CELL=CELLS[cell.mode][1],
        GATES=G,
        SUMMED=cell.summed,
        STATES=len(cell.states),
        SAVED=len(cell.saved),
        DOUT=dout is not None,
        PACKED=layer.rows.batch_sizes is not None,
    ):
        run(launch)
    dstate = own_states(layer, dh_n, ds_n, sizes, x.dtype)
    return dpre[..., :H], dstate, None if dh is None else dh[..., :P]
