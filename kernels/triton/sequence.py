"""The loop over time of one layer, forward and backward, for any cell.

A program has BB sequences of one direction and BH hidden units (BP elements of a projected h), and
keeps their state in float32. ``SYNC`` selects how a program gets the units of the other programs:

    "program"  there are no other programs: the state stays in registers from step to step
    "grid"     through memory, after a barrier of all programs of these sequences, which must all be
               resident
    "launch"   through memory, and each launch ends where the programs would synchronise

A step has two parts where h is projected, the cell and the projection, with a barrier after each.
``PART`` selects the parts that a launch runs: "both", or the name of one. In the backward pass the
first part is the product of ``W_hh`` with the gradients of the step after. There is one turn more
than there are steps, and that turn runs only this part.

Sizes: T steps, N rows, B sequences, H hidden units, P elements of h, D directions. Tensors have
H_pad and P_pad in place of H and P: the next multiples of 16. Padding that enters a product is
zero. Rows are in time-major order; ``offsets [T + 1]`` has the first row of each step of a packed
batch.

STATES and SAVED count what the cell declares: its states, and the values ``v`` that its forward
function returns for the backward pass. NUM_SAVED counts all that is stored per unit and row: v,
s[1:], and h_cell if projected. h_cell is the cell's output before the projection.

One product computes all pre-activations of a program's units, in an order that leaves those of a
unit to one thread: ``preacts_of``.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda, is_hip


@triton.jit
def arrive(counter, SYNC: tl.constexpr):
    """Signal that other programs may read what this one has written. Later writes need not wait."""
    if SYNC == "grid":
        # All threads must have written before one of them signals. AMD's barrier alone does not
        # ensure that: it holds back waves, not their stores.
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
                # A load, since atomics of all waiting programs would delay the arriving ones.
                arrived = tl.inline_asm_elementwise(
                    "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(tl.int64)],
                    tl.int32, False, 1,
                )  # fmt: skip
            else:
                arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        # No thread may read before the polling thread has seen all arrivals.
        tl.debug_barrier()


@triton.jit
def rows_of(offsets, step, d, T, B, PACKED: tl.constexpr):
    """The first row of a step and its number of rows; 0 rows outside of the T steps."""
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
    """One tile from each of COUNT planes."""
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
def where_active(active, new, old, COUNT: tl.constexpr):
    """The new values of the active sequences, and the old ones of all others."""
    selected = ()
    for k in tl.static_range(COUNT):
        selected = selected + (tl.where(active, new[k], old[k]),)
    return selected


@triton.jit
def zero_padding(tile, column, count, PADDED: tl.constexpr):
    """The tile, with zeros in the columns from ``count`` on."""
    if PADDED:
        tile = tl.where((column < count)[None, :], tile, 0.0)
    return tile


@triton.jit
def h_parts(dpreacts, active, dtype: tl.constexpr, GATES: tl.constexpr, SUMMED: tl.constexpr):
    """The gradients of ``W_hh h``, out of all dpre; zero in inactive sequences."""
    gates = ()
    for k in tl.static_range(SUMMED):
        gates = gates + (tl.where(active, dpreacts[k], 0.0).to(dtype),)
    for k in tl.static_range(GATES, 2 * GATES - SUMMED):
        gates = gates + (tl.where(active, dpreacts[k], 0.0).to(dtype),)
    return gates


@triton.jit
def preacts_of(column, UNITS: tl.constexpr, PREACTS: tl.constexpr, LO: tl.constexpr):
    """Pre-activation and unit of each column of a program, ordered ``[PREACTS / LO][unit][LO]``."""
    preact = column // (LO * UNITS) * LO + column % LO
    unit = column % (LO * UNITS) // LO
    return preact, unit


@triton.jit
def split_preacts(
    tile, ROWS: tl.constexpr, UNITS: tl.constexpr, PREACTS: tl.constexpr, LO: tl.constexpr
):
    """Split a tile, ordered by ``preacts_of``, into PREACTS tiles ``[ROWS, UNITS]``."""
    tl.static_assert(PREACTS == 1 or PREACTS == 2 or PREACTS == 4)
    if PREACTS == 1:
        preacts = (tile,)
    elif PREACTS == 2:
        if LO == 1:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS)), (0, 2, 1))
        else:
            tile = tl.reshape(tile, (ROWS, UNITS, 2))
        a, b = tl.split(tile)
        preacts = (a, b)
    else:
        if LO == 1:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, 2, UNITS)), (0, 3, 1, 2))
        else:
            tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS, 2)), (0, 2, 1, 3))
        even, odd = tl.split(tile)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        preacts = (a, b, c, d)
    return preacts


@triton.jit
def depth(j, KC: tl.constexpr, SPLIT: tl.constexpr):
    """The indices of chunk j of a product's K: [KC], or [SPLIT, KC]."""
    if SPLIT == 1:
        k = j * KC + tl.arange(0, KC)
    else:
        k = (j * SPLIT + tl.arange(0, SPLIT))[:, None] * KC + tl.arange(0, KC)[None, :]
    return k


