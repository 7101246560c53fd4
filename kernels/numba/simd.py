"""Vectors of the processor's native width as a Numba type, and the operations on them.

LLVM's vectorizer would have to prove that a dozen pointers do not overlap before it vectorises a
loop over them, and gives up. So kernels use vectors explicitly: ``load`` and ``store`` move one,
operators and the functions below compute on all of its lanes, and a number combined with a vector
becomes a vector.

A tile is the product of a few rows with a panel of weights, held in registers.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, overload

__all__ = [
    "PANEL",
    "ROWS",
    "TILES",
    "Vector",
    "at",
    "cached",
    "call",
    "exp",
    "lanes",
    "load",
    "pointer",
    "put",
    "sigmoid",
    "store",
    "tanh",
    "where_less",
]


def _bytes() -> int:
    """The bytes of a vector: the processor's width, as far as ATEN_CPU_CAPABILITY allows it."""
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know the processor
        features = {}
    allowed = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    return min(allowed, 64 if features.get("avx512f") else 32 if features.get("avx2") else 16)


_BYTES = _bytes()
_STAMP = f"{_BYTES}_{zlib.crc32(Path(__file__).read_bytes()):08x}"

PANEL = 2
"""The width of a panel, in vectors."""

ROWS = 8 if _BYTES == 64 else 4
"""Rows of the largest tile: with PANEL vectors per row, it fills the registers."""


class Vector(types.Type):
    """As many elements of a float type as fit in a register."""

    def __init__(self, element: types.Float) -> None:
        super().__init__(f"Vector({element})")
        self.element = element

    @property
    def lanes(self) -> int:
        return _BYTES * 8 // self.element.bitwidth

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(_scalar(self.element), self.lanes)

    def can_convert_from(self, typingctx: Any, other: types.Type) -> Conversion | None:
        return Conversion.safe if isinstance(other, types.Number) else None


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


def _scalar(element: types.Float) -> ir.Type:
    return ir.FloatType() if element.bitwidth == 32 else ir.DoubleType()


def _fill(builder: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A scalar in every lane."""
    index = ir.Constant(ir.IntType(32), 0)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, index)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


@lower_cast(types.Number, Vector)
def _number_to_vector(
    context: Any, builder: ir.IRBuilder, fromty: types.Number, toty: Vector, value: ir.Value
) -> ir.Value:
    return _fill(builder, context.cast(builder, value, fromty, toty.element), toty.ir)


def _operator(function: Callable[..., Any], instruction: str) -> None:
    @infer_global(function)
    class _Operator(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            vectors = [a for a in args if isinstance(a, Vector)]
            if vectors:
                return signature(vectors[0], *(vectors[0] for _ in args))
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        # A product and a sum may be contracted to one instruction. No other change is allowed.
        return getattr(builder, instruction)(*args, flags=("contract",))

    arity = 1 if function is operator.neg else 2
    lower_builtin(function, *[Vector] * arity)(lower)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
    (operator.neg, "fneg"),
):
    _operator(_function, _instruction)


@intrinsic
def pointer(typingctx, address, like):
    """An integer address as a pointer to elements of ``like``'s type."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(types.intp, like), codegen


def cached(decorator: Callable[..., Any], signature: Any, function: Any, **options: Any) -> Any:
    """Compile a function, and cache it in a file if a folder is writable.

    Numba names the file after the function, and detects changes of the function's own source. It
    would not detect changes of this file, above all of the vector width, hence the stamp.
    """
    options["error_model"] = "numpy"
    function.__qualname__ = f"{function.__name__}_{_STAMP}"
    try:
        return decorator(signature, cache=True, **options)(function)
    except (RuntimeError, OSError):
        return decorator(signature, **options)(function)


@intrinsic
def call(typingctx, address, arguments):
    """Call the C function at an address, which returns nothing."""

    def codegen(context, builder, sig, args):
        values = [builder.extract_value(args[1], k) for k in range(len(arguments))]
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), codegen


@intrinsic
def at(typingctx, base, index):
    """The pointer ``base + index``."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return base(base, types.intp), codegen


@intrinsic
def lanes(typingctx, base):
    """The number of elements of ``base``'s type in a vector."""
    count = Vector(base.dtype).lanes

    def codegen(context, builder, sig, args):
        return context.get_constant(types.intp, count)

    return types.intp(base), codegen


