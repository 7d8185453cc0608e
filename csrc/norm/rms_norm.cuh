// RMSNorm of one row by one block, after the addition of the residual, with FP8 quantisation if the output is FP8. The
// row stays in registers from its one read to its one write.
#pragma once

#include <type_traits>

#include "common/quantize.cuh"

namespace nemo {

template <class Y>
struct RmsNorm {
    Y* y;           // dense
    float* scales;  // of FP8
    bf16* sum;      // dense; with a residual only
    const bf16 *x, *residual, *weight;
    const float* fixed_scale;  // or null
    int width;
    int64_t x_stride, residual_stride;  // elements between rows
    float eps;
};

// Shared memory: the warps' sums, then their maxima.
constexpr int RMS_NORM_SHARED_BYTES = 2 * 32 * 4;

// x + residual, rounded: what the next residual is.
__device__ __forceinline__ Pairs sum_of(const Pairs& x, const Pairs& residual) {
    Pairs sum;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] = pack_bf16(add(low_bf16(x[i]), low_bf16(residual[i])), add(high_bf16(x[i]), high_bf16(residual[i])));
    }
    return sum;
}

__device__ __forceinline__ float squares_of(const Pairs& x, float so_far) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        so_far = multiply_add(low_bf16(x[i]), low_bf16(x[i]), so_far);
        so_far = multiply_add(high_bf16(x[i]), high_bf16(x[i]), so_far);
    }
    return so_far;
}

// Rounded before the product with the weight, and after.
__device__ __forceinline__ Pairs normalised(const Pairs& x, const Pairs& weight, float inverse) {
    Pairs y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t normed = pack_bf16(multiply(low_bf16(x[i]), inverse), multiply(high_bf16(x[i]), inverse));
        y[i] = pack_bf16(multiply(low_bf16(normed), low_bf16(weight[i])),
                         multiply(high_bf16(normed), high_bf16(weight[i])));
    }
    return y;
}

template <int VECTORS, bool HAS_RESIDUAL, class Y>
__global__ void __launch_bounds__(1024) rms_norm_kernel(const RmsNorm<Y> p) {
    let_next_kernel_start();
    float* scratch = shared_memory<float>();
    int64_t row = blockIdx.x;
    Pairs weight[VECTORS], x[VECTORS], residual[VECTORS];

    for_vectors<VECTORS>(p.width, [&](int i, int index) { weight[i] = load(vector_at(p.weight, index)); });
    wait_for_previous_kernel();
    for_vectors<VECTORS>(p.width, [&](int i, int index) {
        const Pairs* from = vector_at(p.x + row * p.x_stride, index);
        x[i] = HAS_RESIDUAL ? load_streamed(from) : load(from);  // without one, x is itself the next residual
        if (HAS_RESIDUAL) residual[i] = load_streamed(vector_at(p.residual + row * p.residual_stride, index));
    });
    float squares = 0;
    for_vectors<VECTORS>(p.width, [&](int i, int index) {
        if (HAS_RESIDUAL) {
            x[i] = sum_of(x[i], residual[i]);
            store(vector_at(p.sum + row * p.width, index), x[i]);
        }
        squares = squares_of(x[i], squares);
    });
    float inverse = rsqrt_fast(add(divide(block_sum(squares, scratch), float(p.width)), p.eps));

    uint32_t largest = 0;
    for_vectors<VECTORS>(p.width, [&](int i, int index) {
        x[i] = normalised(x[i], weight[i], inverse);
        if constexpr (std::is_same_v<Y, bf16>) {
            store(vector_at(p.y + row * p.width, index), x[i]);
        } else {
            largest = largest_magnitude(x[i], largest);
        }
    });
    if constexpr (std::is_same_v<Y, fp8>) {
        Scale scale = scale_of(block_max(largest, reinterpret_cast<uint32_t*>(scratch + 32)), p.fixed_scale);
        if (threadIdx.x == 0) store(p.scales + row, scale.value);
        for_vectors<VECTORS>(p.width, [&](int i, int index) {
            store(vector_at(p.y + row * p.width, index), quantize(x[i], scale));
        });
    }
}

}  // namespace nemo
