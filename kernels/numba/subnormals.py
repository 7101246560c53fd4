"""Subnormal numbers are zero in the threads that compute a layer.

A processor takes some hundred cycles for an operation with one, and gradients that fade consist of
them. The mode belongs to a thread: to the caller, to the threads of the kernels' own pool, and to
those of OpenMP, on which torch's library computes the products.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from fastrnn.kernels.numba.simd import cached, put

__all__ = ["subnormals_are_zero"]

# Flush to zero and denormals are zero of MXCSR; FZ of FPCR.
_FLUSH = {"x86_64": 0x8040, "AMD64": 0x8040, "aarch64": 1 << 24, "arm64": 1 << 24}.get(
    platform.machine(), 0
)
_X86 = _FLUSH == 0x8040

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


def _instruction(builder: ir.IRBuilder, name: str, kind: ir.FunctionType, *args: ir.Value) -> Any:
    return builder.call(builder.module.declare_intrinsic(name, (), kind), args)


@intrinsic
def control(typingctx):
    """The floating-point control register of this thread."""

    def codegen(context, builder, sig, args):
        if not _X86:
            return _instruction(builder, "llvm.aarch64.get.fpcr", ir.FunctionType(_LONG, ()))
        slot = alloca_once(builder, _INT)
        kind = ir.FunctionType(ir.VoidType(), [_BYTES])
        _instruction(builder, "llvm.x86.sse.stmxcsr", kind, builder.bitcast(slot, _BYTES))
        return builder.zext(builder.load(slot), _LONG)

    return types.int64(), codegen


@intrinsic
def set_control(typingctx, bits):
    """Write that register."""

    def codegen(context, builder, sig, args):
        if _X86:
            slot = alloca_once(builder, _INT)
            builder.store(builder.trunc(args[0], _INT), slot)
            kind = ir.FunctionType(ir.VoidType(), [_BYTES])
            _instruction(builder, "llvm.x86.sse.ldmxcsr", kind, builder.bitcast(slot, _BYTES))
        else:
            kind = ir.FunctionType(ir.VoidType(), [_LONG])
            _instruction(builder, "llvm.aarch64.set.fpcr", kind, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())


def enter(before):
    """In one thread of a team: save its mode in ``before[thread]``, and make subnormals zero."""
    bits = control()
    put(before, _thread_number(), bits)
    set_control(bits | _FLUSH)


def leave(before):
    """In the same thread: its mode as it was."""
    bits = before[_thread_number()]
    if bits >= 0:  # it was in the team that entered
        set_control(bits)


@cache
def _team() -> tuple[Any, int, int] | None:
    """The function that runs another in every thread of OpenMP's team, and the two to be run.

    None without GNU's or LLVM's OpenMP, or on another processor. Intel's and LLVM's own threads
    take over their caller's mode.
    """
    if not _FLUSH or not sys.platform.startswith(("linux", "darwin")):
        return None
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if run is None:
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    signature = types.void(types.CPointer(types.int64))
    return run, *(cached(cfunc, signature, f).address for f in (enter, leave))


def _is_zero() -> bool:
    smallest = 5e-324
    return smallest * 1.0 == 0.0


@contextmanager
def subnormals_are_zero() -> Iterator[None]:
    """The mode of the calling thread and of torch's threads; put back at the end."""
    was_zero = _is_zero()
    threads = torch.get_num_threads()
    run = _team() if threads > 1 else None
    if run is None:
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(was_zero)
        return
    # Also where torch needs only one thread: another would inherit the caller's mode, and keep it,
    # if it began in the meantime.
    parallel, enter_at, leave_at = run
    before = (ctypes.c_int64 * threads)(*[-1] * threads)
    try:
        parallel(enter_at, before, threads, 0)
        yield
    finally:
        parallel(leave_at, before, threads, 0)
