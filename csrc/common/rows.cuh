// Kernels whose block holds one row in registers: what each thread holds, how many threads that takes, and sums and
// maxima over the block.
#pragma once

#include <type_traits>

#include "barrier.cuh"
#include "check.h"
#include "warp.cuh"

namespace nemo {

// Eight bf16 as four pairs, the lower index in the low half: one 16-byte access.
using Pairs = Vec<uint32_t, 4>;
constexpr int VECTOR = 8;
constexpr int MAX_ROW_WIDTH = 16384;

__device__ __forceinline__ float low_bf16(uint32_t pair) { return float_of_bits(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return float_of_bits(pair & 0xFFFF0000u); }

// Vector `index` of a row.
__device__ __forceinline__ const Pairs* vector_at(const bf16* row, int index) {
    return reinterpret_cast<const Pairs*>(row) + index;
}
__device__ __forceinline__ Pairs* vector_at(bf16* row, int index) { return reinterpret_cast<Pairs*>(row) + index; }

// Visits the vectors that this thread holds: visit(i, index), i < VECTORS.
template <int VECTORS, class Visit>
__device__ __forceinline__ void for_vectors(int width, Visit visit) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        int index = threadIdx.x + i * blockDim.x;
        if (index * VECTOR < width) visit(i, index);
    }
}

// ---- over a block of whole warps, called by all its threads, once for each `scratch` (32 words of shared memory, so
// that one barrier is enough). The order of additions depends on the number of threads only.

__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    block_sync();
    return warp_sum(lane_index() < int(blockDim.x) / 32 ? scratch[lane_index()] : 0.0f);
}
__device__ __forceinline__ uint32_t block_max(uint32_t x, uint32_t* scratch) {
    x = warp_max(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    block_sync();
    return warp_max(lane_index() < int(blockDim.x) / 32 ? scratch[lane_index()] : 0u);
}

// ---- host

// Thread t holds vectors t, t + threads, ... of its row, `vectors` of them at most: 1, 2 or 4.
struct RowPlan {
    int vectors, threads;
};

// Few rows: all the threads that a row has vectors for, because its latency is all that counts. Once the GPU is full
// (two rows for each multiprocessor) two vectors a thread and at most 512 threads, so that several blocks share a
// multiprocessor and one loads while another waits for its sum.
inline RowPlan plan_row(int64_t rows, int width, int num_sms) {
    bool is_full = rows > 2 * int64_t(num_sms);
    int most_threads = is_full ? 512 : 1024;
    RowPlan plan{is_full ? 2 : 1, 0};
    while (plan.vectors * most_threads * VECTOR < width) plan.vectors *= 2;
    plan.threads = ceil_div(ceil_div(width, VECTOR * plan.vectors), 32) * 32;
    return plan;
}

// launch_for(std::integral_constant<int, vectors>{}) with the plan's vectors as a constant.
template <class LaunchFor>
void with_vectors(const RowPlan& plan, LaunchFor&& launch_for) {
    switch (plan.vectors) {
        case 1: return launch_for(std::integral_constant<int, 1>{});
        case 2: return launch_for(std::integral_constant<int, 2>{});
        default: return launch_for(std::integral_constant<int, 4>{});
    }
}

inline void check_rows(int64_t rows, int width) {
    CHECK_RANGE(rows, 0, 0x7FFFFFFF);
    CHECK_RANGE(width, VECTOR, MAX_ROW_WIDTH);
    CHECK_MULTIPLE(width, VECTOR);
}

}  // namespace nemo
