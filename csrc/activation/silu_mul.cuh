// SiLU of the gate times the up projection: in bf16 by as many blocks as there is work for.
#pragma once

#include "common/rows.cuh"

namespace nemo {

// Rounded before the product with `up`, and after, as two operations would.
__device__ __forceinline__ float silu(float x) {
    return multiply(x, reciprocal_fast(add(1.0f, exp2_fast(multiply(x, -LOG2_E)))));
}
__device__ __forceinline__ Pairs silu_mul(const Pairs& gate, const Pairs& up) {
    Pairs y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t activated = pack_bf16(silu(low_bf16(gate[i])), silu(high_bf16(gate[i])));
        y[i] = pack_bf16(multiply(low_bf16(activated), low_bf16(up[i])),
                         multiply(high_bf16(activated), high_bf16(up[i])));
    }
    return y;
}

constexpr int SILU_MUL_THREADS = 128;

// Block b does piece b % pieces of row b / pieces.
template <int VECTORS>
__global__ void __launch_bounds__(SILU_MUL_THREADS)
    silu_mul_kernel(bf16* y, const bf16* gate_up, int width, int pieces, int64_t stride) {
    let_next_kernel_start();
    int64_t row = blockIdx.x / unsigned(pieces);
    int first = (blockIdx.x % unsigned(pieces)) * SILU_MUL_THREADS * VECTORS + threadIdx.x;
    const bf16* from = gate_up + row * stride;
    Pairs gate[VECTORS], up[VECTORS];
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int index = first + i * SILU_MUL_THREADS;
        if (index * VECTOR < width) {
            gate[i] = load_streamed(vector_at(from, index));
            up[i] = load_streamed(vector_at(from + width, index));
        }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int index = first + i * SILU_MUL_THREADS;
        if (index * VECTOR < width) store(vector_at(y + row * width, index), silu_mul(gate[i], up[i]));
    }
}

}  // namespace nemo
