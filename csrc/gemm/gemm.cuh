// y = x w^T in FP8: a persistent grid, a warpgroup that fetches tiles with the copy engine, two that multiply them.
//
// The tensor cores add FP8 products in few bits, so each 128 of K is summed in accumulators of its own, which are then
// added in fp32, where scales of blocks are applied as well. Other scales are applied once, to the sum.
#pragma once

#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "common/tma.cuh"
#include "gemm/gemm.h"

namespace nemo {

constexpr int GEMM_ROWS = 128;  // of a tile: 64 to each of two warpgroups
constexpr int GEMM_DEPTH = 128;  // of K in a stage, and between additions in fp32
constexpr int GEMM_CONSUMERS = 256;
constexpr int GEMM_THREADS = 128 + GEMM_CONSUMERS;
constexpr int GEMM_MAX_STAGES = 6;
constexpr int GEMM_HEADER_BYTES = 1024;
constexpr int GEMM_GROUP = 16;  // tiles of rows that share what they read of w in L2
constexpr int BOX_COLUMNS = 32;  // of bf16 that leave together: 64 bytes, swizzled

struct Gemm {
    GemmInputs in;
    int row_tiles, column_tiles, steps, stages;
};

struct GemmHeader {
    Mbarrier full[GEMM_MAX_STAGES], empty[GEMM_MAX_STAGES];
};

template <int COLUMNS>
struct GemmTile {
    static constexpr int STAGE_BYTES = (GEMM_ROWS + COLUMNS) * GEMM_DEPTH;
    static constexpr int OUT_BYTES = 64 * COLUMNS * 2;  // of each warpgroup
    static constexpr int STAGES = [] {
        int stages = (227 * 1024 - GEMM_HEADER_BYTES - 2 * OUT_BYTES) / STAGE_BYTES;
        return stages > GEMM_MAX_STAGES ? GEMM_MAX_STAGES : stages;
    }();
    static constexpr int SHARED_BYTES = GEMM_HEADER_BYTES + 2 * OUT_BYTES + STAGES * STAGE_BYTES;
};

struct TilePlace {
    int row, column;  // of tiles
};

// Tile `tile`: groups of GEMM_GROUP tiles of rows, within a group all rows of a column of tiles first.
__device__ __forceinline__ TilePlace place_tile(const Gemm& p, int tile) {
    int of_group = GEMM_GROUP * p.column_tiles, group = tile / of_group, first = group * GEMM_GROUP;
    int height = minimum(GEMM_GROUP, p.row_tiles - first), rest = tile - group * of_group;
    return {first + rest % height, rest / height};
}

// The ring's position: the next stage, and the parity of its phase.
struct GemmRing {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- load, by one thread

template <int COLUMNS>
__device__ __forceinline__ void gemm_produce(const Gemm& p, GemmHeader* header, unsigned char* ring, const TensorMap* x_map,
                                             const TensorMap* w_map) {
    using Tile = GemmTile<COLUMNS>;
    GemmRing at;
    bool has_waited = false;
    for (int tile = blockIdx.x; tile < p.row_tiles * p.column_tiles; tile += gridDim.x) {
        TilePlace place = place_tile(p, tile);
        for (int step = 0; step < p.steps; step++) {
            mbarrier_wait(&header->empty[at.stage], at.parity ^ 1);
            Mbarrier* full = &header->full[at.stage];
            unsigned char* stage = ring + at.stage * Tile::STAGE_BYTES;
            mbarrier_arrive_expect(full, Tile::STAGE_BYTES);
            tma_load_2d(stage + GEMM_ROWS * GEMM_DEPTH, w_map, full, step * GEMM_DEPTH, place.column * COLUMNS);
            if (!has_waited) {  // the first weights are asked for before
                wait_for_previous_kernel();
                has_waited = true;
            }
            tma_load_2d(stage, x_map, full, step * GEMM_DEPTH, place.row * GEMM_ROWS);
            at.advance(p.stages);
        }
    }
}

// ---- compute

// Rows and columns of what this thread holds: d[4 j + 2 h + i] is row(h), column(j) + i.
struct GemmPlace {
    int first_row, first_column;
    __device__ __forceinline__ int row(int h) const { return first_row + 8 * h; }
    __device__ __forceinline__ int column(int j) const { return first_column + 8 * j; }
};

template <int COLUMNS, bool IS_BLOCK>
__device__ __forceinline__ void gemm_multiply(float (&sum)[COLUMNS / 2], const Gemm& p, GemmHeader* header,
                                              unsigned char* ring, GemmRing& at, const GemmPlace& place, int group) {
    using Tile = GemmTile<COLUMNS>;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sum[i] = 0.0f;
    for (int step = 0; step < p.steps; step++) {
        float scale[2] = {1.0f, 1.0f};
        if constexpr (IS_BLOCK) {
            static_assert(COLUMNS == 128, "a tile has one block of columns");
            float w_scale = load(p.in.w_scales + place.first_column / 128 * p.in.w_scale_stride + step);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = minimum(place.row(h), p.in.rows - 1);
                scale[h] = multiply(w_scale, load(p.in.x_scales + row * p.in.x_scale_stride + step));
            }
        }
        const unsigned char* x = ring + at.stage * Tile::STAGE_BYTES + group * 64 * GEMM_DEPTH;
        const unsigned char* w = ring + at.stage * Tile::STAGE_BYTES + GEMM_ROWS * GEMM_DEPTH;
        float fresh[COLUMNS / 2];
        mbarrier_wait(&header->full[at.stage], at.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < GEMM_DEPTH; k += 32) {
            Wgmma<COLUMNS>::fp8(fresh, matrix_k_major(x + k), matrix_k_major(w + k), k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_registers(fresh);
        if (lane_index() == 0) mbarrier_arrive(&header->empty[at.stage]);
        at.advance(p.stages);
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) {
            sum[i] = IS_BLOCK ? multiply_add(fresh[i], scale[i % 4 / 2], sum[i]) : add(sum[i], fresh[i]);
        }
    }
}

// ---- store

// The sums times the scales of their rows and columns, in place.
template <int COLUMNS>
__device__ __forceinline__ void gemm_scale(float (&sum)[COLUMNS / 2], const Gemm& p, const GemmPlace& place) {
    float x_scale[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        x_scale[h] = load(p.in.x_scales + minimum(place.row(h), p.in.rows - 1) * p.in.x_scale_stride);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = minimum(place.column(j) + i, p.in.outputs - 1);
            float w_scale = load(p.in.w_scales + column * p.in.w_scale_stride);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float& value = sum[4 * j + 2 * h + i];
                value = multiply(multiply(value, x_scale[h]), w_scale);
            }
        }
    }
}

