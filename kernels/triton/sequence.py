"""The loop over time of one layer, forward and in reverse, for any cell.

A program has BB sequences of one direction and BH hidden units (of a projected h, BP elements), and
keeps their state in float32. How it comes by the others' units is what ``SYNC`` says:

    "program"  there are no others: what a step needs of the one before stays in registers
    "grid"     through memory, after a meeting of all programs of these sequences, which must all be
               resident
    "launch"   through memory, and the launch ends where they would meet

A step has two parts where h is projected, the cell and the projection, with a meeting after each.
``PART`` says which of them a launch has: "both", or the name of one. In reverse the first part is
the product with ``W_hh``, of what the step after left; so there is one turn more than steps, of
which only that part counts.

Sizes: T steps, N rows, B sequences, H hidden units, P elements of h, D directions. H and P are
multiples of 16, of which the layer has own_H and own_P; what else meets a product is zero.
Rows are in time-major order; ``offsets [T + 1]`` has the first row of each step of a packed batch.
One product computes all slots of a program's units, in an order that leaves those of a unit to one
thread: ``slots_of``.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda, is_hip


@triton.jit
def arrive(counter, SYNC: tl.constexpr):
    """Say that what this program has written may be read. What it writes later need not wait."""
    if SYNC == "grid":
        # All threads must have written before one says so. AMD's barrier does not see to that: it
        # holds waves back, not their stores.
        if is_hip():
            tl.inline_asm_elementwise(
                "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [0], tl.int32, False, 1
            )
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, goal, SYNC: tl.constexpr):
    """Wait for ``goal`` arrivals, of all programs that share sequences."""
    if SYNC == "grid":
        arrived = goal - 1
        while arrived < goal:
            if is_cuda():
                # A load, since atomics of all who wait hold up those who arrive.
                arrived = tl.inline_asm_elementwise(
                    "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(tl.int64)],
                    tl.int32, False, 1,
                )  # fmt: skip
            else:
                arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        # No thread may read before the one that has heard of all others.
        tl.debug_barrier()


@triton.jit
def rows_of(offsets, step, d, T, B, PACKED: tl.constexpr):
    """The first row of a step, and how many there are: none before the first step, or after."""
    step64 = tl.cast(step, tl.int64)
    t = tl.where(d == 1, T - 1 - step64, step64)
    inside = (step >= 0) & (step < T)
    if PACKED:
        first = tl.load(offsets + t, mask=inside, other=0)
        count = tl.load(offsets + t + 1, mask=inside, other=0) - first
    else:
        first = t * B
        count = tl.where(inside, B, 0)
    return first, count


@triton.jit
def load_planes(pointer, stride, mask, COUNT: tl.constexpr):
    """A tile of each of COUNT planes."""
    planes = ()
    for k in tl.static_range(COUNT):
        planes = planes + (tl.load(pointer + k * stride, mask=mask, other=0.0),)
    return planes


@triton.jit
def store_planes(pointer, stride, mask, planes, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(pointer + k * stride, planes[k].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_float32(tiles, COUNT: tl.constexpr):
    new = ()
    for k in tl.static_range(COUNT):
        new = new + (tiles[k].to(tl.float32),)
    return new


@triton.jit
def keep(alive, new, old, COUNT: tl.constexpr):
    """The new values of sequences that had a step, the old ones of others."""
    kept = ()
    for k in tl.static_range(COUNT):
        kept = kept + (tl.where(alive, new[k], old[k]),)
    return kept


@triton.jit
def own(tile, column, count, PADDED: tl.constexpr):
    """Zero in columns that the layer does not have."""
    if PADDED:
        tile = tl.where((column < count)[None, :], tile, 0.0)
    return tile


@triton.jit
def h_parts(dslots, alive, dtype: tl.constexpr, GATES: tl.constexpr, SHARED: tl.constexpr):
    """Of the gradients of the slots those of ``W_hh h``; zero where a sequence has no step."""
    gates = ()
    for k in tl.static_range(SHARED):
        gates = gates + (tl.where(alive, dslots[k], 0.0).to(dtype),)
    for k in tl.static_range(GATES, 2 * GATES - SHARED):
        gates = gates + (tl.where(alive, dslots[k], 0.0).to(dtype),)
    return gates


@triton.jit
def slots_of(column, UNITS: tl.constexpr, SLOTS: tl.constexpr, LO: tl.constexpr):
    """The slot and the unit of each of a program's columns, ``[SLOTS / LO][unit][LO]``."""
    slot = column // (LO * UNITS) * LO + column % LO
    unit = column % (LO * UNITS) // LO
    return slot, unit


