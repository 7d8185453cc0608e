// y = x w^T of at most 64 tokens: weights stream once through shared memory, tokens are the columns of wgmma.
//
// A block does tiles of `tile_rows` outputs over all of K, in turn. One warp keeps a ring of stages filled, of weights
// (before the previous kernel has ended) and of x; each warpgroup of consumers multiplies 64 rows of the tile by all
// tokens. Rows beyond the tile and columns beyond the tokens are read as they lie there, and not stored.
//
// The blocks of a cluster share x: each fetches some tokens of every stage and multicasts them to all. They go through
// the same steps together: a stage is filled again when the warps of all blocks have let go of it, and a block without
// a tile in the last round multiplies zeros.
#pragma once

#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "linear/small_input.cuh"

namespace nemo {

constexpr int STAGE_CHUNKS = 2;        // of 128 bytes of K: one is too little work for a barrier's round trip
constexpr int MAX_STAGES = 8;
constexpr int GROUP_ROWS = 64;         // of a tile, to a warpgroup
constexpr int MAX_TILE_ROWS = 128;
constexpr int PRODUCER_THREADS = 32;
constexpr int HEADER_BYTES = 1024;     // barriers, scales, scratch
constexpr int OVERREAD_BYTES = GROUP_ROWS * CHUNK_BYTES;  // behind the stages: of a tile narrower than its warpgroups

struct SmallLinear {
    bf16* y;
    int rows, outputs, chunks;  // chunks: of K, 128 bytes each
    int tile_rows, stages;
    int cluster, shared_tokens;  // blocks that share x; tokens that each of them fetches, if there are so many left
    int made_steps;  // whose input is made at once, where it is made here: all, or a part of a gated activation in bf16
    LinearScales scales;
    SmallInput input;
    SharedInput shared;
};

struct SmallHeader {
    Mbarrier full[MAX_STAGES], empty[MAX_STAGES], made;
    int taken;
    float scales[FUSED_TOKENS];
    float scratch[2 * 8];  // two words per warp of consumers
};
static_assert(sizeof(SmallHeader) <= HEADER_BYTES);

// The ring's position: the next stage, and the parity of its phase.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int TOKENS, bool HAS_X>
__device__ __forceinline__ int stage_bytes(int tile_rows) {
    return STAGE_CHUNKS * CHUNK_BYTES * (tile_rows + (HAS_X ? TOKENS : 0));
}

// ---- load

template <class W>
__device__ __forceinline__ void load_weights(
    unsigned char* stage, const TensorMap* map, Mbarrier* full, int tile_rows, int tile, int step) {
    constexpr int ELEMENTS = CHUNK_BYTES / sizeof(W);
#pragma unroll
    for (int i = 0; i < STAGE_CHUNKS; i++) {
        tma_load_2d(stage + i * tile_rows * CHUNK_BYTES, map, full, (step * STAGE_CHUNKS + i) * ELEMENTS,
                    tile * tile_rows, Keep::EVICT_FIRST);
    }
}

template <class W, int TOKENS>
__device__ __forceinline__ void load_tokens(
    unsigned char* stage, const TensorMap* map, Mbarrier* full, const SmallLinear& p, int step) {
    constexpr int ELEMENTS = CHUNK_BYTES / sizeof(W);
    int first = p.cluster == 1 ? 0 : cluster_rank() * p.shared_tokens;
    if (first >= TOKENS) return;
    unsigned char* to = stage + (STAGE_CHUNKS * p.tile_rows + first) * CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < STAGE_CHUNKS; i++) {
        int k = (step * STAGE_CHUNKS + i) * ELEMENTS;
        unsigned char* chunk = to + i * TOKENS * CHUNK_BYTES;
        if (p.cluster == 1) {
            tma_load_2d(chunk, map, full, k, first, Keep::EVICT_LAST);
        } else {
            tma_load_2d_multicast(chunk, map, full, k, first, uint16_t((1 << p.cluster) - 1), Keep::EVICT_LAST);
        }
    }
}

