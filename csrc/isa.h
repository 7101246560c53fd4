// The engine, once per instruction set: the same source, engine.inc, in one namespace after
// another, each under its own target, so that one module contains all of them and selects one at
// run time. Every standard header is included before the first target: the linker keeps one copy of
// an inline function for the whole module, and that copy must not be compiled for AVX-512.
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
#include "parallel.h"
#include "plan.h"
#include "scratch.h"

#define FASTRNN_INLINE [[gnu::always_inline]] inline

#define FASTRNN_ISA generic
#define FASTRNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
#endif
#define FASTRNN_RUNS_HERE true
#include "engine.inc"
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
#include "engine.inc"
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
#include "engine.inc"
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
