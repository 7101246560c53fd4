"""The cells: what happens to a row of hidden units in one step, and its reverse.

The derivations, and what a slot is, stand in ``fastrnn/cells.py``; names and orders here are the
same. A row has H units, a multiple of the vector's lanes, of each plane:

    forward(gx, gh, h, s, apart, y, v, H)
        gx [G], gh [G]  the two products, one plane a gate
        h, s            s[0], and s[1:] of which each is so far ``apart`` from the one before
        y, s            become y[0], which may be h itself, and y[1:]
        v [saved]       what is kept for the reverse

    backward(v, h_before, s, h, dh, ds, apart, dpre, H)
        v, s [S - 1]    as kept, one plane after the other; s[0] is ``h_before``
        h               y[0]
        dh, ds          dy[0] and dy[1:] (so far ``apart``), and become ds[0] and ds[1:]
        dpre [slots]    becomes the gradient of the pre-activations

They are called by their address, so one driver serves all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cfunc, types

from fastrnn.kernels.numba import MODES
from fastrnn.kernels.numba.simd import cached, lanes, load, sigmoid, store, tanh, where_less

__all__ = ["CELLS", "compiled"]


def rnn_tanh_forward(gx, gh, h, s, apart, y, v, H):
    for j in range(0, H, lanes(gx)):
        store(y, j, tanh(load(gx, j) + load(gh, j)))


def rnn_tanh_backward(v, h_before, s, h, dh, ds, apart, dpre, H):
    for j in range(0, H, lanes(v)):
        a = load(h, j)
        d = load(dh, j)
        store(dpre, j, d * (1.0 - a * a))
        store(dh, j, 0.0)


def rnn_relu_forward(gx, gh, h, s, apart, y, v, H):
    for j in range(0, H, lanes(gx)):
        a = load(gx, j) + load(gh, j)
        # A comparison with NaN is false, and NaN must stay.
        store(y, j, where_less(a, 0.0, 0.0, a))


def rnn_relu_backward(v, h_before, s, h, dh, ds, apart, dpre, H):
    for j in range(0, H, lanes(v)):
        d = load(dh, j)
        store(dpre, j, where_less(0.0, load(h, j), d, 0.0))
        store(dh, j, 0.0)


def lstm_forward(gx, gh, h, s, apart, y, v, H):
    for j in range(0, H, lanes(gx)):
        i = sigmoid(load(gx, j) + load(gh, j))
        f = sigmoid(load(gx, H + j) + load(gh, H + j))
        g = tanh(load(gx, 2 * H + j) + load(gh, 2 * H + j))
        o = sigmoid(load(gx, 3 * H + j) + load(gh, 3 * H + j))
        c = f * load(s, j) + i * g
        store(v, j, i)
        store(v, H + j, f)
        store(v, 2 * H + j, g)
        store(v, 3 * H + j, o)
        store(s, j, c)
        store(y, j, o * tanh(c))


def lstm_backward(v, h_before, s, h, dh, ds, apart, dpre, H):
    for j in range(0, H, lanes(v)):
        i = load(v, j)
        f = load(v, H + j)
        g = load(v, 2 * H + j)
        o = load(v, 3 * H + j)
        c = load(s, j)
        d = load(dh, j)
        t = tanh(f * c + i * g)
        e = load(ds, j) + d * o * (1.0 - t * t)
        store(dpre, j, e * g * i * (1.0 - i))
        store(dpre, H + j, e * c * f * (1.0 - f))
        store(dpre, 2 * H + j, e * i * (1.0 - g * g))
        store(dpre, 3 * H + j, d * t * o * (1.0 - o))
        store(dh, j, 0.0)
        store(ds, j, e * f)


def gru_forward(gx, gh, h, s, apart, y, v, H):
    for j in range(0, H, lanes(gx)):
        r = sigmoid(load(gx, j) + load(gh, j))
        z = sigmoid(load(gx, H + j) + load(gh, H + j))
        h_n = load(gh, 2 * H + j)
        n = tanh(load(gx, 2 * H + j) + r * h_n)
        store(v, j, r)
        store(v, H + j, z)
        store(v, 2 * H + j, n)
        store(v, 3 * H + j, h_n)
        store(y, j, n + z * (load(h, j) - n))


def gru_backward(v, h_before, s, h, dh, ds, apart, dpre, H):
    for j in range(0, H, lanes(v)):
        r = load(v, j)
        z = load(v, H + j)
        n = load(v, 2 * H + j)
        h_n = load(v, 3 * H + j)
        d = load(dh, j)
        dx_n = d * (1.0 - z) * (1.0 - n * n)
        store(dpre, j, dx_n * h_n * r * (1.0 - r))
        store(dpre, H + j, d * (load(h_before, j) - n) * z * (1.0 - z))
        store(dpre, 2 * H + j, dx_n)
        store(dpre, 3 * H + j, dx_n * r)
        store(dh, j, d * z)


CELLS = dict(
    zip(
        MODES,
        (
            (rnn_tanh_forward, rnn_tanh_backward),
            (rnn_relu_forward, rnn_relu_backward),
            (lstm_forward, lstm_backward),
            (gru_forward, gru_backward),
        ),
        strict=True,
    )
)


@cache
def compiled(mode: str, element: types.Float) -> tuple[Any, Any]:
    """A cell's two functions, as C functions."""
    p, i = types.CPointer(element), types.intp
    signatures = types.void(p, p, p, p, i, p, p, i), types.void(p, p, p, p, p, p, i, p, i)
    return tuple(
        cached(cfunc, signature, function)
        for signature, function in zip(signatures, CELLS[mode], strict=True)
    )