// Tiles that each block of this one's cluster goes through: as many as its first block has.
__device__ __forceinline__ int rounds_of_cluster(const SmallLinear& p) {
    int first = blockIdx.x / unsigned(p.cluster) * p.cluster;
    return ceil_div(ceil_div(p.outputs, p.tile_rows) - first, int(gridDim.x));
}

// By one thread. The first round of the ring asks for weights alone, waits, and then for its tokens.
template <class W, int TOKENS, bool HAS_X>
__device__ __forceinline__ void produce(const SmallLinear& p, SmallHeader* header, unsigned char* ring,
                                        const TensorMap* w_map, const TensorMap* x_map) {
    int bytes = stage_bytes<TOKENS, HAS_X>(p.tile_rows), steps = ceil_div(p.chunks, STAGE_CHUNKS);
    int total = rounds_of_cluster(p) * steps, first = minimum(total, p.stages);
    auto load_weights_of = [&](int i, int stage) {
        mbarrier_arrive_expect(&header->full[stage], bytes);
        load_weights<W>(ring + stage * bytes, w_map, &header->full[stage], p.tile_rows,
                        blockIdx.x + i / steps * gridDim.x, i % steps);
    };
    for (int i = 0; i < first; i++) load_weights_of(i, i);
    if constexpr (HAS_X) {
        if (p.cluster > 1) cluster_wait();  // the others' barriers are there
        wait_for_previous_kernel();
        if (p.shared.x != nullptr) {
            mbarrier_wait(&header->made, 0);
            fence_async_proxy_global();
        }
        for (int i = 0; i < first; i++) {
            load_tokens<W, TOKENS>(ring + i * bytes, x_map, &header->full[i], p, i % steps);
        }
    }
    Ring at;
    for (int i = first; i < total; i++) {
        mbarrier_wait(&header->empty[at.stage], at.parity);
        load_weights_of(i, at.stage);
        if constexpr (HAS_X) {
            load_tokens<W, TOKENS>(ring + at.stage * bytes, x_map, &header->full[at.stage], p, i % steps);
        }
        at.advance(p.stages);
    }
}

// ---- compute

// d (+)= the product of one chunk: 128 bytes of K.
template <class W, int TOKENS>
__device__ __forceinline__ void multiply_chunk(
    float (&d)[TOKENS / 2], const unsigned char* w, const unsigned char* x, bool keeps) {
#pragma unroll
    for (int k = 0; k < CHUNK_BYTES; k += 32) {
        uint64_t a = matrix_k_major(w + k), b = matrix_k_major(x + k);
        if constexpr (std::is_same_v<W, fp8>) {
            Wgmma<TOKENS>::fp8(d, a, b, keeps || k > 0);
        } else {
            Wgmma<TOKENS>::template bf16<false>(d, a, b, keeps || k > 0);
        }
    }
}

// The two outputs and the tokens that this thread holds: d[4 j + 2 h + i] is output(h), token(j, i).
struct Place {
    int first_output, first_token, outputs, rows;
    __device__ __forceinline__ int output(int h) const { return first_output + 8 * h; }
    __device__ __forceinline__ int token(int j, int i) const { return first_token + 8 * j + i; }
};

__device__ __forceinline__ Place place_in(const SmallLinear& p, int tile) {
    int row = warp_index() * 16 + lane_index() / 4;
    return {tile * p.tile_rows + row, lane_index() % 4 * 2, p.outputs, p.rows};
}

// Scales of one chunk for what this thread holds, in its place clamped to what there is.
template <int TOKENS>
struct BlockScales {
    float w[2], x[TOKENS / 8][2];

    __device__ __forceinline__ void read(const SmallLinear& p, const Place& at, int chunk) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            w[h] = load(p.scales.w + minimum(at.output(h), at.outputs - 1) / 128 * p.scales.w_stride + chunk);
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                x[j][i] = load(p.scales.x + minimum(at.token(j, i), at.rows - 1) * p.scales.x_stride + chunk);
            }
        }
    }
};

