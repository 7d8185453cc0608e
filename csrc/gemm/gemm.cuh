// y = x w^T in FP8: a persistent grid, a warpgroup that fetches tiles with the copy engine, two that multiply them.
//
// A tile is 128 or 256 rows of x by `COLUMNS` of w; each of the two takes half of the rows, 64 after 64. The second is
// some steps behind the first, so that one multiplies while the other ends its tile. The blocks of a cluster do tiles
// beside one another and share x: each fetches a part of its rows and multicasts it to all, and a stage is filled again
// when the warps of all blocks have let go of it. With 256 x 128 in clusters of two a block asks L2 for 32 KiB a step.
//
// The tensor cores add FP8 products in few bits, so each 128 of K is summed in accumulators of its own, which are then
// added in fp32, where scales of blocks are applied as well. Other scales are applied once, to the sum.
//
// A gated tile is half gates and half the up projections that belong to them, fetched as one box: a thread has both,
// and stores their activation. A residual comes through the ring, 64 rows of each warpgroup a stage, behind the tile's
// steps: it is there when the products end.
#pragma once

#include "activation/silu_mul.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "gemm/gemm.h"

namespace nemo {

constexpr int GEMM_DEPTH = 128;  // of K in a stage, and between additions in fp32
constexpr int GEMM_CONSUMERS = 256;
constexpr int GEMM_THREADS = 128 + GEMM_CONSUMERS;
constexpr int GEMM_MAX_STAGES = 6;
constexpr int GEMM_HEADER_BYTES = 3072;
constexpr int GEMM_LEAD = 2;  // steps that the first warpgroup is ahead
constexpr int GEMM_BARRIER_LEAD = 3;  // named; 1 and 2 are among the threads of a warpgroup
constexpr int GEMM_GROUP = 2048;  // rows whose tiles share what they read of w in L2

enum class GemmKind { PLAIN, BLOCK, GATED };

struct Gemm {
    GemmInputs in;
    int row_tiles, column_tiles;  // those of a cluster, side by side, count as one
    int steps, added_steps, stages, cluster;  // added: those of the residual
};

struct GemmHeader {
    Mbarrier full[GEMM_MAX_STAGES], empty[GEMM_MAX_STAGES];
    float x_scales[2][128], w_scales[2][128];  // of each warpgroup's rows and columns
};

// PARTS: of 64 rows, of each warpgroup. COLUMNS: of the product; OUT_COLUMNS: of y.
template <int PARTS, int COLUMNS, GemmKind KIND>
struct GemmTile {
    static constexpr int ROWS = 2 * 64 * PARTS;
    static constexpr int OUT_COLUMNS = KIND == GemmKind::GATED ? COLUMNS / 2 : COLUMNS;
    static constexpr int STAGE_BYTES = (ROWS + COLUMNS) * GEMM_DEPTH;
    // Columns of bf16 that leave together: as many as a swizzled box can have of these.
    static constexpr int BOX_COLUMNS = OUT_COLUMNS % 32 == 0 ? 32 : OUT_COLUMNS % 16 == 0 ? 16 : 8;
    static constexpr Swizzle BOX_SWIZZLE =
        BOX_COLUMNS == 32 ? Swizzle::B64 : BOX_COLUMNS == 16 ? Swizzle::B32 : Swizzle::NONE;
    static constexpr int BOX_BYTES = 64 * BOX_COLUMNS * 2, BOXES = OUT_COLUMNS / BOX_COLUMNS;
    static constexpr int OUT_BYTES = 64 * OUT_COLUMNS * 2;  // of each warpgroup
    static_assert(2 * OUT_BYTES <= STAGE_BYTES, "a stage holds the residual of 64 rows of each warpgroup");
    static constexpr int STAGES = [] {
        int stages = (227 * 1024 - GEMM_HEADER_BYTES - 2 * OUT_BYTES) / STAGE_BYTES;
        return stages > GEMM_MAX_STAGES ? GEMM_MAX_STAGES : stages;
    }();
    static constexpr int SHARED_BYTES = GEMM_HEADER_BYTES + 2 * OUT_BYTES + STAGES * STAGE_BYTES;
};

struct TilePlace {
    int row, column;  // of tiles
};

// Tile `tile` of the clusters: groups of GEMM_GROUP rows, within a group all rows of a column of tiles first.
template <int ROWS>
__device__ __forceinline__ TilePlace place_tile(const Gemm& p, int tile, int rank) {
    constexpr int GROUP = GEMM_GROUP / ROWS;
    int of_group = GROUP * p.column_tiles, group = tile / of_group, first = group * GROUP;
    int height = minimum(GROUP, p.row_tiles - first), rest = tile - group * of_group;
    return {first + rest % height, rest / height * p.cluster + rank};
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

// The tiles of this block's cluster.
struct GemmTiles {
    int next, step, end, rank;
    __device__ __forceinline__ explicit GemmTiles(const Gemm& p)
        : next(blockIdx.x / unsigned(p.cluster)),
          step(gridDim.x / unsigned(p.cluster)),
          end(p.row_tiles * p.column_tiles),
          rank(p.cluster == 1 ? 0 : cluster_rank()) {}
};

// ---- load, by one thread

// The steps of all tiles of a block, one after the other: a tile is looked for once.
template <int ROWS>
struct GemmWalk {
    const Gemm& p;
    GemmTiles tiles;
    TilePlace place;
    int step = 0;
    __device__ __forceinline__ explicit GemmWalk(const Gemm& p)
        : p(p), tiles(p), place(place_tile<ROWS>(p, tiles.next, tiles.rank)) {}
    __device__ __forceinline__ void advance() {
        if (++step < p.steps + p.added_steps) return;
        step = 0;
        tiles.next += tiles.step;
        place = place_tile<ROWS>(p, tiles.next, tiles.rank);
    }
};

// The first round of the ring asks for weights alone, waits, and then for x.
template <int PARTS, int COLUMNS, GemmKind KIND>
__device__ __forceinline__ void gemm_produce(const Gemm& p, GemmHeader* header, unsigned char* ring,
                                             const TensorMap* x_map, const TensorMap* w_map,
                                             const TensorMap* residual_map) {
    using Tile = GemmTile<PARTS, COLUMNS, KIND>;
    using Walk = GemmWalk<Tile::ROWS>;
    Walk walk(p), of_x(p);
    int total = ceil_div(walk.tiles.end - walk.tiles.next, walk.tiles.step) * (p.steps + p.added_steps);
    int first = minimum(total, p.stages);
    int first_row = walk.tiles.rank * (Tile::ROWS / p.cluster);
    auto load_w = [&](const Walk& at, int stage) {
        if (at.step >= p.steps) return;
        mbarrier_arrive_expect(&header->full[stage], Tile::STAGE_BYTES);
        unsigned char* to = ring + stage * Tile::STAGE_BYTES + Tile::ROWS * GEMM_DEPTH;
        int k = at.step * GEMM_DEPTH, first = at.place.column * Tile::OUT_COLUMNS;
        if constexpr (KIND == GemmKind::GATED) {
            tma_load_3d(to, w_map, &header->full[stage], k, first, 0);
        } else {
            tma_load_2d(to, w_map, &header->full[stage], k, first);
        }
    };
    auto load_residual = [&](const Walk& at, int stage) {
        mbarrier_arrive_expect(&header->full[stage], 2 * Tile::OUT_BYTES);
        for (int box = 0; box < 2 * Tile::BOXES; box++) {
            int row = at.place.row * Tile::ROWS + (box / Tile::BOXES * PARTS + at.step - p.steps) * 64;
            int column = at.place.column * Tile::OUT_COLUMNS + box % Tile::BOXES * Tile::BOX_COLUMNS;
            unsigned char* to = ring + stage * Tile::STAGE_BYTES + box * Tile::BOX_BYTES;
            tma_load_2d(to, residual_map, &header->full[stage], column, row);
        }
    };
    auto load_x = [&](const Walk& at, int stage) {
        if (KIND != GemmKind::GATED && at.step >= p.steps) return load_residual(at, stage);
        unsigned char* to = ring + stage * Tile::STAGE_BYTES + first_row * GEMM_DEPTH;
        int k = at.step * GEMM_DEPTH, row = at.place.row * Tile::ROWS + first_row;
        if (p.cluster == 1) {
            tma_load_2d(to, x_map, &header->full[stage], k, row);
        } else {
            tma_load_2d_multicast(to, x_map, &header->full[stage], k, row, uint16_t((1 << p.cluster) - 1));
        }
    };
    for (int i = 0; i < first; i++, walk.advance()) load_w(walk, i);
    if (p.cluster > 1) cluster_wait();  // the others' barriers are there
    wait_for_previous_kernel();
    for (int i = 0; i < first; i++, of_x.advance()) load_x(of_x, i);
    GemmRing at;
    for (int i = first; i < total; i++, walk.advance()) {
        mbarrier_wait(&header->empty[at.stage], at.parity);
        load_w(walk, at.stage);
        load_x(walk, at.stage);
        at.advance(p.stages);
    }
}

// ---- compute

// Rows and columns of what this thread holds: d[4 j + 2 h + i] of part r is row(r, h), column(j) + i.
struct GemmPlace {
    int first_row, first_column;
    __device__ __forceinline__ int row(int part, int h) const { return first_row + 64 * part + 8 * h; }
    __device__ __forceinline__ int column(int j) const { return first_column + 8 * j; }
};

// Lane i lets go of what block i of the cluster has sent.
__device__ __forceinline__ void gemm_release(const Gemm& p, Mbarrier* empty) {
    if (p.cluster > 1) {
        if (lane_index() < p.cluster) mbarrier_arrive_at(empty, lane_index());
    } else if (lane_index() == 0) {
        mbarrier_arrive(empty);
    }
}

template <int PARTS, int COLUMNS, GemmKind KIND>
__device__ __forceinline__ void gemm_multiply(float (&sum)[PARTS][COLUMNS / 2], const Gemm& p, GemmHeader* header,
                                              unsigned char* ring, GemmRing& at, const GemmPlace& place, int group,
                                              int lead_step) {
    using Tile = GemmTile<PARTS, COLUMNS, KIND>;
    constexpr bool IS_BLOCK = KIND == GemmKind::BLOCK;
#pragma unroll
    for (int i = 0; i < PARTS * COLUMNS / 2; i++) sum[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0.0f;
    for (int step = 0; step < p.steps; step++) {
        float scale[PARTS][2];
        if constexpr (IS_BLOCK) {
            static_assert(COLUMNS == 128, "a tile has one block of columns");
            int64_t blocks = minimum(place.first_column, p.in.outputs - 1) / 128;
            float w_scale = load(p.in.w_scales + blocks * p.in.w_scale_stride + step);
#pragma unroll
            for (int i = 0; i < 2 * PARTS; i++) {
                int row = minimum(place.row(i / 2, i % 2), p.in.rows - 1);
                scale[i / 2][i % 2] = multiply(w_scale, load(p.in.x_scales + row * p.in.x_scale_stride + step));
            }
        }
        const unsigned char* x = ring + at.stage * Tile::STAGE_BYTES + group * PARTS * 64 * GEMM_DEPTH;
        const unsigned char* w = ring + at.stage * Tile::STAGE_BYTES + Tile::ROWS * GEMM_DEPTH;
        mbarrier_wait(&header->full[at.stage], at.parity);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float fresh[COLUMNS / 2];
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < GEMM_DEPTH; k += 32) {
                auto rows = matrix_k_major(x + part * 64 * GEMM_DEPTH + k);
                Wgmma<COLUMNS>::fp8(fresh, rows, matrix_k_major(w + k), k > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            keep_in_registers(fresh);
            if (part == PARTS - 1) gemm_release(p, &header->empty[at.stage]);
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) {
                float& to = sum[part][i];
                to = IS_BLOCK ? multiply_add(fresh[i], scale[part][i % 4 / 2], to) : add(to, fresh[i]);
            }
        }
        at.advance(p.stages);
        if (step == lead_step) named_barrier_arrive(GEMM_BARRIER_LEAD, GEMM_CONSUMERS);
    }
}

// ---- store

// Scales of this thread's row and column of the warpgroup's, asked for before the products and needed after them.
struct GemmScales {
    float x, w;
};

template <int PARTS, int COLUMNS, GemmKind KIND>
__device__ __forceinline__ GemmScales gemm_ask_scales(const Gemm& p, const TilePlace& tile, int group) {
    using Tile = GemmTile<PARTS, COLUMNS, KIND>;
    int thread = threadIdx.x % 128, of_tile = minimum(thread, COLUMNS - 1);
    int row = tile.row * Tile::ROWS + (group * PARTS * 64) + thread % (PARTS * 64);
    int column = tile.column * Tile::OUT_COLUMNS + of_tile;
    if (KIND == GemmKind::GATED && of_tile >= Tile::OUT_COLUMNS) column += p.in.outputs / 2 - Tile::OUT_COLUMNS;
    return {load(p.in.x_scales + minimum(row, p.in.rows - 1) * p.in.x_scale_stride),
            load(p.in.w_scales + minimum(column, p.in.outputs - 1) * p.in.w_scale_stride)};
}

// The sums times the scales of their rows and columns, in place.
template <int PARTS, int COLUMNS>
__device__ __forceinline__ void gemm_scale(
    float (&sum)[PARTS][COLUMNS / 2], GemmHeader* header, const GemmScales& scales, int group) {
    float *x_scales = header->x_scales[group], *w_scales = header->w_scales[group];
    int thread = threadIdx.x % 128, row = warp_index() % 4 * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    x_scales[thread] = scales.x;
    w_scales[thread] = scales.w;
    named_barrier_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
        auto w_scale = *reinterpret_cast<const Vec<float, 2>*>(w_scales + column + 8 * j);
#pragma unroll
        for (int i = 0; i < 4 * PARTS; i++) {
            float& value = sum[i / 4][4 * j + i % 4];
            value = multiply(multiply(value, x_scales[i / 4 * 64 + row + i % 4 / 2 * 8]), w_scale[i % 2]);
        }
    }
}

// silu(gate) * up of the values in bf16, in the place of the gates.
template <int COLUMNS>
__device__ __forceinline__ void gemm_activate(float (&sum)[COLUMNS / 2]) {
    static_assert(COLUMNS % 16 == 0, "a thread has the up projections of its gates");
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; i++) {
        float gate = rounded<bf16>(sum[i]), up = rounded<bf16>(sum[COLUMNS / 4 + i]);
        sum[i] = multiply(rounded<bf16>(silu(gate)), up);
    }
}

