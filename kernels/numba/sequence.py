"""The loop over time of some sequences of one direction, forward and backward, for any cell.

Rows are in time-major order. The products with ``W_hh`` are done here, or by the caller, one step
at a time. The layer has H units and P elements of h; tensors have H_pad and P_pad of them, which
are multiples of 16, as the columns of panels are. Padding that enters a product is zero.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, NamedTuple, get_type_hints

from numba import njit, types

from fastrnn.kernels.numba.simd import (
    PANEL,
    ROWS,
    TILES,
    at,
    cached,
    call,
    lanes,
    load,
    pointer,
    put,
    store,
)

__all__ = ["BackwardArguments", "ForwardArguments", "compiled"]


tile1, tile2, tile4, tile8 = (TILES[rows] for rows in (1, 2, 4, 8))

DEPTH = 256
"""Terms of a sum that are added in one chain. A longer one would round more."""


@njit
def product(a, stride, rows, w, K, columns, init, out):
    """``out [rows, columns] = init [columns] + a [rows, K] W``, W in panels ``[*, K, width]``."""
    width = PANEL * lanes(w)
    for c in range(0, columns, width):
        begin, begin_stride = at(init, c), 0
        for k in range(0, K, DEPTH):
            panel = at(w, c * K + k * width)
            depth = min(DEPTH, K - k)
            r = 0
            while r < rows:
                x, y = at(a, r * stride + k), at(out, r * columns + c)
                first = at(begin, r * begin_stride)
                if ROWS == 8 and r + 8 <= rows:
                    tile8(panel, depth, x, stride, y, columns, first, begin_stride)
                    r += 8
                elif r + 4 <= rows:
                    tile4(panel, depth, x, stride, y, columns, first, begin_stride)
                    r += 4
                elif r + 2 <= rows:
                    tile2(panel, depth, x, stride, y, columns, first, begin_stride)
                    r += 2
                else:
                    tile1(panel, depth, x, stride, y, columns, first, begin_stride)
                    r += 1
            begin, begin_stride = at(out, c), columns


@njit
def copy(to, source, count):
    for j in range(0, count, lanes(to)):
        store(to, j, load(source, j))


@njit
def clear(row, begin, end):
    for j in range(begin, end):
        put(row, j, 0.0)


@njit
def add(to, source, count):
    for j in range(0, count, lanes(to)):
        store(to, j, load(to, j) + load(source, j))


@njit
def rows_of(offsets, packed, step, reverse, T, B, begin, end):
    """The first row of sequences ``begin`` to ``end`` in a step, and how many of them have one."""
    t = T - 1 - step if reverse else step
    if not packed:
        return t * B + begin, end - begin
    return offsets[t] + begin, min(offsets[t + 1] - offsets[t], end) - begin


@njit
def any_of(row, count):
    for j in range(count):  # noqa: SIM110  (Numba does not compile a generator)
        if row[j] != 0.0:
            return True
    return False


@njit
def any_state(dh, P_pad, ds, H_pad, states, plane_stride, begin, end):
    """Whether sequences ``begin`` to ``end`` have a gradient of a state that is not zero."""
    for r in range(begin, end):
        if any_of(at(dh, r * P_pad), P_pad):
            return True
        for k in range(states - 1):
            if any_of(at(ds, k * plane_stride + r * H_pad), H_pad):
                return True
    return False


@njit
def first_output(dout, D, P_pad, offsets, packed, reverse, T, B, begin, end):
    """The first step whose output has a gradient that is not zero; T if none has."""
    for step in range(T):
        first, rows = rows_of(offsets, packed, step, reverse, T, B, begin, end)
        for row in range(first, first + rows):
            if any_of(at(dout, row * D * P_pad), P_pad):
                return step
    return T


# Compiled kernels are called by position. These tuples define the order: callers fill them by
# keyword, and the signatures are made from them. A tensor is passed as the address of its first
# element. Tensors are contiguous and have the element type of the kernel, except for offsets.


class ForwardArguments(NamedTuple):
    """The parameters of :func:`forward`, in order."""

    cell: int  # address of the cell's compiled function
    zero: float  # 0.0, of the element type
    gx: int  # [N, G * H_pad] W_ih x, with its bias
    w_hh: int  # panels [*, P_pad, width]; unused unless multiply
    bias: int  # [columns], zero after the first G * H_pad; unused unless multiply
    w_hr: int  # panels [*, H_pad, width], if projected
    zeros: int  # [columns_hr], if projected
    offsets: int  # [T + 1] int64, the first row of each step, if packed
    h: int  # [B, P_pad] the state before the first step; becomes the state after the last
    s: int  # [S - 1, D, B, H_pad] the other states, likewise; begins at this direction
    out: int  # [N, D, P_pad]; begins at this direction
    saved: int  # [N, num_saved, H_pad]: v, s[1:], h_cell if projected; unused unless save
    T: int
    B: int
    H_pad: int
    P_pad: int
    D: int
    H: int
    P: int
    G: int
    states: int
    num_saved: int
    columns: int  # of gh
    columns_hr: int  # of the projection; 0 if not projected
    reverse: bool
    packed: bool
    save: bool
    multiply: bool  # whether the kernel computes W_hh h; otherwise gh has it, of one step
    # These differ between the shares of the sequences that are run side by side.
    gh: int = 0  # [rows, columns] W_hh h with its bias
    scratch: int = 0  # [rows, H_pad + columns_hr + num_saved * H_pad]
    begin: int = 0  # the first sequence
    end: int = 0
    first_step: int = 0
    end_step: int = 0


class BackwardArguments(NamedTuple):
    """The parameters of :func:`backward`, in order."""

    cell: int  # address of the cell's compiled function
    zero: float  # 0.0, of the element type
    saved: int  # [N, num_saved, H_pad] as written by forward
    out: int  # [N, D, P_pad]; begins at this direction
    dout: int  # [N, D, P_pad]; begins at this direction; unused unless has_dout
    h0: int  # [B, P_pad]
    w_hh: int  # panels [*, G * H_pad, width]; unused unless multiply
    w_hr: int  # panels [*, P_pad, width], if projected
    zeros: int  # [max(columns, columns_hr)]
    offsets: int  # [T + 1] int64, the first row of each step, if packed
    dh: int  # [B, P_pad] the gradient of the final state; becomes that of the initial state
    ds: int  # [S - 1, D, B, H_pad] of the other states, likewise; begins at this direction
    dpre: int  # [N, num_preacts, H_pad]
    dh_all: int  # [N, P_pad] the whole gradient of h, if projected
    T: int
    B: int
    H_pad: int
    P_pad: int
    D: int
    H: int
    P: int
    G: int
    summed: int
    states: int
    num_saved: int
    columns: int  # of dh_product
    columns_hr: int  # of dh_cell; 0 if not projected
    reverse: bool
    packed: bool
    has_dout: bool
    multiply: bool  # whether the kernel computes dh_product; otherwise it has that of one turn
    # These differ between the shares of the sequences that are run side by side.
    dgh: int = 0  # [rows, G * H_pad] the gradient of W_hh h
    dh_product: int = 0  # [rows, columns] W_hh^T dgh of the step after
    scratch: int = 0  # [rows, columns_hr]
    ending: int = 0  # [2] int64, output: the first steps with a gradient of any state, of out
    begin: int = 0  # the first sequence
    end: int = 0
    first_turn: int = 0  # counted from the last step
    end_turn: int = 0  # turn T, after that of the first step, only changes dh


def forward(
    cell, zero, gx, w_hh, bias, w_hr, zeros, offsets, h, s, out, saved, T, B, H_pad, P_pad, D, H,
    P, G, states, num_saved, columns, columns_hr, reverse, packed, save, multiply, gh, scratch,
    begin, end, first_step, end_step,
):  # fmt: skip
    """Steps ``first_step`` to ``end_step`` of sequences ``begin`` to ``end``."""
    gx = pointer(gx, zero)
    w_hh = pointer(w_hh, zero)
    bias = pointer(bias, zero)
    w_hr = pointer(w_hr, zero)
    zeros = pointer(zeros, zero)
    offsets = pointer(offsets, types.intp(0))
    h = pointer(h, zero)
    s = pointer(s, zero)
    out = pointer(out, zero)
    saved = pointer(saved, zero)
    gh = pointer(gh, zero)
    h_cell = pointer(scratch, zero)
    projection = at(h_cell, (end - begin) * H_pad)
    unsaved = at(projection, (end - begin) * columns_hr)
    plane_stride = D * B * H_pad
    num_values = num_saved - (states - 1) - (columns_hr > 0)
    for step in range(first_step, end_step):
        first, rows = rows_of(offsets, packed, step, reverse, T, B, begin, end)
        if rows <= 0:
            continue
        if multiply:
            product(at(h, begin * P_pad), P_pad, rows, w_hh, P_pad, columns, bias, gh)
        for r in range(rows):
            row = first + r
            h_r = at(h, (begin + r) * P_pad)
            s_r = at(s, (begin + r) * H_pad)
            v = at(saved, row * num_saved * H_pad) if save else unsaved
            if save:
                for k in range(states - 1):
                    copy(at(v, (num_values + k) * H_pad), at(s_r, k * plane_stride), H_pad)
            y = at(h_cell, r * H_pad) if columns_hr else h_r
            call(cell, (
                at(gx, row * G * H_pad), at(gh, r * columns), h_r, s_r, plane_stride, y, v, H_pad,
            ))  # fmt: skip
            clear(y, H, H_pad)
            if columns_hr:
                if save:
                    copy(at(v, (num_saved - 1) * H_pad), y, H_pad)
            else:
                copy(at(out, row * D * P_pad), h_r, P_pad)
        if columns_hr:
            product(h_cell, H_pad, rows, w_hr, H_pad, columns_hr, zeros, projection)
            for r in range(rows):
                clear(at(projection, r * columns_hr), P, P_pad)
                copy(at(h, (begin + r) * P_pad), at(projection, r * columns_hr), P_pad)
                copy(at(out, (first + r) * D * P_pad), at(projection, r * columns_hr), P_pad)


def backward(
    cell, zero, saved, out, dout, h0, w_hh, w_hr, zeros, offsets, dh, ds, dpre, dh_all, T, B,
    H_pad, P_pad, D, H, P, G, summed, states, num_saved, columns, columns_hr, reverse, packed,
    has_dout, multiply, dgh, dh_product, scratch, ending, begin, end, first_turn, end_turn,
):  # fmt: skip
    """Turns ``first_turn`` to ``end_turn`` of sequences ``begin`` to ``end``.

    Once the gradients of all states are zero and no output before has one, those of all steps
    before are zero: ``dpre`` and ``dh_all`` are cleared and ``ending`` is set.
    """
    saved = pointer(saved, zero)
    out = pointer(out, zero)
    dout = pointer(dout, zero)
    h0 = pointer(h0, zero)
    w_hh = pointer(w_hh, zero)
    w_hr = pointer(w_hr, zero)
    zeros = pointer(zeros, zero)
    offsets = pointer(offsets, types.intp(0))
    dh = pointer(dh, zero)
    ds = pointer(ds, zero)
    dpre = pointer(dpre, zero)
    dh_all = pointer(dh_all, zero)
    dgh = pointer(dgh, zero)
    dh_product = pointer(dh_product, zero)
    dh_cell = pointer(scratch, zero)
    ending = pointer(ending, types.intp(0))
    plane_stride = D * B * H_pad
    num_preacts = 2 * G - summed
    num_values = num_saved - (states - 1) - (columns_hr > 0)
    for turn in range(first_turn, end_turn):
        step = T - 1 - turn
        if turn > 0:
            _, rows = rows_of(offsets, packed, step + 1, reverse, T, B, begin, end)
            if multiply:
                product(dgh, G * H_pad, rows, w_hh, G * H_pad, columns, zeros, dh_product)
            for r in range(rows):
                dh_r = at(dh, (begin + r) * P_pad)
                if columns_hr:
                    copy(dh_r, at(dh_product, r * columns), P_pad)
                else:
                    add(dh_r, at(dh_product, r * columns), P_pad)
        if step < 0:
            put(ending, 0, 0)
            break
        first_dout = ending[1]
        if first_dout != 0 and not any_state(
            dh, P_pad, ds, H_pad, states, plane_stride, begin, end
        ):
            if first_dout < 0:
                first_dout = T
                if has_dout:
                    first_dout = first_output(
                        dout, D, P_pad, offsets, packed, reverse, T, B, begin, end
                    )
                put(ending, 1, first_dout)
            if step < first_dout:
                put(ending, 0, step + 1)
                for k in range(step + 1):
                    first, rows = rows_of(offsets, packed, k, reverse, T, B, begin, end)
                    end_row = first + max(rows, 0)
                    clear(dpre, first * num_preacts * H_pad, end_row * num_preacts * H_pad)
                    if columns_hr:
                        clear(dh_all, first * P_pad, end_row * P_pad)
                break
        first, rows = rows_of(offsets, packed, step, reverse, T, B, begin, end)
        # The step before, in this direction's order.
        before, rows_before = 0, 0
        if step > 0:
            before, rows_before = rows_of(offsets, packed, step - 1, reverse, T, B, begin, end)
        for r in range(rows):
            row = first + r
            dh_r = at(dh, (begin + r) * P_pad)
            if has_dout:
                add(dh_r, at(dout, row * D * P_pad), P_pad)
            if columns_hr:
                clear(dh_r, P, P_pad)
                copy(at(dh_all, row * P_pad), dh_r, P_pad)
        if columns_hr:
            product(at(dh, begin * P_pad), P_pad, rows, w_hr, P_pad, columns_hr, zeros, dh_cell)
        for r in range(rows):
            row = first + r
            dh_r = at(dh, (begin + r) * P_pad)
            v = at(saved, row * num_saved * H_pad)
            dpre_r = at(dpre, row * num_preacts * H_pad)
            h_before = at(h0, (begin + r) * P_pad)
            if r < rows_before:
                h_before = at(out, (before + r) * D * P_pad)
            dy = at(dh_cell, r * columns_hr) if columns_hr else dh_r
            call(cell, (
                v, h_before, at(v, num_values * H_pad), at(out, row * D * P_pad), dy,
                at(ds, (begin + r) * H_pad), plane_stride, dpre_r, H_pad,
            ))  # fmt: skip
            dgh_r = at(dgh, r * G * H_pad)
            copy(dgh_r, dpre_r, summed * H_pad)
            copy(at(dgh_r, summed * H_pad), at(dpre_r, G * H_pad), (G - summed) * H_pad)
            for g in range(G):
                clear(at(dgh_r, g * H_pad), H, H_pad)


@cache
def compiled(element: types.Float) -> tuple[Any, Any]:
    """The two loops over time."""
    kinds = {int: types.intp, bool: types.boolean, float: element}
    loops = []
    for function, arguments in (forward, ForwardArguments), (backward, BackwardArguments):
        assert tuple(signature(function).parameters) == arguments._fields
        parameters = [kinds[kind] for kind in get_type_hints(arguments).values()]
        loops.append(cached(njit, types.void(*parameters), function, nogil=True))
    return tuple(loops)
