// Conversions between number formats, and the arithmetic that is spelled differently from host C++.
#pragma once

#ifdef NEMO_EMULATED
#include "emulation/numbers.h"
#else

namespace nemo {

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// (lo, hi) rounded to nearest even, lo in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

// (lo, hi) rounded to nearest even fp16, lo in the low half. Beyond 65504: infinity.
__device__ __forceinline__ uint32_t pack_fp16(float lo, float hi) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

// (lo, hi) rounded to nearest even e4m3, saturated at +-448, NaN stays NaN; lo in the low byte.
__device__ __forceinline__ uint16_t pack_fp8(float lo, float hi) {
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(hi), "f"(lo));
    return packed;
}

// Two e4m3 numbers as two fp16, exactly; the low byte in the low half.
__device__ __forceinline__ uint32_t fp8x2_to_fp16x2(uint16_t packed) {
    uint32_t wide;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(packed));
    return wide;
}

__device__ __forceinline__ float fp16_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// Bytes of (a, b) chosen by the four low nibbles of selector: 0-3 from a, 4-7 from b (PTX prmt).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// Approximations within some 2 ulp: base 2 exponential and reciprocals (denormal results are
// 0), logarithms.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rsqrt_fast(float x) { return rsqrtf(x); }

// Correctly rounded, never fused with a neighbour.
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
// a * b + c, rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace nemo

#endif

namespace nemo {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(fp8 x) { return fp16_to_float(uint16_t(fp8x2_to_fp16x2(x.bits))); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    return {uint16_t(pack_bf16(x, 0.0f))};
}
template <>
__device__ __forceinline__ fp8 narrow<fp8>(float x) {
    return {uint8_t(pack_fp8(x, 0.0f))};
}

// The value that x has once it is stored as T.
template <class T>
__device__ __forceinline__ float rounded(float x) {
    return widen(narrow<T>(x));
}

}  // namespace nemo