// The sums of two pairs of bf16.
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    constexpr uint32_t HIGH = 0xffff0000;
    float low = add(float_of_bits(a << 16), float_of_bits(b << 16));
    return pack_bf16(low, add(float_of_bits(a & HIGH), float_of_bits(b & HIGH)));
}

// 64 rows of bf16 to their boxes in shared memory, and out; with `residual`, boxes as these, added if there is one.
template <class Tile, int COUNT>
__device__ __forceinline__ void gemm_store(const float (&sum)[COUNT], unsigned char* out, const unsigned char* residual,
                                           const TensorMap* y_map, int first_column, int first_row, int barrier) {
    constexpr int COLUMNS = Tile::OUT_COLUMNS;
    constexpr int CHUNKS = Tile::BOX_COLUMNS / 8;  // of 16 bytes, of a row of a box
    // What was in these boxes before has left.
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
    named_barrier_sync(barrier, 128);
    int lane = lane_index(), matrix = lane / 8, row = warp_index() % 4 * 16 + (matrix & 1) * 8 + lane % 8;
    auto place = [&](int j) {  // of the chunk of columns 8 j .. 8 j + 7
        int swizzle = CHUNKS == 4 ? (row >> 1) & 3 : CHUNKS == 2 ? (row >> 2) & 1 : 0;
        return j / CHUNKS * Tile::BOX_BYTES + row * CHUNKS * 16 + ((j % CHUNKS ^ swizzle) << 4);
    };
    auto pair = [&](int j, int h) { return pack_bf16(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]); };
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
        // An odd last group is written twice, alike.
        int second = j + 1 < COLUMNS / 8 ? j + 1 : j;
        uint32_t r[4] = {pair(j, 0), pair(j, 1), pair(second, 0), pair(second, 1)};
        int at = place(matrix >> 1 ? second : j);
        if (residual != nullptr) {
            uint32_t added[4];
            load_matrix_x4(added, residual + at);
#pragma unroll
            for (int i = 0; i < 4; i++) r[i] = add_pairs(r[i], added[i]);
        }
        store_matrix_x4(out + at, r);
    }
    fence_async_proxy();
    named_barrier_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int box = 0; box < Tile::BOXES; box++) {
            tma_store_2d(y_map, out + box * Tile::BOX_BYTES, first_column + box * Tile::BOX_COLUMNS, first_row);
        }
        tma_store_commit();
    }
}

