// Number formats and small vectors, the same on a GPU and under emulation.
#pragma once

#include <cstdint>

#ifdef NEMO_EMULATED
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace nemo {

// A bfloat16, as its bits.
struct bf16 {
    uint16_t bits;
};

// An FP8 number of format e4m3 (no infinity, largest 448, NaN 0x7f), as its bits.
struct fp8 {
    uint8_t bits;
};

constexpr float FP8_MAX = 448.0f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float TINY = 1.1754943508222875e-38f;  // the smallest normal fp32

// N elements that are loaded and stored by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
    T at[N];
    __device__ __forceinline__ T& operator[](int i) { return at[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return at[i]; }
};

template <class T>
using Vec16B = Vec<T, 16 / sizeof(T)>;

__host__ __device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ __forceinline__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
__device__ __forceinline__ T minimum(T a, T b) {
    return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
    return a < b ? b : a;
}

}  // namespace nemo

#include "numbers.cuh"