// The products of one stage. FP8 products are summed in few bits: each chunk has accumulators of its own, which are
// then added in fp32, times the scales of the chunk's block if it has any.
template <class W, int TOKENS, bool IS_BLOCK>
__device__ __forceinline__ void multiply_stage(float (&sum)[TOKENS / 2], const SmallLinear& p, const Place& at,
                                               const unsigned char* w, const unsigned char* x, int x_chunk_bytes,
                                               int first_chunk, Mbarrier* full, uint32_t parity) {
    int w_chunk_bytes = p.tile_rows * CHUNK_BYTES;
    if constexpr (std::is_same_v<W, fp8>) {
        BlockScales<TOKENS> scales[STAGE_CHUNKS];
        if constexpr (IS_BLOCK) {
#pragma unroll
            for (int c = 0; c < STAGE_CHUNKS; c++) scales[c].read(p, at, minimum(first_chunk + c, p.chunks - 1));
        }
        float fresh[STAGE_CHUNKS][TOKENS / 2];
        mbarrier_wait(full, parity);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < STAGE_CHUNKS; c++) {
            multiply_chunk<W, TOKENS>(fresh[c], w + c * w_chunk_bytes, x + c * x_chunk_bytes, false);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int c = 0; c < STAGE_CHUNKS; c++) {
            keep_in_registers(fresh[c]);
            // Beyond K the product is 0, and the clamped scale is one that the sum has met.
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) {
                if constexpr (IS_BLOCK) {
                    float scale = multiply(scales[c].w[i % 4 / 2], scales[c].x[i / 4][i % 2]);
                    sum[i] = multiply_add(fresh[c][i], scale, sum[i]);
                } else {
                    sum[i] = add(sum[i], fresh[c][i]);
                }
            }
        }
    } else {
        mbarrier_wait(full, parity);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < STAGE_CHUNKS; c++) {
            multiply_chunk<W, TOKENS>(sum, w + c * w_chunk_bytes, x + c * x_chunk_bytes, true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_registers(sum);
    }
}

// ---- store

// `x_scales`: per token, `x_stride` apart. Scales that are in the sum already are 1.
template <class W, int TOKENS, bool IS_BLOCK>
__device__ __forceinline__ void store_tile(
    const float (&sum)[TOKENS / 2], const SmallLinear& p, const Place& at, const float* fused_scales, int tile) {
    constexpr bool HAS_SCALES = std::is_same_v<W, fp8> && !IS_BLOCK;
    int end = minimum(p.outputs, (tile + 1) * p.tile_rows);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = at.token(j, i);
            if (token >= p.rows) continue;
            float x_scale = 1;
            if constexpr (HAS_SCALES) {
                x_scale = fused_scales ? fused_scales[token] : load(p.scales.x + token * p.scales.x_stride);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (at.output(h) >= end) continue;
                float value = sum[4 * j + 2 * h + i];
                if constexpr (HAS_SCALES) {
                    value = multiply(multiply(value, x_scale), load(p.scales.w + at.output(h) * p.scales.w_stride));
                }
                store(p.y + int64_t(token) * p.outputs + at.output(h), narrow<bf16>(value));
            }
        }
    }
}

// ---- the kernel