template <int PARTS, int COLUMNS, GemmKind KIND>
__device__ __forceinline__ void gemm_consume(const Gemm& p, GemmHeader* header, unsigned char* ring,
                                             unsigned char* outs, const TensorMap* y_map) {
    using Tile = GemmTile<PARTS, COLUMNS, KIND>;
    constexpr bool IS_BLOCK = KIND == GemmKind::BLOCK;
    int group = warp_index() / 4 - 1;
    if (p.cluster > 1) cluster_wait();
    wait_for_previous_kernel();
    GemmRing at;
    GemmTiles tiles(p);
    bool has_lead = tiles.next + tiles.step < tiles.end;  // one tile alone would only end later
    int lead_step = has_lead && group == 0 ? minimum(GEMM_LEAD, p.steps) - 1 : -1;
    if (has_lead && group == 1) named_barrier_sync(GEMM_BARRIER_LEAD, GEMM_CONSUMERS);
    for (int tile = tiles.next; tile < tiles.end; tile += tiles.step) {
        TilePlace place = place_tile<Tile::ROWS>(p, tile, tiles.rank);
        int first_row = place.row * Tile::ROWS + group * PARTS * 64;
        GemmPlace mine{first_row + warp_index() % 4 * 16 + lane_index() / 4,
                       place.column * COLUMNS + lane_index() % 4 * 2};
        float sum[PARTS][COLUMNS / 2];
        GemmScales scales{};
        if constexpr (!IS_BLOCK) scales = gemm_ask_scales<PARTS, COLUMNS, KIND>(p, place, group);
        gemm_multiply<PARTS, COLUMNS, KIND>(sum, p, header, ring, at, mine, group, lead_step);
        lead_step = -1;
        if constexpr (!IS_BLOCK) gemm_scale<PARTS, COLUMNS>(sum, header, scales, group);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if constexpr (KIND == GemmKind::GATED) gemm_activate<COLUMNS>(sum[part]);
            const unsigned char* residual = nullptr;
            if (KIND != GemmKind::GATED && p.added_steps > 0) {
                residual = ring + at.stage * Tile::STAGE_BYTES + group * Tile::OUT_BYTES;
                mbarrier_wait(&header->full[at.stage], at.parity);  // the residual's
            }
            gemm_store<Tile>(sum[part], outs + group * Tile::OUT_BYTES, residual, y_map,
                             place.column * Tile::OUT_COLUMNS, first_row + 64 * part, 1 + group);
            if (residual != nullptr) {  // which all have read, by a barrier of gemm_store
                gemm_release(p, &header->empty[at.stage]);
                at.advance(p.stages);
            }
        }
    }
    if (threadIdx.x % 128 == 0) tma_store_wait<0>();
}