def _vector_at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, kind: Vector) -> ir.Value:
    return builder.bitcast(builder.gep(base, [index]), kind.ir.as_pointer())


@intrinsic
def load(typingctx, base, index):
    """The vector at ``base + index``, which need not be aligned."""
    kind = Vector(base.dtype)

    def codegen(context, builder, sig, args):
        address = _vector_at(builder, *args, kind)
        return builder.load(address, align=kind.element.bitwidth // 8)

    return kind(base, types.intp), codegen


@intrinsic
def store(typingctx, base, index, value):
    """Write a vector to ``base + index``, which need not be aligned."""
    kind = Vector(base.dtype)

    def codegen(context, builder, sig, args):
        address = _vector_at(builder, args[0], args[1], kind)
        builder.store(args[2], address, align=kind.element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(base, types.intp, kind), codegen


@intrinsic
def put(typingctx, base, index, value):
    """Write one element."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(base, types.intp, base.dtype), codegen


@intrinsic
def where_less(typingctx, a, b, x, y):
    """Per lane: x where ``a < b``, otherwise y. NaN compares as not less."""
    kind = next(t for t in (a, b, x, y) if isinstance(t, Vector))

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return kind(kind, kind, kind, kind), codegen


def _integers(kind: Vector, value: int) -> ir.Constant:
    """A vector of integers as wide as the elements."""
    return ir.Constant(
        ir.VectorType(ir.IntType(kind.element.bitwidth), kind.lanes), [value] * kind.lanes
    )


@intrinsic
def with_sign(typingctx, x, sign):
    """The magnitude of x with the sign of ``sign``."""
    kind = x if isinstance(x, Vector) else sign
    top = 1 << (kind.element.bitwidth - 1)

    def codegen(context, builder, sig, args):
        mask = _integers(kind, top)
        x, sign = (builder.bitcast(a, mask.type) for a in args)
        bits = builder.or_(builder.and_(x, _integers(kind, top - 1)), builder.and_(sign, mask))
        return builder.bitcast(bits, kind.ir)

    return kind(kind, kind), codegen


@njit
def absolute(x):
    return with_sign(x, 1.0)


@intrinsic
def power_of_2(typingctx, n):
    """``2^n``, where n was rounded to an integer by adding a large constant, still included."""
    mantissa, bias = (23, 127) if n.element.bitwidth == 32 else (52, 1023)

    def codegen(context, builder, sig, args):
        shift, one = _integers(n, mantissa), _integers(n, bias << mantissa)
        bits = builder.shl(builder.bitcast(args[0], shift.type), shift)
        return builder.bitcast(builder.add(bits, one), n.ir)

    return n(n), codegen


# exp, sigmoid and tanh, with the ranges and polynomials of Cephes. Arguments of exp are at most 0,
# so it cannot overflow.


@njit
def _exp32(x):
    x = where_less(x, -87.0, -87.0, x)
    n = x * 1.44269504088896341 + 12582912.0
    k = n - 12582912.0
    r = x - k * 0.693359375 + k * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return (p * (r * r) + r + 1.0) * power_of_2(n)


@njit
def _exp64(x):
    x = where_less(x, -708.0, -708.0, x)
    n = x * 1.4426950408889634 + 6755399441055744.0
    k = n - 6755399441055744.0
    r = x - k * 6.93145751953125e-1 - k * 1.42860682030941723212e-6
    z = r * r
    p = 1.26177193074810590878e-4 * z + 3.02994407707441961300e-2
    p = (p * z + 9.99999999999999999910e-1) * r
    q = 3.00198505138664455042e-6 * z + 2.52448340349684104192e-3
    q = q * z + 2.27265548208155028766e-1
    q = q * z + 2.00000000000000000005
    return (1.0 + 2.0 * p / (q - p)) * power_of_2(n)


@njit
def _tanh32(x):
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = _exp32(-2.0 * absolute(x))
    return where_less(z, 0.390625, p * z * x + x, with_sign((1.0 - e) / (1.0 + e), x))


@njit
def _tanh64(x):
    z = x * x
    p = -9.64399179425052238628e-1 * z - 9.92877231001918586564e1
    p = p * z - 1.61468768441708447952e3
    q = z + 1.12811678491632931402e2
    q = q * z + 2.23548839060100448583e3
    q = q * z + 4.84406305325125486048e3
    e = _exp64(-2.0 * absolute(x))
    return where_less(z, 0.390625, x + x * z * p / q, with_sign((1.0 - e) / (1.0 + e), x))


def exp(x: Any) -> Any:
    """The exponential of numbers that are at most 0."""
    raise NotImplementedError("exp is for compiled code only")


def tanh(x: Any) -> Any:
    raise NotImplementedError("tanh is for compiled code only")


@overload(exp)
def _exp(x):
    function = _exp32 if x.element.bitwidth == 32 else _exp64
    return lambda x: function(x)


@overload(tanh)
def _tanh(x):
    function = _tanh32 if x.element.bitwidth == 32 else _tanh64
    return lambda x: function(x)


@njit
def sigmoid(x):
    e = exp(-absolute(x))
    y = 1.0 / (1.0 + e)
    return where_less(x, 0.0, e * y, y)


def _tile(R: int) -> Any:
    """``out[r] = init[r] + a[r] W`` for R rows and a panel ``W [K, PANEL vectors]``.

    K is a positive multiple of 4. With few rows, several partial sums over K are computed side by
    side, since the multipliers would have to wait for a single sum.
    """
    split = {1: 4, 2: 2}.get(R, 1)
    integer, vectors = ir.IntType(64), range(PANEL)

    @intrinsic
    def tile(typingctx, w, K, a, stride, out, out_stride, init, init_stride):
        kind = Vector(w.dtype)
        size = kind.element.bitwidth // 8

        def codegen(context, builder, sig, args):
            w, K, a, stride, out, out_stride, init, init_stride = args

            def number(n: int) -> ir.Constant:
                return ir.Constant(integer, n)

            def vector(base: ir.Value, index: ir.Value, v: int) -> ir.Value:
                index = builder.add(index, number(v * kind.lanes))
                return _vector_at(builder, base, index, kind)

            def read(*index: Any) -> ir.Value:
                return builder.load(vector(*index), align=size)

            starts = [builder.gep(a, [builder.mul(stride, number(r))]) for r in range(R)]
            zero = ir.Constant(kind.ir, [0.0] * kind.lanes)
            before, body = builder.block, builder.append_basic_block("tile")
            builder.branch(body)

            builder.position_at_end(body)
            k = builder.phi(integer)
            sums = {
                (s, r, v): builder.phi(kind.ir)
                for s in range(split)
                for r in range(R)
                for v in vectors
            }
            after = {}
            for s in range(split):
                k_s = builder.add(k, number(s))
                row = builder.mul(k_s, number(PANEL * kind.lanes))
                weights = [read(w, row, v) for v in vectors]
                for r in range(R):
                    a_k = _fill(builder, builder.load(builder.gep(starts[r], [k_s])), kind.ir)
                    for v in vectors:
                        term = builder.fmul(a_k, weights[v], flags=("contract",))
                        after[s, r, v] = builder.fadd(sums[s, r, v], term, flags=("contract",))
            k_after = builder.add(k, number(split))
            k.add_incoming(number(0), before)
            k.add_incoming(k_after, body)
            for (s, r, v), total in sums.items():
                total.add_incoming(zero, before)
                total.add_incoming(after[s, r, v], body)
            end = builder.append_basic_block("tile.end")
            builder.cbranch(builder.icmp_signed("<", k_after, K), body, end)

            builder.position_at_end(end)
            for r in range(R):
                row = builder.mul(out_stride, number(r))
                init_row = builder.mul(init_stride, number(r))
                for v in vectors:
                    total = read(init, init_row, v)
                    for s in range(split):
                        total = builder.fadd(total, after[s, r, v])
                    builder.store(total, vector(out, row, v), align=size)
            return context.get_dummy_value()

        base = types.CPointer(w.dtype)
        i = types.intp
        return types.void(base, i, base, i, base, i, base, i), codegen

    return tile


TILES = {rows: _tile(rows) for rows in (1, 2, 4, 8)}
"""By the number of rows."""
