// The engine, once per instruction set: the same .inc files in one namespace after another, each
// under a target of its own, so that one module holds all of them and picks at run time. Every
// standard header stands before the first target: an inline function of the standard library that
// was compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "engine.h"

#define FASTRNN_INLINE [[gnu::always_inline]] inline

#define FASTRNN_ISA generic
#define FASTRNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
#endif
#define FASTRNN_RUNS_HERE true
#include "layer.inc"
#undef FASTRNN_ISA
#undef FASTRNN_VECTOR_BYTES
#undef FASTRNN_REGISTERS
#undef FASTRNN_RUNS_HERE

#if defined(__x86_64__)

#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#define FASTRNN_RUNS_HERE __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "layer.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTRNN_ISA
#undef FASTRNN_VECTOR_BYTES
#undef FASTRNN_REGISTERS
#undef FASTRNN_RUNS_HERE

#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#define FASTRNN_RUNS_HERE                                                    \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
#endif
#include "layer.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTRNN_ISA
#undef FASTRNN_VECTOR_BYTES
#undef FASTRNN_REGISTERS
#undef FASTRNN_RUNS_HERE

#define FASTRNN_ENGINES &avx512::kEngine, &avx2::kEngine, &generic::kEngine

#else

#define FASTRNN_ENGINES &generic::kEngine

#endif
