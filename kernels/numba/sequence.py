"""The loop over time of some sequences of one direction, forward and in reverse, for any cell.

Rows are in time-major order; ``offsets [T + 1]`` has the first row of each step. H, P and the
columns of panels are multiples of 16, of which the layer has own_H and own_P; what else meets a
product is zero. Addresses are of contiguous tensors, of zero's type.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import njit, types

from fastrnn.kernels.numba.cells import signatures
from fastrnn.kernels.numba.simd import PANEL, ROWS, TILES, at, lanes, load, pointer, put, store

__all__ = ["compiled"]


tile1, tile2, tile4, tile8 = (TILES[rows] for rows in (1, 2, 4, 8))


@njit
def product(a, stride, rows, w, K, columns, init, out):
    """``out [rows, columns] = init [columns] + a [rows, K] W``, W in panels ``[*, K, width]``."""
    for c in range(0, columns, PANEL * lanes(w)):
        panel = at(w, c * K)
        begin = at(init, c)
        r = 0
        while ROWS == 8 and r + 8 <= rows:
            tile8(panel, K, at(a, r * stride), stride, at(out, r * columns + c), columns, begin)
            r += 8
        while r + 4 <= rows:
            tile4(panel, K, at(a, r * stride), stride, at(out, r * columns + c), columns, begin)
            r += 4
        if r + 2 <= rows:
            tile2(panel, K, at(a, r * stride), stride, at(out, r * columns + c), columns, begin)
            r += 2
        if r < rows:
            tile1(panel, K, at(a, r * stride), stride, at(out, r * columns + c), columns, begin)


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


def forward(
    cell,
    zero,
    gx,  # [N, G * H] the input's share, with its bias
    w_hh,  # panels [*, P, width]
    bias,  # [columns] of w_hh, zero after the G * H of the layer
    w_hr,  # panels [*, H, width], if projected
    zeros,  # [columns of w_hr]
    offsets,
    h,  # [B, P] the state before the first step, and after the last
    s,  # [S - 1, D, B, H], of this direction
    out,  # [N, D, P], of this direction
    saved,  # [N, KEPT, H]: v, s[1:], m if projected; not touched unless ``save``
    scratch,  # [rows + 1, columns + KEPT * H + columns of w_hr]
    T,
    B,
    H,
    P,
    D,
    own_H,
    own_P,
    G,
    states,
    kept,
    columns,
    columns_hr,  # zero if not projected
    reverse,
    save,
    begin,
    end,
):
    """Sequences ``begin`` to ``end``."""
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
    gh = pointer(scratch, zero)
    m = at(gh, (end - begin) * columns)
    projection = at(m, (end - begin) * H)
    unsaved = at(projection, (end - begin) * columns_hr)
    plane = D * B * H
    values = kept - (states - 1) - (columns_hr > 0)
    for step in range(T):
        t = T - 1 - step if reverse else step
        first = offsets[t] + begin
        rows = min(offsets[t + 1] - offsets[t], end) - begin
        if rows <= 0:
            continue
        product(at(h, begin * P), P, rows, w_hh, P, columns, bias, gh)
        for r in range(rows):
            row = first + r
            h_r = at(h, (begin + r) * P)
            s_r = at(s, (begin + r) * H)
            v = at(saved, row * kept * H) if save else unsaved
            if save:
                for k in range(states - 1):
                    copy(at(v, (values + k) * H), at(s_r, k * plane), H)
            y = at(m, r * H) if columns_hr else h_r
            cell(at(gx, row * G * H), at(gh, r * columns), h_r, s_r, plane, y, v, H)
            clear(y, own_H, H)
            if columns_hr:
                if save:
                    copy(at(v, (kept - 1) * H), y, H)
            else:
                copy(at(out, row * D * P), h_r, P)
        if columns_hr:
            product(m, H, rows, w_hr, H, columns_hr, zeros, projection)
            for r in range(rows):
                clear(at(projection, r * columns_hr), own_P, P)
                copy(at(h, (begin + r) * P), at(projection, r * columns_hr), P)
                copy(at(out, (first + r) * D * P), at(projection, r * columns_hr), P)


def backward(
    cell,
    zero,
    saved,  # [N, KEPT, H] as forward left it
    out,  # [N, D, P], of this direction
    dout,  # [N, D, P], of this direction, or zero rows if not ``given``
    h0,  # [B, P]
    w_hh,  # panels [*, G * H, width]
    w_hr,  # panels [*, P, width], if projected
    zeros,  # [columns]
    offsets,
    dh,  # [B, P] the gradient of the final state, and then of the initial one
    ds,  # [S - 1, D, B, H], of this direction
    dpre,  # [N, slots, H]
    dh_all,  # [N, P] the whole gradient of h, if projected
    scratch,  # [rows, G * H + columns + columns of w_hr]
    T,
    B,
    H,
    P,
    D,
    own_H,
    own_P,
    G,
    shared,
    states,
    kept,
    columns,
    columns_hr,  # zero if not projected
    reverse,
    given,
    begin,
    end,
):
    """Sequences ``begin`` to ``end``."""
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
    dgh = pointer(scratch, zero)
    back = at(dgh, (end - begin) * G * H)
    dm = at(back, (end - begin) * columns)
    plane = D * B * H
    slots = 2 * G - shared
    values = kept - (states - 1) - (columns_hr > 0)
    for step in range(T - 1, -1, -1):
        t = T - 1 - step if reverse else step
        first = offsets[t] + begin
        rows = min(offsets[t + 1] - offsets[t], end) - begin
        if rows <= 0:
            continue
        # The step before, in this direction's order.
        before, rows_before = 0, 0
        if step > 0:
            t_before = t + 1 if reverse else t - 1
            before = offsets[t_before] + begin
            rows_before = offsets[t_before + 1] - before
        for r in range(rows):
            row = first + r
            dh_r = at(dh, (begin + r) * P)
            if given:
                add(dh_r, at(dout, row * D * P), P)
            if columns_hr:
                clear(dh_r, own_P, P)
                copy(at(dh_all, row * P), dh_r, P)
        if columns_hr:
            product(at(dh, begin * P), P, rows, w_hr, P, columns_hr, zeros, dm)
        for r in range(rows):
            row = first + r
            dh_r = at(dh, (begin + r) * P)
            v = at(saved, row * kept * H)
            dpre_r = at(dpre, row * slots * H)
            h_before = at(h0, (begin + r) * P)
            if r < rows_before:
                h_before = at(out, (before + r) * D * P)
            dy = at(dm, r * columns_hr) if columns_hr else dh_r
            cell(
                v, h_before, at(v, values * H), at(out, row * D * P), dy, at(ds, (begin + r) * H),
                plane, dpre_r, H,
            )  # fmt: skip
            dgh_r = at(dgh, r * G * H)
            copy(dgh_r, dpre_r, shared * H)
            copy(at(dgh_r, shared * H), at(dpre_r, G * H), (G - shared) * H)
            for g in range(G):
                clear(at(dgh_r, g * H), own_H, H)
        product(dgh, G * H, rows, w_hh, G * H, columns, zeros, back)
        for r in range(rows):
            dh_r = at(dh, (begin + r) * P)
            if columns_hr:
                copy(dh_r, at(back, r * columns), P)
            else:
                add(dh_r, at(back, r * columns), P)


@cache
def compiled(element: types.Float) -> tuple[Any, Any]:
    """The two loops over time."""
    cell_forward, cell_backward = (types.FunctionType(s) for s in signatures(element))
    i, flag = types.intp, types.boolean
    options = {"cache": True, "nogil": True, "error_model": "numpy"}
    return (
        njit(types.void(cell_forward, element, *[i] * 23, flag, flag, i, i), **options)(forward),
        njit(types.void(cell_backward, element, *[i] * 26, flag, flag, i, i), **options)(backward),
    )
