// FP8 pages of rows widened to bf16, exactly, so that prefill attention over an FP8 cache is that over a bf16 one.
//
// A block does one page: its heads lie in a row in the cache, and in the result. An element is read once and written
// once: 1 + 2 = 3 bytes. For a row of 32,768 keys and 8 KV heads these are 2 x 32,768 x 8 x 128 = 67 M elements, 201 MB
// a layer: 47 us at 4.3 TB/s, where the products of 2,048 queries over them take some 1.9 ms.
#pragma once

#include "attention/gather.h"
#include "common/rows.cuh"

namespace nemo {

constexpr int GATHER_DIM = 128;
constexpr int GATHER_THREADS = 256;
constexpr int GATHER_VECTORS = 4;  // of K, and of V, that a thread has under way: 96 KiB a multiprocessor, by 6 blocks

using Packed = Vec<uint16_t, 4>;  // eight e4m3 as four pairs, the lower index in the low byte

// Eight e4m3 as eight bf16. A bf16 has the exponents and more than the bits of an e4m3; NaN stays NaN.
__device__ __forceinline__ Pairs widen_vector(const Packed& packed) {
    Pairs wide;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t halves = fp8x2_to_fp16x2(packed[i]);
        wide[i] = pack_bf16(fp16_to_float(uint16_t(halves)), fp16_to_float(uint16_t(halves >> 16)));
    }
    return wide;
}

__global__ void __launch_bounds__(GATHER_THREADS) gather_pages_kernel(const GatherInputs in) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int page = blockIdx.x, low = 0, high = in.num_rows;
    if (page >= load(in.bounds + high)) return;
    while (high - low > 1) {  // the last row that begins at or before this page; of an empty row and the next, the next
        int middle = (low + high) / 2;
        (load(in.bounds + middle) <= page ? low : high) = middle;
    }
    int64_t from = load(in.page_table + load(in.slot_ids + low) * in.table_stride + page - load(in.bounds + low));
    int head_size = in.page_size * GATHER_DIM, vectors = in.num_heads * head_size / VECTOR;
    int64_t source = (from * in.num_kv_heads + in.first_head) * head_size;
    int64_t target = int64_t(page) * in.num_heads * head_size;
    const fp8* caches[2] = {in.k_cache + source, in.v_cache + source};
    bf16* outs[2] = {in.k_out + target, in.v_out + target};
    for (int first = threadIdx.x; first < vectors; first += GATHER_VECTORS * GATHER_THREADS) {
        Packed packed[2][GATHER_VECTORS];  // all are asked for before the first is needed
#pragma unroll
        for (int i = 0; i < 2 * GATHER_VECTORS; i++) {
            int index = first + i / 2 * GATHER_THREADS;
            if (index < vectors) packed[i % 2][i / 2] = load(reinterpret_cast<const Packed*>(caches[i % 2]) + index);
        }
#pragma unroll
        for (int i = 0; i < 2 * GATHER_VECTORS; i++) {
            int index = first + i / 2 * GATHER_THREADS;
            if (index < vectors) store(vector_at(outs[i % 2], index), widen_vector(packed[i % 2][i / 2]));
        }
    }
}

}  // namespace nemo