@triton.jit
def split_slots(
    tile, ROWS: tl.constexpr, UNITS: tl.constexpr, SLOTS: tl.constexpr, LO: tl.constexpr
):
    """``[ROWS, SLOTS * UNITS]`` in the order of ``slots_of`` as SLOTS tiles ``[ROWS, UNITS]``."""
    tl.static_assert(SLOTS == 1 or SLOTS == 2 or SLOTS == 4)
    if SLOTS == 1:
        slots = (tile,)
    elif SLOTS == 2:
        if LO == 1:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS)), (0, 2, 1))
        else:
            tile = tl.reshape(tile, (ROWS, UNITS, 2))
        a, b = tl.split(tile)
        slots = (a, b)
    else:
        if LO == 1:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, 2, UNITS)), (0, 3, 1, 2))
        else:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS, 2)), (0, 2, 1, 3))
        even, odd = tl.split(tile)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        slots = (a, b, c, d)
    return slots


@triton.jit
def depth(j, KC: tl.constexpr, SPLIT: tl.constexpr):
    """The indices of a product's K in its chunk j: [KC], or [SPLIT, KC]."""
    if SPLIT == 1:
        k = j * KC + tl.arange(0, KC)
    else:
        k = (j * SPLIT + tl.arange(0, SPLIT))[:, None] * KC + tl.arange(0, KC)[None, :]
    return k


@triton.jit
def left_tile(rows, mask, k, K, SPLIT: tl.constexpr):
    """Of the rows [BB] that pointers point to, the elements k."""
    if SPLIT == 1:
        tile = tl.load(rows[:, None] + k[None, :], mask=mask[:, None] & (k < K)[None, :], other=0.0)
    else:
        tile = tl.load(
            rows[None, :, None] + k[:, None, :],
            mask=mask[None, :, None] & (k < K)[:, None, :],
            other=0.0,
        )
    return tile


@triton.jit
def right_tile(w, k, K, stride, column, inside, SPLIT: tl.constexpr):
    """``w[k * stride + column]``, zero for columns that are not inside."""
    if SPLIT == 1:
        at, mask = (k * stride)[:, None] + column[None, :], (k < K)[:, None] & inside[None, :]
    else:
        at = (k * stride)[:, :, None] + column[None, None, :]
        mask = (k < K)[:, :, None] & inside[None, None, :]
    return tl.load(w + at, mask=mask, other=0.0)


@triton.jit
def right_tiles(
    w, K, stride, column, inside, KC: tl.constexpr, NK: tl.constexpr, SPLIT: tl.constexpr
):
    tiles = ()
    for j in tl.static_range(NK):
        tiles = tiles + (right_tile(w, depth(j, KC, SPLIT), K, stride, column, inside, SPLIT),)
    return tiles


@triton.jit
def multiply(a, w, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), w.to(DOT), acc=acc, input_precision=PRECISION)