// 64 rows of bf16 to their boxes of 32 columns in shared memory, and out. `pairs`: [j][h], of columns j.
template <int GROUPS>
__device__ __forceinline__ void store_boxes(const uint32_t (&pairs)[GROUPS][2], unsigned char* out, const TensorMap* y_map,
                                            int first_column, int first_row, int barrier) {
    int lane = lane_index(), matrix = lane / 8, row = warp_index() % 4 * 16 + (matrix & 1) * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < GROUPS; j += 2) {
        int box = j / 4, chunk = j % 4 + (matrix >> 1);
        unsigned char* place = out + box * 64 * 64 + row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
        uint32_t r[4] = {pairs[j][0], pairs[j][1], pairs[j + 1][0], pairs[j + 1][1]};
        store_matrix_x4(place, r);
    }
    fence_async_proxy();
    named_barrier_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int box = 0; box < GROUPS / 4; box++) {
            tma_store_2d(y_map, out + box * 64 * 64, first_column + box * BOX_COLUMNS, first_row);
        }
        tma_store_commit();
    }
}

template <int COLUMNS>
__device__ __forceinline__ void gemm_store(const float (&sum)[COLUMNS / 2], const TilePlace& tile, unsigned char* out,
                                           const TensorMap* y_map, int group) {
    constexpr int GROUPS = COLUMNS / 8;
    uint32_t pairs[GROUPS][2];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) pairs[j][h] = pack_bf16(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
    }
    // The tile before has left these boxes.
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
    named_barrier_sync(1 + group, 128);
    store_boxes<GROUPS>(pairs, out, y_map, tile.column * COLUMNS, tile.row * GEMM_ROWS + group * 64, 1 + group);
}

template <int COLUMNS, bool IS_BLOCK>
__device__ __forceinline__ void gemm_consume(const Gemm& p, GemmHeader* header, unsigned char* ring, unsigned char* outs,
                                             const TensorMap* y_map) {
    int group = warp_index() / 4 - 1;
    wait_for_previous_kernel();
    GemmRing at;
    for (int tile = blockIdx.x; tile < p.row_tiles * p.column_tiles; tile += gridDim.x) {
        TilePlace place = place_tile(p, tile);
        GemmPlace mine{place.row * GEMM_ROWS + group * 64 + warp_index() % 4 * 16 + lane_index() / 4,
                       place.column * COLUMNS + lane_index() % 4 * 2};
        float sum[COLUMNS / 2];
        gemm_multiply<COLUMNS, IS_BLOCK>(sum, p, header, ring, at, mine, group);
        if constexpr (!IS_BLOCK) gemm_scale<COLUMNS>(sum, p, mine);
        gemm_store<COLUMNS>(sum, place, outs + group * GemmTile<COLUMNS>::OUT_BYTES, y_map, group);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
}

template <int COLUMNS, bool IS_BLOCK>
__global__ void __launch_bounds__(GEMM_THREADS, 1)
    gemm_kernel(const __grid_constant__ Gemm p, const __grid_constant__ TensorMap x_map,
                const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map) {
    unsigned char* shared = shared_memory<unsigned char>();
    auto* header = reinterpret_cast<GemmHeader*>(shared);
    unsigned char* outs = shared + GEMM_HEADER_BYTES;
    unsigned char* ring = outs + 2 * GemmTile<COLUMNS>::OUT_BYTES;
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            mbarrier_init(&header->full[i], 1);
            mbarrier_init(&header->empty[i], GEMM_CONSUMERS / 32);
        }
        mbarrier_init_fence();
    }
    block_sync();
    if (warp_index() < 4) {
        give_registers<40>();
        if (threadIdx.x == 0) gemm_produce<COLUMNS>(p, header, ring, &x_map, &w_map);
    } else {
        take_registers<232>();
        gemm_consume<COLUMNS, IS_BLOCK>(p, header, ring, outs, &y_map);
    }
}

}  // namespace nemo
