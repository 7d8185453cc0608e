// Rows in FP8 with a scale per row, by a block that holds the row in registers; or with a scale per 128 elements, by 16
// lanes that hold them. A row is read from memory, or is SiLU of a gate times up.
#pragma once

#include "activation/silu_mul.cuh"
#include "common/quantize.cuh"

namespace nemo {

// Shared memory: the warps' maxima.
constexpr int QUANTIZE_SHARED_BYTES = 32 * 4;

template <int VECTORS, bool IS_GATED>
__global__ void __launch_bounds__(1024) quantize_rows_kernel(
    fp8* y, float* scales, const bf16* x, const float* fixed_scale, int width, int64_t stride) {
    let_next_kernel_start();
    int64_t row = blockIdx.x;
    const bf16* from = x + row * stride;
    Pairs values[VECTORS], up[VECTORS];
    wait_for_previous_kernel();
    for_vectors<VECTORS>(width, [&](int i, int index) {
        values[i] = load_streamed(vector_at(from, index));
        if (IS_GATED) up[i] = load_streamed(vector_at(from + width, index));
    });
    uint32_t largest = 0;
    for_vectors<VECTORS>(width, [&](int i, int) {
        if (IS_GATED) values[i] = silu_mul(values[i], up[i]);
        largest = largest_magnitude(values[i], largest);
    });
    Scale scale = scale_of(block_max(largest, shared_memory<uint32_t>()), fixed_scale);
    if (threadIdx.x == 0) store(scales + row, scale.value);
    for_vectors<VECTORS>(width, [&](int i, int index) {
        store(vector_at(y + row * width, index), quantize(values[i], scale));
    });
}

constexpr int SCALE_BLOCK = 128;  // elements that share a scale
constexpr int SCALE_BLOCK_LANES = SCALE_BLOCK / VECTOR;
constexpr int QUANTIZE_BLOCKS_THREADS = 256;
constexpr int BLOCKS_PER_BLOCK = QUANTIZE_BLOCKS_THREADS / SCALE_BLOCK_LANES;

// 16 lanes for each of rows * groups scales, in the order of `scales`.
__global__ void __launch_bounds__(QUANTIZE_BLOCKS_THREADS)
    quantize_blocks_kernel(fp8* y, float* scales, const bf16* x, int count, int groups, int width, int64_t stride) {
    let_next_kernel_start();
    int group = blockIdx.x * BLOCKS_PER_BLOCK + threadIdx.x / SCALE_BLOCK_LANES;
    int64_t row = group / groups;
    int index = group % groups * SCALE_BLOCK_LANES + threadIdx.x % SCALE_BLOCK_LANES;
    bool is_inside = group < count && index * VECTOR < width;
    Pairs values{};
    wait_for_previous_kernel();
    if (is_inside) values = load_streamed(vector_at(x + row * stride, index));
    Scale scale = scale_of(warp_max<SCALE_BLOCK_LANES>(largest_magnitude(values, 0)), nullptr);
    if (is_inside) store(vector_at(y + row * width, index), quantize(values, scale));
    if (is_inside && threadIdx.x % SCALE_BLOCK_LANES == 0) store(scales + group, scale.value);
}

}  // namespace nemo