@triton.jit
def product(
    rows,
    mask,
    w,
    tiles,
    K,
    stride,
    column,
    inside,
    RESIDENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KC: tl.constexpr,
    NK: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of K elements, zero where masked, times ``w``; see ``right_tile``."""
    if SPLIT == 1:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        acc = tl.zeros((SPLIT, ROWS, COLUMNS), tl.float32)
    if RESIDENT:
        # Several at once are on their way before the first is needed, of 16 KB together.
        TILE: tl.constexpr = ROWS * KC * SPLIT * (DOT.primitive_bitwidth // 8)
        MANY: tl.constexpr = max(1, 16384 // TILE)
        TENSOR_CORES: tl.constexpr = PRECISION == "tf32" or DOT.primitive_bitwidth == 16
        CHAINS: tl.constexpr = min(4, MANY) if TENSOR_CORES else 1
        for first in tl.static_range(0, NK, MANY):
            parts = ()
            for j in tl.static_range(first, min(first + MANY, NK)):
                parts = parts + (left_tile(rows, mask, depth(j, KC, SPLIT), K, SPLIT),)
            if CHAINS == 1:
                for j in tl.static_range(first, min(first + MANY, NK)):
                    acc = multiply(parts[j - first], tiles[j], acc, DOT, PRECISION)
            else:
                # A product waits for the sum that it adds to. A sum of two is a product's addend to
                # the compiler, which would make them one; a multiply-add is not.
                for chain in tl.static_range(CHAINS):
                    if first + chain < NK:
                        some = tl.zeros_like(acc)
                        for j in tl.static_range(first + chain, min(first + MANY, NK), CHAINS):
                            some = multiply(parts[j - first], tiles[j], some, DOT, PRECISION)
                        acc = tl.fma(some, 1.0, acc)
    else:
        for j in range(tl.cdiv(K, KC * SPLIT)):
            k = depth(j, KC, SPLIT)
            a = left_tile(rows, mask, k, K, SPLIT)
            tile = right_tile(w, k, K, stride, column, inside, SPLIT)
            acc = multiply(a, tile, acc, DOT, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    return acc


# Numbers that differ from call to call must not compile anything anew. H and P are multiples of 16.
_VARYING = ["first_group", "first_step", "end_step", "T", "N", "B", "D", "own_H", "own_P"]


@triton.jit(do_not_specialize=_VARYING)
def forward(
    gx,  # [D, N, GATES * H] the product of the input
    w_hh,  # [D, GATES * H, P]
    b_ih,  # [D, GATES * H], if BIAS
    b_hh,  # likewise
    w_hr,  # [D, P, H], if projected
    hx,  # [2, D, B, P] h before a step, by the parity of the step's number
    h,  # [D, B, P] float32: the state before the first step, and after the last
    s,  # [STATES - 1, D, B, H] float32: the other states, likewise
    m,  # [D, B, H] the cell's own output, if projected
    out,  # [N, D * P]
    saved,  # [D, N, KEPT, H]: v, s[1:], m if projected; not touched unless SAVE
    offsets,  # [T + 1] int64, if PACKED
    counters,  # [D * groups, 32] int32 zeros, if SYNC is "grid"
    first_group,  # number of the first group of this launch: BB sequences of one direction
    first_step,
    end_step,
    T,
    N,
    B,
    H,
    P,
    D,
    own_H,
    own_P,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SHARED: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    BIAS: tl.constexpr,
    PROJECTED: tl.constexpr,
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SYNC: tl.constexpr,
    PART: tl.constexpr,
    RESIDENT: tl.constexpr,  # the weights stay with the program for all steps
    BB: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    KC: tl.constexpr,  # the products' K, P and H, are cut into tiles of SPLIT * KC,
    NK: tl.constexpr,  # of which resident weights have so many
    NKR: tl.constexpr,
    SPLIT: tl.constexpr,
    LO: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLOTS: tl.constexpr = 2 * GATES - SHARED
    groups = tl.cdiv(B, BB)
    group = first_group + tl.program_id(1)
    d = group // groups
    d64 = d.to(tl.int64)
    row = (group % groups) * BB + tl.arange(0, BB)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    element = tl.program_id(0) * BP + tl.arange(0, BP)
    in_batch = row < B
    units = unit < H
    elements = element < P
    sequence = d64 * B + row
    # Of each column the gate of x, and of h: both, or one.
    slot, unit_of = slots_of(tl.arange(0, BH * SLOTS), BH, SLOTS, LO)
    unit_of += tl.program_id(0) * BH
    of_x = unit_of < H
    of_h = of_x
    gate_x = slot * H + unit_of
    gate_h = gate_x
    if GATES > SHARED:
        of_x = of_x & (slot < GATES)
        of_h = of_h & ((slot < SHARED) | (slot >= GATES))
        gate_h = tl.where(slot < SHARED, slot, slot - (GATES - SHARED)) * H + unit_of
    at_h = sequence[:, None] * P + element[None, :]
    at_s = sequence[:, None] * H + unit[None, :]
    own_h = in_batch[:, None] & elements[None, :]
    own_s = in_batch[:, None] & units[None, :]
    plane_h = tl.cast(D, tl.int64) * B * P
    plane_s = tl.cast(D, tl.int64) * B * H
    KEPT: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    KC_HH: tl.constexpr = BP if SYNC == "program" else KC
    KC_HR: tl.constexpr = BH if SYNC == "program" else KC
    w_hh += d64 * GATES * H * P
    w_hr += d64 * P * H
    gx += d64 * N * GATES * H
    saved += d64 * N * KEPT * H
    out += d * P
    counter = counters + group * 32
    met = 0

    running_h = tl.load(h + at_h, mask=own_h, other=0.0)
    others = load_planes(s + at_s, plane_s, own_s, STATES - 1)
    tiles = ()
    tiles_hr = ()
    if RESIDENT:
        if PART != "projection":
            tiles = right_tiles(w_hh, P, 1, gate_h * P, of_h, KC_HH, NK, SPLIT)
        if PROJECTED and PART != "cell":
            tiles_hr = right_tiles(w_hr, H, 1, element * H, elements, KC_HR, NKR, SPLIT)
    bias = tl.zeros((BH * SLOTS,), tl.float32)
    if BIAS and PART != "projection":
        bias += tl.load(b_ih + d * GATES * H + gate_x, mask=of_x, other=0.0).to(tl.float32)
        bias += tl.load(b_hh + d * GATES * H + gate_h, mask=of_h, other=0.0).to(tl.float32)

    first, count = rows_of(offsets, first_step, d, T, B, PACKED)
    # Read a step early, and well before its end, so that nobody waits for it.
    early = tl.load(
        gx + ((first + row) * GATES * H)[:, None] + gate_x[None, :],
        mask=(row < count)[:, None] & of_x[None, :],
        other=0.0,
    )
    # In stages, h would be read before it is there.
    for step in tl.range(first_step, end_step, num_stages=1):
        alive = row < count
        first_after, count_after = rows_of(offsets, step + 1, d, T, B, PACKED)
        count_after = tl.where(step + 1 < end_step, count_after, 0)
        y_h = running_h
        if PART != "projection":
            pre = early.to(tl.float32) + bias[None, :]
            if SYNC == "program":
                pre = multiply(running_h.to(out.dtype.element_ty), tiles[0], pre, DOT, PRECISION)
            else:
                pre += product(
                    hx + (step % 2) * plane_h + sequence * P, alive, w_hh, tiles, P, 1, gate_h * P,
                    of_h, RESIDENT, BB, BH * SLOTS, KC, NK, SPLIT, DOT, PRECISION,
                )  # fmt: skip
            early = tl.load(
                gx + ((first_after + row) * GATES * H)[:, None] + gate_x[None, :],
                mask=(row < count_after)[:, None] & of_x[None, :],
                other=0.0,
            )
            slots = split_slots(pre, BB, BH, SLOTS, LO)
            if PROJECTED:
                y, v = CELL(slots, (tl.zeros((BB, BH), tl.float32),) + others)
            else:
                y, v = CELL(slots, (running_h,) + others)
            y_h = own(y[0], unit, own_H, PADDED)
            mask = alive[:, None] & units[None, :]
            if PROJECTED:
                if SYNC != "program":
                    tl.store(m + at_s, y_h.to(m.dtype.element_ty), mask=mask)
            else:
                running_h = tl.where(alive[:, None], y_h, running_h)
                if SYNC != "program":
                    to = hx + ((step + 1) % 2) * plane_h + at_h
                    tl.store(to, running_h.to(hx.dtype.element_ty), mask=own_h)
            met += 1
            arrive(counter, SYNC)
            if SAVE:
                to = saved + ((first + row) * KEPT * H)[:, None] + unit[None, :]
                store_planes(to, H, mask, v, SAVED)
                store_planes(to + SAVED * H, H, mask, others, STATES - 1)
                if PROJECTED:
                    store_planes(to + (KEPT - 1) * H, H, mask, y, 1)
            others = keep(alive[:, None], y[1:], others, STATES - 1)
        if PROJECTED and PART != "cell":
            if SYNC == "program":
                zero = tl.zeros((BB, BP), tl.float32)
                y_h = multiply(y_h.to(out.dtype.element_ty), tiles_hr[0], zero, DOT, PRECISION)
            else:
                wait(counter, met * tl.num_programs(0), SYNC)
                y_h = product(
                    m + sequence * H, alive, w_hr, tiles_hr, H, 1, element * H, elements,
                    RESIDENT, BB, BP, KC, NKR, SPLIT, DOT, PRECISION,
                )  # fmt: skip
            y_h = own(y_h, element, own_P, PADDED)
            running_h = tl.where(alive[:, None], y_h, running_h)
            if SYNC != "program":
                to = hx + ((step + 1) % 2) * plane_h + at_h
                tl.store(to, running_h.to(hx.dtype.element_ty), mask=own_h)
            met += 1
            arrive(counter, SYNC)
        if not PROJECTED or PART != "cell":
            tl.store(
                out + ((first + row) * D * P)[:, None] + element[None, :],
                y_h.to(out.dtype.element_ty),
                mask=alive[:, None] & elements[None, :],
            )
        first, count = first_after, count_after
        wait(counter, met * tl.num_programs(0), SYNC)

    if not PROJECTED or PART != "cell":
        tl.store(h + at_h, running_h, mask=own_h)
    if PART != "projection":
        store_planes(s + at_s, plane_s, own_s, others, STATES - 1)


@triton.jit
def load_step(
    saved,
    out,
    dout,
    h0,
    first,
    count,
    first_before,
    count_before,
    row,
    unit,
    element,
    sequence,
    H,
    P,
    D,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
    DOUT: tl.constexpr,
):
    """What the reverse of a step needs of its forward: v, s, h, and the output's gradient."""
    KEPT: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    alive = row < count
    mask = alive[:, None] & (unit < H)[None, :]
    at = ((first + row) * KEPT * H)[:, None] + unit[None, :]
    v = load_planes(saved + at, H, mask, SAVED)
    s = load_planes(saved + at + SAVED * H, H, mask, STATES - 1)
    if PROJECTED:
        h_before = tl.zeros((row.shape[0], unit.shape[0]), out.dtype.element_ty)
        h_now = h_before
    else:
        begun = (row < count_before)[:, None]
        h_before = tl.load(
            h0 + (sequence * P)[:, None] + unit[None, :], mask=mask & ~begun, other=0.0
        )
        h_before += tl.load(
            out + ((first_before + row) * D * P)[:, None] + unit[None, :],
            mask=mask & begun,
            other=0.0,
        )
        h_now = tl.load(
            out + ((first + row) * D * P)[:, None] + unit[None, :], mask=mask, other=0.0
        )
    if DOUT:
        dh = tl.load(
            dout + ((first + row) * D * P)[:, None] + element[None, :],
            mask=alive[:, None] & (element < P)[None, :],
            other=0.0,
        )
    else:
        dh = tl.zeros((row.shape[0], element.shape[0]), out.dtype.element_ty)
    return v, (h_before,) + s, h_now, dh


@triton.jit(do_not_specialize=_VARYING)
def backward(
    saved,  # [D, N, KEPT, H] as forward left it
    out,  # [N, D * P]
    dout,  # [N, D * P], if DOUT
    h0,  # [D, B, P]
    w_hh,  # [D, GATES * H, P]
    w_hr,  # [D, P, H], if projected
    dh,  # [D, N, P] the whole gradient of h, if projected
    dpre,  # [D, N, SLOTS, H]
    dgh,  # [2, D, B, GATES, H] what W_hh is multiplied with, by the parity of the turn
    dh_n,  # [D, B, P] float32: gradient of the final state, and then of the initial one
    ds_n,  # [STATES - 1, D, B, H] float32: likewise
    offsets,
    counters,
    first_group,
    first_step,  # counted from the end; there is one more than T
    end_step,
    T,
    N,
    B,
    H,
    P,
    D,
    own_H,
    own_P,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SHARED: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
    DOUT: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SYNC: tl.constexpr,
    PART: tl.constexpr,
    RESIDENT: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    KC: tl.constexpr,  # the products' K, GATES * H and P, are cut likewise
    NK: tl.constexpr,  # of which resident weights have so many
    NKR: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    groups = tl.cdiv(B, BB)
    group = first_group + tl.program_id(1)
    d = group // groups
    d64 = d.to(tl.int64)
    row = (group % groups) * BB + tl.arange(0, BB)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    element = tl.program_id(0) * BP + tl.arange(0, BP)
    in_batch = row < B
    units = unit < H
    elements = element < P
    sequence = d64 * B + row
    SLOTS: tl.constexpr = 2 * GATES - SHARED
    KEPT: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    at_h = sequence[:, None] * P + element[None, :]
    at_s = sequence[:, None] * H + unit[None, :]
    own_h = in_batch[:, None] & elements[None, :]
    own_s = in_batch[:, None] & units[None, :]
    plane_s = tl.cast(D, tl.int64) * B * H
    plane_g = plane_s * GATES
    KC_HR: tl.constexpr = BP if SYNC == "program" else KC
    w_hh += d64 * GATES * H * P
    w_hr += d64 * P * H
    saved += d64 * N * KEPT * H
    dpre += d64 * N * SLOTS * H
    dh += d64 * N * P
    out += d * P
    dout += d * P
    counter = counters + group * 32
    met = 0

    # What reaches h other than through the product.
    carry = tl.load(dh_n + at_h, mask=own_h, other=0.0)
    others = load_planes(ds_n + at_s, plane_s, own_s, STATES - 1)
    tiles = ()
    tiles_hr = ()
    if RESIDENT:
        if PART != "cell":
            if SYNC == "program":
                for g in tl.static_range(GATES):
                    tiles = tiles + right_tiles(
                        w_hh + g * H * P, H, P, element, elements, BH, 1, SPLIT
                    )
            else:
                tiles = right_tiles(w_hh, GATES * H, P, element, elements, KC, NK, SPLIT)
        if PROJECTED and PART != "product":
            tiles_hr = right_tiles(w_hr, P, H, unit, units, KC_HR, NKR, SPLIT)
    # With SYNC "program", the gradients of the step after.
    held = ()
    if SYNC == "program":
        for _ in tl.static_range(GATES):
            held = held + (tl.zeros((BB, BH), dgh.dtype.element_ty),)

    step = T - 1 - first_step
    first, count = rows_of(offsets, step, d, T, B, PACKED)
    first_before, count_before = rows_of(offsets, step - 1, d, T, B, PACKED)
    v, s, h, dh_out = load_step(
        saved, out, dout, h0, first, count, first_before, count_before, row, unit, element,
        sequence, H, P, D, STATES, SAVED, PROJECTED, DOUT,
    )  # fmt: skip
    for turn in tl.range(first_step, end_step, num_stages=1):
        alive = row < count
        dy_h = carry
        if PART != "cell":
            if SYNC == "program":
                for g in tl.static_range(GATES):
                    carry = multiply(held[g], tiles[g], carry, DOT, PRECISION)
            else:
                carry += product(
                    dgh + (turn % 2) * plane_g + sequence * GATES * H, in_batch, w_hh, tiles,
                    GATES * H, P, element, elements, RESIDENT, BB, BP, KC, NK, SPLIT, DOT,
                    PRECISION,
                )  # fmt: skip
            dy_h = carry + dh_out.to(tl.float32)
            if PROJECTED:
                dy_h = own(dy_h, element, own_P, PADDED)
                tl.store(
                    dh + ((first + row) * P)[:, None] + element[None, :],
                    dy_h.to(dh.dtype.element_ty),
                    mask=alive[:, None] & elements[None, :],
                )
                # A projected h has no way but through the products.
                carry = tl.where(alive[:, None], 0.0, carry)
                met += 1
                arrive(counter, SYNC)
        if not PROJECTED or PART != "product":
            dm = dy_h
            if PROJECTED:
                if SYNC == "program":
                    zero = tl.zeros((BB, BH), tl.float32)
                    dm = multiply(dy_h.to(dh.dtype.element_ty), tiles_hr[0], zero, DOT, PRECISION)
                else:
                    wait(counter, met * tl.num_programs(0), SYNC)
                    dm = product(
                        dh + (first + row) * P, alive, w_hr, tiles_hr, P, H, unit, units,
                        RESIDENT, BB, BH, KC, NKR, SPLIT, DOT, PRECISION,
                    )  # fmt: skip
            dslots, ds = CELL(
                in_float32(v, SAVED), in_float32(s, STATES), h.to(tl.float32), (dm,) + others
            )
            real = alive[:, None]
            if PADDED:
                real = real & (unit < own_H)[None, :]
            dgates = h_parts(dslots, real, dgh.dtype.element_ty, GATES, SHARED)
            if SYNC == "program":
                held = dgates
            else:
                to = dgh + ((turn + 1) % 2) * plane_g + (sequence * GATES * H)[:, None]
                store_planes(to + unit[None, :], H, own_s, dgates, GATES)
            met += 1
            arrive(counter, SYNC)
            first_2, count_2 = rows_of(offsets, T - 3 - turn, d, T, B, PACKED)
            count_before = tl.where(turn + 1 < end_step, count_before, 0)
            v, s, h, dh_out = load_step(
                saved, out, dout, h0, first_before, count_before, first_2, count_2, row, unit,
                element, sequence, H, P, D, STATES, SAVED, PROJECTED, DOUT,
            )  # fmt: skip
            store_planes(
                dpre + ((first + row) * SLOTS * H)[:, None] + unit[None, :],
                H,
                alive[:, None] & units[None, :],
                dslots,
                SLOTS,
            )
            if not PROJECTED:
                carry = tl.where(alive[:, None], ds[0], carry)
            others = keep(alive[:, None], ds[1:], others, STATES - 1)
            first, count, first_before, count_before = first_before, count_before, first_2, count_2
        wait(counter, met * tl.num_programs(0), SYNC)

    if PART != "cell":
        tl.store(dh_n + at_h, carry, mask=own_h)
    if not PROJECTED or PART != "product":
        store_planes(ds_n + at_s, plane_s, own_s, others, STATES - 1)
