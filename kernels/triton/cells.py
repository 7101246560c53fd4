"""The cells: one step of a tile of hidden units, forward and backward.

The derivations and the order of the pre-activations are in ``fastrnn/cells.py``; names and orders
here are the same. Every value is a float32 tile ``[rows, units]``:

    forward(pre[num_preacts], s[states]) -> (y[states], v[saved])
    backward(v[saved], s[states], h, dy[states]) -> (dpre[num_preacts], ds[states])

The ``v`` of a cell that saves nothing is h, and is not stored.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.jit
def exp2(x):
    """One instruction; subnormal results become zero, which tl.exp2 avoids with extra code."""
    if is_cuda():
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def reciprocal(x):
    if is_cuda():
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def tanh(x):
    # The difference below loses the digits of a small x; a polynomial (Cephes tanhf) keeps them.
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    # 2 / log(2)
    y = 1.0 - 2.0 * reciprocal(1.0 + exp2(2.8853900817779268 * x))
    return tl.where(z < 0.390625, p * z * x + x, y)


@triton.jit
def sigmoid(x):
    # -1 / log(2). An infinite power is right too: its reciprocal is zero.
    return reciprocal(1.0 + exp2(-1.4426950408889634 * x))


@triton.jit
def rnn_tanh_forward(pre, s):
    h = tanh(pre[0])
    return (h,), (h,)


@triton.jit
def rnn_tanh_backward(v, s, h, dy):
    return (dy[0] * (1 - h * h),), (tl.zeros_like(dy[0]),)


@triton.jit
def rnn_relu_forward(pre, s):
    # A comparison with NaN is false, and NaN must stay.
    h = tl.where(pre[0] <= 0, 0.0, pre[0])
    return (h,), (h,)


@triton.jit
def rnn_relu_backward(v, s, h, dy):
    return (tl.where(h <= 0, 0.0, dy[0]),), (tl.zeros_like(dy[0]),)


@triton.jit
def lstm_forward(pre, s):
    i = sigmoid(pre[0])
    f = sigmoid(pre[1])
    g = tanh(pre[2])
    o = sigmoid(pre[3])
    c = f * s[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def lstm_backward(v, s, h, dy):
    i, f, g, o = v
    c = s[1]
    t = tanh(f * c + i * g)
    e = dy[1] + dy[0] * o * (1 - t * t)
    dpre = (
        e * g * i * (1 - i),
        e * c * f * (1 - f),
        e * i * (1 - g * g),
        dy[0] * t * o * (1 - o),
    )
    return dpre, (tl.zeros_like(dy[0]), e * f)


@triton.jit
def gru_forward(pre, s):
    r = sigmoid(pre[0])
    z = sigmoid(pre[1])
    n = tanh(pre[2] + r * pre[3])
    return (n + z * (s[0] - n),), (r, z, n, pre[3])


@triton.jit
def gru_backward(v, s, h, dy):
    r, z, n, h_n = v
    dx_n = dy[0] * (1 - z) * (1 - n * n)
    dpre = (
        dx_n * h_n * r * (1 - r),
        dy[0] * (s[0] - n) * z * (1 - z),
        dx_n,
        dx_n * r,
    )
    return dpre, (dy[0] * z,)


CELLS = {
    "RNN_TANH": (rnn_tanh_forward, rnn_tanh_backward),
    "RNN_RELU": (rnn_relu_forward, rnn_relu_backward),
    "LSTM": (lstm_forward, lstm_backward),
    "GRU": (gru_forward, gru_backward),
}
