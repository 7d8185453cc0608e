// Quantisation of bf16 to FP8: the scale of a group of numbers, and their quotients.
#pragma once

#include "rows.cuh"

namespace nemo {

// Magnitudes are compared as the bits of their fp32: the order of numbers is the order of their bits, infinity and NaN
// are beyond all others, so that one maximum finds both the largest and whether all are finite.
constexpr uint32_t INFINITY_BITS = 0x7F800000u;

__device__ __forceinline__ uint32_t largest_magnitude(const Pairs& x, uint32_t so_far) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        so_far = maximum(so_far, (x[i] << 16) & 0x7FFF0000u);
        so_far = maximum(so_far, x[i] & 0x7FFF0000u);
    }
    return so_far;
}

// A scale, and its reciprocal correctly rounded: both computed once for a group.
struct Scale {
    float value, reciprocal;
};

__device__ __forceinline__ Scale make_scale(float value) { return {value, divide(1.0f, value)}; }

// That the largest becomes the largest FP8 number; or the fixed one, if there is one. NaN unless all are finite.
__device__ __forceinline__ Scale scale_of(uint32_t largest, const float* fixed) {
    float value = fixed != nullptr ? load(fixed) : maximum(divide(float_of_bits(largest), FP8_MAX), TINY);
    return make_scale(largest < INFINITY_BITS ? value : float_of_bits(0x7FC00000u));
}

// x / scale in FP8. The product with the reciprocal, corrected by its remainder, is the correctly rounded quotient for
// every normal scale up to 2^126. Beyond 448 it is saturated anyway: the bound keeps infinity out of the remainder,
// where it would make NaN. -0 becomes 0. A division would cost twice as many instructions.
__device__ __forceinline__ float quotient(float x, const Scale& scale) {
    float close = minimum(maximum(multiply(x, scale.reciprocal), -512.0f), 512.0f);
    return multiply_add(multiply_add(-close, scale.value, x), scale.reciprocal, close);
}
__device__ __forceinline__ Vec<uint16_t, 4> quantize(const Pairs& x, const Scale& scale) {
    Vec<uint16_t, 4> q;
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = pack_fp8(quotient(low_bf16(x[i]), scale), quotient(high_bf16(x[i]), scale));
    return q;
}

// Eight FP8 numbers: vector `index` of a row.
__device__ __forceinline__ Vec<uint16_t, 4>* vector_at(fp8* row, int index) {
    return reinterpret_cast<Vec<uint16_t, 4>*>(row) + index;
}

}  // namespace nemo