@triton.jit
def left_tile(rows, mask, k, K, SPLIT: tl.constexpr):
    """The elements k of rows; ``rows [BB]`` are pointers."""
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
    """``w[k * stride + column]``, zero in columns outside of the mask ``inside``."""
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
    """Rows of K elements, masked ones being zero, times ``w``; see ``right_tile``."""
    if SPLIT == 1:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        acc = tl.zeros((SPLIT, ROWS, COLUMNS), tl.float32)
    if RESIDENT:
        # Loads of 16 KB in total are in flight before the first is needed.
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
                # A product waits for the sum that it adds to, hence several chains. The compiler
                # would turn a plain sum of two chains into the addend of a product, and so merge
                # them; it leaves a multiply-add as it is.
                for chain in tl.static_range(CHAINS):
                    if first + chain < NK:
                        partial = tl.zeros_like(acc)
                        for j in tl.static_range(first + chain, min(first + MANY, NK), CHAINS):
                            partial = multiply(parts[j - first], tiles[j], partial, DOT, PRECISION)
                        acc = tl.fma(partial, 1.0, acc)
    else:
        for j in range(tl.cdiv(K, KC * SPLIT)):
            k = depth(j, KC, SPLIT)
            a = left_tile(rows, mask, k, K, SPLIT)
            tile = right_tile(w, k, K, stride, column, inside, SPLIT)
            acc = multiply(a, tile, acc, DOT, PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    return acc


# Arguments that differ between calls must not cause a new compilation. H_pad and P_pad are
# specialised on, as multiples of 16.
_VARYING = ["first_group", "first_step", "end_step", "T", "N", "B", "D", "H", "P"]


@triton.jit(do_not_specialize=_VARYING)
def forward(
    gx,  # [D, N, GATES * H_pad] W_ih x
    w_hh,  # [D, GATES * H_pad, P_pad]
    b_ih,  # [D, GATES * H_pad], if BIAS
    b_hh,  # likewise
    w_hr,  # [D, P_pad, H_pad], if projected
    hx,  # [2, D, B, P_pad] h before a step, indexed by the parity of the step
    h,  # [D, B, P_pad] float32: the state before the first step, and after the last
    s,  # [STATES - 1, D, B, H_pad] float32: the other states, likewise
    h_cell,  # [D, B, H_pad], if projected
    out,  # [N, D * P_pad]
    saved,  # [D, N, NUM_SAVED, H_pad]: v, s[1:], h_cell if projected; unused unless SAVE
    offsets,  # [T + 1] int64, if PACKED
    counters,  # [D * groups, 32] int32 zeros, if SYNC is "grid"
    first_group,  # number of the first group of this launch: BB sequences of one direction
    first_step,
    end_step,
    T,
    N,
    B,
    H_pad,
    P_pad,
    D,
    H,
    P,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SUMMED: tl.constexpr,
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
    KC: tl.constexpr,  # the products' K, P_pad and H_pad, is cut into tiles of SPLIT * KC
    NK: tl.constexpr,  # tiles of w_hh, if resident
    NKR: tl.constexpr,  # tiles of w_hr, if resident
    SPLIT: tl.constexpr,
    LO: tl.constexpr,  # see preacts_of
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PREACTS: tl.constexpr = 2 * GATES - SUMMED
    groups = tl.cdiv(B, BB)
    group = first_group + tl.program_id(1)
    d = group // groups
    d64 = d.to(tl.int64)
    row = (group % groups) * BB + tl.arange(0, BB)
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    element = tl.program_id(0) * BP + tl.arange(0, BP)
    in_batch = row < B
    units = unit < H_pad
    elements = element < P_pad
    sequence = d64 * B + row
    # Each column belongs to a gate of gx, of gh, or of both.
    preact, unit_of = preacts_of(tl.arange(0, BH * PREACTS), BH, PREACTS, LO)
    unit_of += tl.program_id(0) * BH
    of_x = unit_of < H_pad
    of_h = of_x
    gate_x = preact * H_pad + unit_of
    gate_h = gate_x
    if GATES > SUMMED:
        of_x = of_x & (preact < GATES)
        of_h = of_h & ((preact < SUMMED) | (preact >= GATES))
        gate_h = tl.where(preact < SUMMED, preact, preact - (GATES - SUMMED)) * H_pad + unit_of
    at_h = sequence[:, None] * P_pad + element[None, :]
    at_s = sequence[:, None] * H_pad + unit[None, :]
    mask_h = in_batch[:, None] & elements[None, :]
    mask_s = in_batch[:, None] & units[None, :]
    plane_h = tl.cast(D, tl.int64) * B * P_pad
    plane_s = tl.cast(D, tl.int64) * B * H_pad
    NUM_SAVED: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    KC_HH: tl.constexpr = BP if SYNC == "program" else KC
    KC_HR: tl.constexpr = BH if SYNC == "program" else KC
    w_hh += d64 * GATES * H_pad * P_pad
    w_hr += d64 * P_pad * H_pad
    gx += d64 * N * GATES * H_pad
    saved += d64 * N * NUM_SAVED * H_pad
    out += d * P_pad
    counter = counters + group * 32
    syncs = 0

    running_h = tl.load(h + at_h, mask=mask_h, other=0.0)
    running_s = load_planes(s + at_s, plane_s, mask_s, STATES - 1)
    tiles = ()
    tiles_hr = ()
    if RESIDENT:
        if PART != "projection":
            tiles = right_tiles(w_hh, P_pad, 1, gate_h * P_pad, of_h, KC_HH, NK, SPLIT)
        if PROJECTED and PART != "cell":
            tiles_hr = right_tiles(w_hr, H_pad, 1, element * H_pad, elements, KC_HR, NKR, SPLIT)
    bias = tl.zeros((BH * PREACTS,), tl.float32)
    if BIAS and PART != "projection":
        bias += tl.load(b_ih + d * GATES * H_pad + gate_x, mask=of_x, other=0.0).to(tl.float32)
        bias += tl.load(b_hh + d * GATES * H_pad + gate_h, mask=of_h, other=0.0).to(tl.float32)

    first, count = rows_of(offsets, first_step, d, T, B, PACKED)
    # Load gx one step ahead, well before the step ends, so that no program waits for it.
    gx_next = tl.load(
        gx + ((first + row) * GATES * H_pad)[:, None] + gate_x[None, :],
        mask=(row < count)[:, None] & of_x[None, :],
        other=0.0,
    )
    # With several pipeline stages, h would be read before it is written.
    for step in tl.range(first_step, end_step, num_stages=1):
        active = row < count
        first_after, count_after = rows_of(offsets, step + 1, d, T, B, PACKED)
        count_after = tl.where(step + 1 < end_step, count_after, 0)
        y_h = running_h
        if PART != "projection":
            pre = gx_next.to(tl.float32) + bias[None, :]
            if SYNC == "program":
                pre = multiply(running_h.to(out.dtype.element_ty), tiles[0], pre, DOT, PRECISION)
            else:
                pre += product(
                    hx + (step % 2) * plane_h + sequence * P_pad, active, w_hh, tiles, P_pad, 1,
                    gate_h * P_pad, of_h, RESIDENT, BB, BH * PREACTS, KC, NK, SPLIT, DOT, PRECISION,
                )  # fmt: skip
            gx_next = tl.load(
                gx + ((first_after + row) * GATES * H_pad)[:, None] + gate_x[None, :],
                mask=(row < count_after)[:, None] & of_x[None, :],
                other=0.0,
            )
            preacts = split_preacts(pre, BB, BH, PREACTS, LO)
            if PROJECTED:
                y, v = CELL(preacts, (tl.zeros((BB, BH), tl.float32),) + running_s)
            else:
                y, v = CELL(preacts, (running_h,) + running_s)
            y_h = zero_padding(y[0], unit, H, PADDED)
            mask = active[:, None] & units[None, :]
            if PROJECTED:
                if SYNC != "program":
                    tl.store(h_cell + at_s, y_h.to(h_cell.dtype.element_ty), mask=mask)
            else:
                running_h = tl.where(active[:, None], y_h, running_h)
                if SYNC != "program":
                    to = hx + ((step + 1) % 2) * plane_h + at_h
                    tl.store(to, running_h.to(hx.dtype.element_ty), mask=mask_h)
            syncs += 1
            arrive(counter, SYNC)
            if SAVE:
                to = saved + ((first + row) * NUM_SAVED * H_pad)[:, None] + unit[None, :]
                store_planes(to, H_pad, mask, v, SAVED)
                store_planes(to + SAVED * H_pad, H_pad, mask, running_s, STATES - 1)
                if PROJECTED:
                    store_planes(to + (NUM_SAVED - 1) * H_pad, H_pad, mask, y, 1)
            running_s = where_active(active[:, None], y[1:], running_s, STATES - 1)
        if PROJECTED and PART != "cell":
            if SYNC == "program":
                zero = tl.zeros((BB, BP), tl.float32)
                y_h = multiply(y_h.to(out.dtype.element_ty), tiles_hr[0], zero, DOT, PRECISION)
            else:
                wait(counter, syncs * tl.num_programs(0), SYNC)
                y_h = product(
                    h_cell + sequence * H_pad, active, w_hr, tiles_hr, H_pad, 1,
                    element * H_pad, elements, RESIDENT, BB, BP, KC, NKR, SPLIT, DOT, PRECISION,
                )  # fmt: skip
            y_h = zero_padding(y_h, element, P, PADDED)
            running_h = tl.where(active[:, None], y_h, running_h)
            if SYNC != "program":
                to = hx + ((step + 1) % 2) * plane_h + at_h
                tl.store(to, running_h.to(hx.dtype.element_ty), mask=mask_h)
            syncs += 1
            arrive(counter, SYNC)
        if not PROJECTED or PART != "cell":
            tl.store(
                out + ((first + row) * D * P_pad)[:, None] + element[None, :],
                y_h.to(out.dtype.element_ty),
                mask=active[:, None] & elements[None, :],
            )
        first, count = first_after, count_after
        wait(counter, syncs * tl.num_programs(0), SYNC)

    if not PROJECTED or PART != "cell":
        tl.store(h + at_h, running_h, mask=mask_h)
    if PART != "projection":
        store_planes(s + at_s, plane_s, mask_s, running_s, STATES - 1)


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
    H_pad,
    P_pad,
    D,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
    DOUT: tl.constexpr,
):
    """The inputs of the backward pass of one step: v, s, h, and the gradient of the output."""
    NUM_SAVED: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    active = row < count
    mask = active[:, None] & (unit < H_pad)[None, :]
    at = ((first + row) * NUM_SAVED * H_pad)[:, None] + unit[None, :]
    v = load_planes(saved + at, H_pad, mask, SAVED)
    s = load_planes(saved + at + SAVED * H_pad, H_pad, mask, STATES - 1)
    if PROJECTED:
        h_before = tl.zeros((row.shape[0], unit.shape[0]), out.dtype.element_ty)
        h_now = h_before
    else:
        begun = (row < count_before)[:, None]
        h_before = tl.load(
            h0 + (sequence * P_pad)[:, None] + unit[None, :], mask=mask & ~begun, other=0.0
        )
        h_before += tl.load(
            out + ((first_before + row) * D * P_pad)[:, None] + unit[None, :],
            mask=mask & begun,
            other=0.0,
        )
        h_now = tl.load(
            out + ((first + row) * D * P_pad)[:, None] + unit[None, :], mask=mask, other=0.0
        )
    if DOUT:
        dh = tl.load(
            dout + ((first + row) * D * P_pad)[:, None] + element[None, :],
            mask=active[:, None] & (element < P_pad)[None, :],
            other=0.0,
        )
    else:
        dh = tl.zeros((row.shape[0], element.shape[0]), out.dtype.element_ty)
    return v, (h_before,) + s, h_now, dh


@triton.jit(do_not_specialize=_VARYING)
def backward(
    saved,  # [D, N, NUM_SAVED, H_pad] as written by forward
    out,  # [N, D * P_pad]
    dout,  # [N, D * P_pad], if DOUT
    h0,  # [D, B, P_pad]
    w_hh,  # [D, GATES * H_pad, P_pad]
    w_hr,  # [D, P_pad, H_pad], if projected
    dh,  # [D, N, P_pad] the whole gradient of h, if projected
    dpre,  # [D, N, PREACTS, H_pad]
    dgh,  # [2, D, B, GATES, H_pad] gradient of W_hh h, indexed by the parity of the turn
    dh_n,  # [D, B, P_pad] float32: the gradient of the final state, replaced by the initial's
    ds_n,  # [STATES - 1, D, B, H_pad] float32: likewise
    offsets,
    counters,
    first_group,
    first_step,  # counted from the end; there are T + 1 turns
    end_step,
    T,
    N,
    B,
    H_pad,
    P_pad,
    D,
    H,
    P,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SUMMED: tl.constexpr,
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
    KC: tl.constexpr,  # as in forward; here K is GATES * H_pad and P_pad
    NK: tl.constexpr,
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
    units = unit < H_pad
    elements = element < P_pad
    sequence = d64 * B + row
    PREACTS: tl.constexpr = 2 * GATES - SUMMED
    NUM_SAVED: tl.constexpr = SAVED + STATES - 1 + PROJECTED
    at_h = sequence[:, None] * P_pad + element[None, :]
    at_s = sequence[:, None] * H_pad + unit[None, :]
    mask_h = in_batch[:, None] & elements[None, :]
    mask_s = in_batch[:, None] & units[None, :]
    plane_s = tl.cast(D, tl.int64) * B * H_pad
    plane_g = plane_s * GATES
    KC_HR: tl.constexpr = BP if SYNC == "program" else KC
    w_hh += d64 * GATES * H_pad * P_pad
    w_hr += d64 * P_pad * H_pad
    saved += d64 * N * NUM_SAVED * H_pad
    dpre += d64 * N * PREACTS * H_pad
    dh += d64 * N * P_pad
    out += d * P_pad
    dout += d * P_pad
    counter = counters + group * 32
    syncs = 0

    # The gradient that reaches h other than through the product with W_hh.
    carry = tl.load(dh_n + at_h, mask=mask_h, other=0.0)
    carry_s = load_planes(ds_n + at_s, plane_s, mask_s, STATES - 1)
    tiles = ()
    tiles_hr = ()
    if RESIDENT:
        if PART != "cell":
            if SYNC == "program":
                for g in tl.static_range(GATES):
                    tiles = tiles + right_tiles(
                        w_hh + g * H_pad * P_pad, H_pad, P_pad, element, elements, BH, 1, SPLIT
                    )
            else:
                tiles = right_tiles(w_hh, GATES * H_pad, P_pad, element, elements, KC, NK, SPLIT)
        if PROJECTED and PART != "product":
            tiles_hr = right_tiles(w_hr, P_pad, H_pad, unit, units, KC_HR, NKR, SPLIT)
    # With SYNC "program", dgh of the step after.
    held = ()
    if SYNC == "program":
        for _ in tl.static_range(GATES):
            held = held + (tl.zeros((BB, BH), dgh.dtype.element_ty),)

    step = T - 1 - first_step
    first, count = rows_of(offsets, step, d, T, B, PACKED)
    first_before, count_before = rows_of(offsets, step - 1, d, T, B, PACKED)
    v, s, h, dh_out = load_step(
        saved, out, dout, h0, first, count, first_before, count_before, row, unit, element,
        sequence, H_pad, P_pad, D, STATES, SAVED, PROJECTED, DOUT,
    )  # fmt: skip
    for turn in tl.range(first_step, end_step, num_stages=1):
        active = row < count
        dy_h = carry
        if PART != "cell":
            if SYNC == "program":
                for g in tl.static_range(GATES):
                    carry = multiply(held[g], tiles[g], carry, DOT, PRECISION)
            else:
                carry += product(
                    dgh + (turn % 2) * plane_g + sequence * GATES * H_pad, in_batch, w_hh, tiles,
                    GATES * H_pad, P_pad, element, elements, RESIDENT, BB, BP, KC, NK, SPLIT, DOT,
                    PRECISION,
                )  # fmt: skip
            dy_h = carry + dh_out.to(tl.float32)
            if PROJECTED:
                dy_h = zero_padding(dy_h, element, P, PADDED)
                tl.store(
                    dh + ((first + row) * P_pad)[:, None] + element[None, :],
                    dy_h.to(dh.dtype.element_ty),
                    mask=active[:, None] & elements[None, :],
                )
                # A projected h is used only in the products.
                carry = tl.where(active[:, None], 0.0, carry)
                syncs += 1
                arrive(counter, SYNC)
        if not PROJECTED or PART != "product":
            dh_cell = dy_h
            if PROJECTED:
                if SYNC == "program":
                    zero = tl.zeros((BB, BH), tl.float32)
                    dh_cell = multiply(
                        dy_h.to(dh.dtype.element_ty), tiles_hr[0], zero, DOT, PRECISION
                    )
                else:
                    wait(counter, syncs * tl.num_programs(0), SYNC)
                    dh_cell = product(
                        dh + (first + row) * P_pad, active, w_hr, tiles_hr, P_pad, H_pad, unit,
                        units, RESIDENT, BB, BH, KC, NKR, SPLIT, DOT, PRECISION,
                    )  # fmt: skip
            dpreacts, ds = CELL(
                in_float32(v, SAVED), in_float32(s, STATES), h.to(tl.float32), (dh_cell,) + carry_s
            )
            real = active[:, None]
            if PADDED:
                real = real & (unit < H)[None, :]
            dgates = h_parts(dpreacts, real, dgh.dtype.element_ty, GATES, SUMMED)
            if SYNC == "program":
                held = dgates
            else:
                to = dgh + ((turn + 1) % 2) * plane_g + (sequence * GATES * H_pad)[:, None]
                store_planes(to + unit[None, :], H_pad, mask_s, dgates, GATES)
            syncs += 1
            arrive(counter, SYNC)
            first_2, count_2 = rows_of(offsets, T - 3 - turn, d, T, B, PACKED)
            count_before = tl.where(turn + 1 < end_step, count_before, 0)
            v, s, h, dh_out = load_step(
                saved, out, dout, h0, first_before, count_before, first_2, count_2, row, unit,
                element, sequence, H_pad, P_pad, D, STATES, SAVED, PROJECTED, DOUT,
            )  # fmt: skip
            store_planes(
                dpre + ((first + row) * PREACTS * H_pad)[:, None] + unit[None, :],
                H_pad,
                active[:, None] & units[None, :],
                dpreacts,
                PREACTS,
            )
            if not PROJECTED:
                carry = tl.where(active[:, None], ds[0], carry)
            carry_s = where_active(active[:, None], ds[1:], carry_s, STATES - 1)
            first, count, first_before, count_before = first_before, count_before, first_2, count_2
        wait(counter, syncs * tl.num_programs(0), SYNC)

    if PART != "cell":
        tl.store(dh_n + at_h, carry, mask=mask_h)
    if not PROJECTED or PART != "product":
        store_planes(ds_n + at_s, plane_s, mask_s, carry_s, STATES - 1)