template <int PARTS, int COLUMNS, GemmKind KIND>
__global__ void __launch_bounds__(GEMM_THREADS, 1)
    gemm_kernel(const __grid_constant__ Gemm p, const __grid_constant__ TensorMap x_map,
                const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map,
                const __grid_constant__ TensorMap residual_map) {
    unsigned char* shared = shared_memory<unsigned char>();
    auto* header = reinterpret_cast<GemmHeader*>(shared);
    unsigned char* outs = shared + GEMM_HEADER_BYTES;
    unsigned char* ring = outs + 2 * GemmTile<PARTS, COLUMNS, KIND>::OUT_BYTES;
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            mbarrier_init(&header->full[i], 1);
            mbarrier_init(&header->empty[i], p.cluster * GEMM_CONSUMERS / 32);
        }
        mbarrier_init_fence();
    }
    block_sync();
    if (p.cluster > 1) cluster_arrive_relaxed();  // and wait where the other blocks are needed first
    if (warp_index() < 4) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            gemm_produce<PARTS, COLUMNS, KIND>(p, header, ring, &x_map, &w_map, &residual_map);
        } else if (p.cluster > 1) {
            cluster_wait();
        }
    } else {
        take_registers<232>();
        gemm_consume<PARTS, COLUMNS, KIND>(p, header, ring, outs, &y_map);
    }
    if (p.cluster > 1) {  // the other blocks arrive at this one's barriers until they are here
        cluster_arrive();
        cluster_wait();
    }
}

}  // namespace nemo