template <class W, int TOKENS, bool IS_BLOCK, Input INPUT>
__device__ __forceinline__ void consume(
    const SmallLinear& p, SmallHeader* header, unsigned char* made, unsigned char* ring) {
    constexpr bool HAS_X = INPUT == Input::READY;
    int consumers = blockDim.x - PRODUCER_THREADS, group = warp_index() / 4;
    int steps = ceil_div(p.chunks, STAGE_CHUNKS), rounds = rounds_of_cluster(p);
    int bytes = stage_bytes<TOKENS, HAS_X>(p.tile_rows);
    if (HAS_X && p.cluster > 1) cluster_wait();
    wait_for_previous_kernel();
    auto make_from = [&](int step) {
        make_input<W, INPUT>(made, header->scales, header->scratch, p.input, step * STAGE_CHUNKS,
                             minimum(p.made_steps, steps - step) * STAGE_CHUNKS, consumers);
    };
    bool is_made_in_parts = can_make_parts<W, INPUT>() && p.made_steps < steps;
    if constexpr (!HAS_X) {
        if (!is_made_in_parts) make_from(0);
    } else if constexpr (!IS_BLOCK) {
        if (p.shared.x != nullptr) {
            make_shared_input<W>(p.shared, p.input, &header->taken, &header->made, header->scratch, consumers);
        }
    }
    Ring at;
    for (int round = 0; round < rounds; round++) {
        int tile = blockIdx.x + round * gridDim.x;
        Place place = place_in(p, tile);
        float sum[TOKENS / 2] = {};
        for (int step = 0, made_step = 0; step < steps; step++, made_step++) {
            if constexpr (can_make_parts<W, INPUT>()) {
                if (is_made_in_parts && (step == 0 || made_step == p.made_steps)) {
                    named_barrier_sync(CONSUMER_BARRIER, consumers);  // all have multiplied the part before
                    make_from(step);
                    made_step = 0;
                }
            }
            const unsigned char* stage = ring + at.stage * bytes;
            const unsigned char* x = HAS_X ? stage + STAGE_CHUNKS * p.tile_rows * CHUNK_BYTES
                                           : made + made_step * STAGE_CHUNKS * X_CHUNK_BYTES;
            multiply_stage<W, TOKENS, IS_BLOCK>(sum, p, place, stage + group * GROUP_ROWS * CHUNK_BYTES, x,
                                                HAS_X ? TOKENS * CHUNK_BYTES : X_CHUNK_BYTES, step * STAGE_CHUNKS,
                                                &header->full[at.stage], at.parity);
            if (HAS_X && p.cluster > 1) {  // lane i lets go of what block i of the cluster has sent
                if (lane_index() < p.cluster) mbarrier_arrive_at(&header->empty[at.stage], lane_index());
            } else if (lane_index() == 0) {
                mbarrier_arrive(&header->empty[at.stage]);
            }
            at.advance(p.stages);
        }
        // The columns of rows that this warpgroup read beyond the tile are not stored.
        store_tile<W, TOKENS, IS_BLOCK>(sum, p, place, HAS_X ? nullptr : header->scales, tile);
    }
}

template <class W, int TOKENS, bool IS_BLOCK, Input INPUT>
__global__ void __launch_bounds__(MAX_TILE_ROWS / GROUP_ROWS * 128 + PRODUCER_THREADS, 1)
    small_linear_kernel(const __grid_constant__ SmallLinear p, const __grid_constant__ TensorMap w_map,
                        const __grid_constant__ TensorMap x_map) {
    constexpr bool HAS_X = INPUT == Input::READY;
    unsigned char* shared = shared_memory<unsigned char>();
    auto* header = reinterpret_cast<SmallHeader*>(shared);
    int consumers = blockDim.x - PRODUCER_THREADS;
    unsigned char* made = shared + HEADER_BYTES;
    int made_chunks = HAS_X ? 0 : p.made_steps * STAGE_CHUNKS + TOKENS / FUSED_TOKENS - 1;
    unsigned char* ring = made + made_chunks * X_CHUNK_BYTES;
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            mbarrier_init(&header->full[i], 1);
            mbarrier_init(&header->empty[i], p.cluster * consumers / 32);
        }
        mbarrier_init(&header->made, 1);
        mbarrier_init_fence();
    }
    block_sync();
    if (HAS_X && p.cluster > 1) cluster_arrive_relaxed();  // and wait where the other blocks are needed first
    if (int(threadIdx.x) < consumers) {
        consume<W, TOKENS, IS_BLOCK, INPUT>(p, header, made, ring);
    } else if (int(threadIdx.x) == consumers) {
        produce<W, TOKENS, HAS_X>(p, header, ring, &w_map, &x_map);
    } else if (HAS_X && p.cluster > 1) {
        cluster_wait();
    }
    if (HAS_X && p.cluster > 1) {  // the other blocks arrive at this one's barriers until they are here
        cluster_arrive();
        cluster_wait();
    }
}

}  // namespace nemo
