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

from fastrnn.cells import Cell, State, Weights
from fastrnn.kernels.padding import (
    Numbers,
    numbers,
    own_rows,
    own_states,
    padded,
    padded_gates,
    padded_rows,
    running,
)
from fastrnn.kernels.triton import sequence
from fastrnn.kernels.triton.cells import CELLS
from fastrnn.kernels.triton.plans import Plan, Target

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


def _together(tensors: list[Tensor]) -> Tensor:
    """One tensor of all directions."""
    return tensors[0].contiguous() if len(tensors) == 1 else torch.stack(tensors)


def _offsets(batch_sizes: Tensor | None, like: Tensor) -> Tensor:
    """The first row of each step, and where the last ends; anything in a dense batch."""
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
    sizes: Numbers,
    depths: tuple[int, int],
    target: Target,
    **constants: Any,
) -> Iterator[Launch]:
    """The launches of a plan.

    Args:
        turns: of the loop over time.
        parts: of a turn, launched apart where programs cannot meet within a launch.
        depths: K of the products with W_hh and W_hr.
    """
    x = tensors[0]
    B, H, P, D = sizes.B, sizes.H, sizes.P, sizes.D
    groups = D * triton.cdiv(B, plan.rows)
    programs, units, elements = plan.programs(H), plan.units, plan.units
    wider = (sizes.own_H, sizes.own_P) != (H, P)
    if plan.sync == "program":
        units, elements = (max(16, triton.next_power_of_2(n)) for n in (H, P))
        wider |= (units, elements) != (H, P)
    elif plan.sync == "grid" and (INTERPRETED or programs > target.programs_at_once):
        # The interpreter runs one program after another: none can wait for one that comes later.
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
        # Of a product's columns a thread has two neighbours, and those that are as far apart as all
        # warps reach; with tiles of 64 rows, all of its row's.
        several = constants["GATES"] > 1
        constants["LO"] = 2 if several and units < 8 * plan.warps and plan.rows < 64 else 1
    if not target.amd:
        # A processor has one program: the assembler need not spill to make room for a second.
        constants["maxnreg"] = 255
    counters = torch.zeros(groups, 32, dtype=torch.int32, device=x.device)
    steps = [(0, turns)]
    if plan.sync == "launch":
        steps = [(k, k + 1) for k in range(turns)]
    else:
        parts = ("both",)
    # No grid may be higher than that.
    wave = max(1, target.programs_at_once // programs) if plan.sync == "grid" else 65535
    for group in range(0, groups, wave):
        for first, end in steps:
            for part in parts:
                grid = (programs, min(wave, groups - group))
                # In the order of the kernels' parameters.
                args = (*tensors, counters, group, first, end, *sizes)
                yield Launch(kernel, grid, args, constants | dict(PART=part))


def forward(
    plan: Plan,
    target: Target,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
    save: bool,
    run: Run,
) -> tuple[Tensor, State, Tensor | None]:
    """As ``fastrnn.backends.Backend.forward``, by a plan; ``saved`` has ``Numbers.H`` units.

    Args:
        run: does a launch.
    """
    sizes = numbers(cell, x, weights, batch_sizes, batch)
    _, N, B, H, P, D, own_H, own_P = sizes
    *leading, I = x.shape
    G = len(cell.gates)
    projected = weights[0][4] is not None
    rows = x.flatten(0, -2)
    gx = x.new_empty(D, N, G * H)
    for d, (w_ih, *_) in enumerate(weights):
        torch.mm(rows, padded_gates(cell, w_ih, H, I).t(), out=gx[d])
    w_hh = _together([padded_gates(cell, w[1], H, P) for w in weights])
    b_ih, b_hh = (
        _together([padded_gates(cell, w[k], H) for w in weights])
        if weights[0][k] is not None
        else x
        for k in (2, 3)
    )
    w_hr = x
    if projected:
        w_hr = _together([padded(w[4], P, H) for w in weights if w[4] is not None])
    h, s = running(cell, state, sizes, x, torch.float32)
    hx = x.new_empty(2, D, B, P)
    hx[0] = h
    out = x.new_empty(*leading, D * P)
    saved = x.new_empty(D, N, cell.num_saved(projected), H) if save else None
    tensors = (
        gx,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        hx,
        h,
        s,
        x.new_empty(D, B, H) if projected else x,
        out,
        x if saved is None else saved,
        _offsets(batch_sizes, x),
    )
    for launch in _launches(
        plan,
        sequence.forward,
        tensors,
        sizes.T,
        ("cell", "projection") if projected else ("both",),
        sizes,
        (P, H),
        target,
        CELL=CELLS[cell.mode][0],
        GATES=G,
        SUMMED=cell.summed,
        STATES=len(cell.states),
        SAVED=len(cell.saved),
        BIAS=weights[0][2] is not None,
        SAVE=save,
        PACKED=batch_sizes is not None,
    ):
        run(launch)
    directions = len(leading) == 2 or batch_sizes is not None
    return own_rows(out, D, own_P), own_states(h, s, sizes, x.dtype, directions), saved


def backward(
    plan: Plan,
    target: Target,
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
    run: Run,
) -> tuple[Tensor, State, Tensor | None]:
    """The recurrence in reverse, by a plan: the fields of ``backends.products.Recurrence``."""
    sizes = numbers(cell, x, weights, batch_sizes, batch)
    T, N, B, H, P, D, own_H, own_P = sizes
    G = len(cell.gates)
    projected = weights[0][4] is not None
    w_hh = _together([padded_gates(cell, w[1], H, P) for w in weights])
    w_hr = x
    if projected:
        w_hr = _together([padded(w[4], P, H) for w in weights if w[4] is not None])
    h0, _ = running(cell, None if state is None else state[:1], sizes, x, torch.float32)
    dh_n, ds_n = running(cell, dfinal, sizes, x, torch.float32)
    dpre = x.new_empty(D, N, cell.num_preacts, H)
    dh = x.new_empty(D, N, P) if projected else None
    tensors = (
        saved,
        padded_rows(out, D, P),
        x if dout is None else padded_rows(dout, D, P),
        h0.to(x.dtype),
        w_hh,
        w_hr,
        x if dh is None else dh,
        dpre,
        x.new_zeros(2, D, B, G, H),
        dh_n,
        ds_n,
        _offsets(batch_sizes, x),
    )
    for launch in _launches(
        plan,
        sequence.backward,
        tensors,
        T + 1,
        ("product", "cell") if projected else ("both",),
        sizes,
        (G * H, P),
        target,
        CELL=CELLS[cell.mode][1],
        GATES=G,
        SUMMED=cell.summed,
        STATES=len(cell.states),
        SAVED=len(cell.saved),
        DOUT=dout is not None,
        PACKED=batch_sizes is not None,
    ):
        run(launch)
    directions = out.dim() == 3 or batch_sizes is not None
    dstate = own_states(dh_n, ds_n, sizes, x.dtype, directions)
    return dpre[..., :own_H], dstate, None if dh is None else dh[..., :own_P]
