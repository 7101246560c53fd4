"""The cells: one step of a row of hidden units, forward and backward.

The derivations and the order of the pre-activations are in ``fastrnn/cells.py``; names and orders
here are the same. A row has H_pad units in each plane, a multiple of the vector's lanes:

    forward(gx, gh, h, s, plane_stride, y, v, H_pad)
        gx [G], gh [G]     the two products, one plane per gate
        h, s               s[0], and s[1:], whose planes are ``plane_stride`` elements apart
        y, s               output: y[0], which may be h itself, and y[1:]
        v [saved]          output: the values saved for the backward pass

    backward(v, h_before, s, h, dh, ds, plane_stride, dpre, H_pad)
        v, s [S - 1]       as saved, one plane after the other; s[0] is ``h_before``
        h                  y[0]
        dh, ds             dy[0], and dy[1:] with planes as above; output: ds[0] and ds[1:]
        dpre [num_preacts] output: the gradient of the pre-activations

They are called by their address, so one driver serves all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cfunc, types

from fastrnn.kernels.numba import MODES
from fastrnn.kernels.numba.simd import cached, lanes, load, sigmoid, store, tanh, where_less

__all__ = ["CELLS", "compiled"]


def rnn_tanh_forward(gx, gh, h, s, plane_stride, y, v, H_pad):
    for j in range(0, H_pad, lanes(gx)):
        store(y, j, tanh(load(gx, j) + load(gh, j)))


def rnn_tanh_backward(v, h_before, s, h, dh, ds, plane_stride, dpre, H_pad):
    for j in range(0, H_pad, lanes(v)):
        a = load(h, j)
        d = load(dh, j)
        store(dpre, j, d * (1.0 - a * a))
        store(dh, j, 0.0)


def rnn_relu_forward(gx, gh, h, s, plane_stride, y, v, H_pad):
    for j in range(0, H_pad, lanes(gx)):
        a = load(gx, j) + load(gh, j)
        # A comparison with NaN is false, and NaN must stay.
        store(y, j, where_less(a, 0.0, 0.0, a))


def rnn_relu_backward(v, h_before, s, h, dh, ds, plane_stride, dpre, H_pad):
    for j in range(0, H_pad, lanes(v)):
        d = load(dh, j)
        store(dpre, j, where_less(0.0, load(h, j), d, 0.0))
        store(dh, j, 0.0)


def lstm_forward(gx, gh, h, s, plane_stride, y, v, H_pad):
    for j in range(0, H_pad, lanes(gx)):
        i = sigmoid(load(gx, j) + load(gh, j))
        f = sigmoid(load(gx, H_pad + j) + load(gh, H_pad + j))
        g = tanh(load(gx, 2 * H_pad + j) + load(gh, 2 * H_pad + j))
        o = sigmoid(load(gx, 3 * H_pad + j) + load(gh, 3 * H_pad + j))
        c = f * load(s, j) + i * g
        store(v, j, i)
        store(v, H_pad + j, f)
        store(v, 2 * H_pad + j, g)
        store(v, 3 * H_pad + j, o)
        store(s, j, c)
        store(y, j, o * tanh(c))


def lstm_backward(v, h_before, s, h, dh, ds, plane_stride, dpre, H_pad):
    for j in range(0, H_pad, lanes(v)):
        i = load(v, j)
        f = load(v, H_pad + j)
        g = load(v, 2 * H_pad + j)
        o = load(v, 3 * H_pad + j)
        c = load(s, j)
        d = load(dh, j)
        t = tanh(f * c + i * g)
        e = load(ds, j) + d * o * (1.0 - t * t)
        store(dpre, j, e * g * i * (1.0 - i))
        store(dpre, H_pad + j, e * c * f * (1.0 - f))
        store(dpre, 2 * H_pad + j, e * i * (1.0 - g * g))
        store(dpre, 3 * H_pad + j, d * t * o * (1.0 - o))
        store(dh, j, 0.0)
        store(ds, j, e * f)


def gru_forward(gx, gh, h, s, plane_stride, y, v, H_pad):
    for j in range(0, H_pad, lanes(gx)):
        r = sigmoid(load(gx, j) + load(gh, j))
        z = sigmoid(load(gx, H_pad + j) + load(gh, H_pad + j))
        h_n = load(gh, 2 * H_pad + j)
        n = tanh(load(gx, 2 * H_pad + j) + r * h_n)
        store(v, j, r)
        store(v, H_pad + j, z)
        store(v, 2 * H_pad + j, n)
        store(v, 3 * H_pad + j, h_n)
        store(y, j, n + z * (load(h, j) - n))


def gru_backward(v, h_before, s, h, dh, ds, plane_stride, dpre, H_pad):
    for j in range(0, H_pad, lanes(v)):
        r = load(v, j)
        z = load(v, H_pad + j)
        n = load(v, 2 * H_pad + j)
        h_n = load(v, 3 * H_pad + j)
        d = load(dh, j)
        dx_n = d * (1.0 - z) * (1.0 - n * n)
        store(dpre, j, dx_n * h_n * r * (1.0 - r))
        store(dpre, H_pad + j, d * (load(h_before, j) - n) * z * (1.0 - z))
        store(dpre, 2 * H_pad + j, dx_n)
        store(dpre, 3 * H_pad + j, dx_n * r)
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
    """The forward and backward function of a cell, as C functions."""
    p, i = types.CPointer(element), types.intp
    signatures = types.void(p, p, p, p, i, p, p, i), types.void(p, p, p, p, p, p, i, p, i)
    return tuple(
        cached(cfunc, signature, function)
        for signature, function in zip(signatures, CELLS[mode], strict=True)
    )
