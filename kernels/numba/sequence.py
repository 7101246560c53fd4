"""The loop over time of some sequences of one direction, forward and in reverse, for any cell.

Rows are in time-major order; ``offsets [T + 1]`` has the first row of each step of a packed batch.
The products with ``W_hh`` are done here, or for one step at a time by the caller. H, P and the
columns of panels are multiples of 16, of which the layer has own_H and own_P; what else meets a
product is zero. Addresses are of contiguous tensors, of zero's type.
"""

from __future__ import annotations

from functools import cache
from typing import Any

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


@njit
def rows_of(offsets, packed, step, reverse, T, B, begin, end):
    """Of a step the first row of sequences ``begin`` to ``end``, and how many have it."""
    t = T - 1 - step if reverse else step
    if not packed:
        return t * B + begin, end - begin
    return offsets[t] + begin, min(offsets[t + 1] - offsets[t], end) - begin


def forward(
    cell,  # the address of its function
    zero,
    gx,  # [N, G * H] the input's share, with its bias
    w_hh,  # panels [*, P, width]; not touched unless ``multiply``
    bias,  # [columns], zero after the G * H of the layer; likewise
    w_hr,  # panels [*, H, width], if projected
    zeros,  # [columns_hr]
    offsets,
    h,  # [B, P] the state before the first step, and after the last
    s,  # [S - 1, D, B, H], of this direction
    out,  # [N, D, P], of this direction
    saved,  # [N, KEPT, H]: v, s[1:], m if projected; not touched unless ``save``
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
    columns,  # of gh
    columns_hr,  # zero if not projected
    reverse,
    packed,
    save,
    multiply,
    gh,  # [rows, columns] the product with W_hh: scratch, or unless ``multiply`` that of the step
    scratch,  # [rows, H + columns_hr + KEPT * H]
    begin,
    end,
    first_step,
    end_step,
):
    """Some steps of sequences ``begin`` to ``end``."""
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
    m = pointer(scratch, zero)
    projection = at(m, (end - begin) * H)
    unsaved = at(projection, (end - begin) * columns_hr)
    plane = D * B * H
    values = kept - (states - 1) - (columns_hr > 0)
    for step in range(first_step, end_step):
        first, rows = rows_of(offsets, packed, step, reverse, T, B, begin, end)
        if rows <= 0:
            continue
        if multiply:
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
            call(cell, (at(gx, row * G * H), at(gh, r * columns), h_r, s_r, plane, y, v, H))
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
    w_hh,  # panels [*, G * H, width]; not touched unless ``multiply``
    w_hr,  # panels [*, P, width], if projected
    zeros,  # [columns]
    offsets,
    dh,  # [B, P] the gradient of the final state, and then of the initial one
    ds,  # [S - 1, D, B, H], of this direction
    dpre,  # [N, slots, H]
    dh_all,  # [N, P] the whole gradient of h, if projected
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
    columns,  # of back
    columns_hr,  # zero if not projected
    reverse,
    packed,
    given,
    multiply,
    dgh,  # [rows, G * H] what W_hh is multiplied with
    back,  # [rows, columns] the product: scratch, or unless ``multiply`` that of the turn before
    scratch,  # [rows, columns_hr]
    begin,
    end,
    first_turn,  # counted from the last step; in one after the first step only dh changes
    end_turn,
):
    """Some turns of sequences ``begin`` to ``end``."""
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
    back = pointer(back, zero)
    dm = pointer(scratch, zero)
    plane = D * B * H
    slots = 2 * G - shared
    values = kept - (states - 1) - (columns_hr > 0)
    for turn in range(first_turn, end_turn):
        step = T - 1 - turn
        if turn > 0:
            _, rows = rows_of(offsets, packed, step + 1, reverse, T, B, begin, end)
            if multiply:
                product(dgh, G * H, rows, w_hh, G * H, columns, zeros, back)
            for r in range(rows):
                dh_r = at(dh, (begin + r) * P)
                if columns_hr:
                    copy(dh_r, at(back, r * columns), P)
                else:
                    add(dh_r, at(back, r * columns), P)
        if step < 0:
            break
        first, rows = rows_of(offsets, packed, step, reverse, T, B, begin, end)
        # The step before, in this direction's order.
        before, rows_before = 0, 0
        if step > 0:
            before, rows_before = rows_of(offsets, packed, step - 1, reverse, T, B, begin, end)
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
            call(cell, (
                v, h_before, at(v, values * H), at(out, row * D * P), dy, at(ds, (begin + r) * H),
                plane, dpre_r, H,
            ))  # fmt: skip
            dgh_r = at(dgh, r * G * H)
            copy(dgh_r, dpre_r, shared * H)
            copy(at(dgh_r, shared * H), at(dpre_r, G * H), (G - shared) * H)
            for g in range(G):
                clear(at(dgh_r, g * H), own_H, H)


@cache
def compiled(element: types.Float) -> tuple[Any, Any]:
    """The two loops over time."""
    i, flag = types.intp, types.boolean
    signatures = (
        types.void(i, element, *[i] * 22, *[flag] * 4, *[i] * 6),
        types.void(i, element, *[i] * 25, *[flag] * 4, *[i] * 7),
    )
    return (
        cached(njit, signatures[0], forward, nogil=True),
        cached(njit, signatures[1], backward, nogil=True),
    )
