// The host side that linear layers of few tokens have in common: plan, checks, launch.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "linear/small.cuh"

namespace nemo {

struct SmallPlan {
    int tile_rows, cluster, shared_tokens, stages, made_steps, consumers, blocks, shared_bytes;
};

struct SmallTiles {
    int rows, cluster, places;
};

// Tiles of the height (a multiple of the swizzle's 8 rows) and clusters of the size that are done first: time is the
// rounds of tiles times the larger of a tile's bytes from memory and, at some 1.28 times the rate, its bytes and its
// share of x from L2, and as much as one row more for what a tile costs besides; and for a cluster's barriers as much
// as three rows. Of equals the smallest cluster, and of that the highest tile, which reads x least often.
inline SmallTiles choose_tiles(int outputs, int streamed_tokens) {
    SmallTiles best{};
    int64_t least = INT64_MAX;
    for (int cluster = 1; cluster <= (streamed_tokens > 0 ? MAX_CLUSTER : 1); cluster *= 2) {
        int places = cluster_places(cluster);
        if (places == 0) continue;  // of a GPU with fewer multiprocessors than a cluster has blocks
        int64_t of_cluster = INT64_MAX;
        SmallTiles tiles{};
        for (int rows = 8; rows <= MAX_TILE_ROWS; rows += 8) {
            int rounds = ceil_div(ceil_div(ceil_div(outputs, rows), cluster) * cluster, places);
            int from_l2 = 1000 * rows + 1000 * streamed_tokens / cluster;
            int64_t time = int64_t(rounds) * (std::max(1280 * rows, from_l2) + 1280) + (cluster > 1 ? 3 * 1280 : 0);
            if (time <= of_cluster) {
                of_cluster = time;
                tiles = {rows, cluster, places};
            }
        }
        if (of_cluster < least) {
            least = of_cluster;
            best = tiles;
        }
    }
    return best;
}

// 88 KiB of stages: three times what a multiprocessor's share of the memory's rate needs in flight for 1 us, and little
// enough that the next kernel's block fits beside it and asks for its weights. Three stages at least. An input that is
// made in the block is kept whole; or, where it can be and must, in equal parts of K.
inline SmallPlan plan_small_linear(int rows, int outputs, int chunks, bool is_streamed, bool has_parts) {
    constexpr int RING_BYTES = 88 * 1024;
    int tokens = ceil_div(rows, 16) * 16;
    SmallTiles tiles = choose_tiles(outputs, is_streamed ? rows : 0);
    SmallPlan plan;
    plan.tile_rows = tiles.rows;
    plan.cluster = tiles.cluster;
    plan.shared_tokens = ceil_div(tokens, FUSED_TOKENS * tiles.cluster) * FUSED_TOKENS;  // groups of the swizzle's rows
    int bytes = STAGE_CHUNKS * CHUNK_BYTES * (plan.tile_rows + (is_streamed ? tokens : 0));
    plan.stages = std::min(std::max(RING_BYTES / bytes, 3), MAX_STAGES);
    plan.consumers = ceil_div(plan.tile_rows, GROUP_ROWS) * 128;
    plan.blocks = std::min(ceil_div(ceil_div(outputs, plan.tile_rows), plan.cluster) * plan.cluster, tiles.places);
    plan.made_steps = is_streamed ? 0 : ceil_div(chunks, STAGE_CHUNKS);
    plan.shared_bytes = HEADER_BYTES + plan.stages * bytes + OVERREAD_BYTES;
    if (is_streamed) return plan;
    int beyond = tokens / FUSED_TOKENS - 1;  // chunks that columns without a token read
    int most = ((MAX_SHARED_BYTES - plan.shared_bytes) / X_CHUNK_BYTES - beyond) / STAGE_CHUNKS;
    if (has_parts) plan.made_steps = ceil_div(plan.made_steps, ceil_div(plan.made_steps, most));
    plan.shared_bytes += (plan.made_steps * STAGE_CHUNKS + beyond) * X_CHUNK_BYTES;
    return plan;
}

template <class W>
TensorMap chunk_map(const void* base, int rows, int width, int64_t stride, int box_rows) {
    return make_tensor_map(base, {.element = sizeof(W) == 1 ? Element::U8 : Element::BF16,
                                  .rank = 2,
                                  .sizes = {width, rows, 1},
                                  .strides = {0, stride * int64_t(sizeof(W)), 0},
                                  .box = {CHUNK_BYTES / int(sizeof(W)), box_rows, 1},
                                  .swizzle = Swizzle::B128});
}

// Whether the rows of x come from global memory, through the ring.
inline bool is_streamed(const LinearInputs& in) { return in.input == Input::READY || in.made != nullptr; }

template <class W>
void check_small_linear(const bf16* y, const LinearInputs& in, const W* weight, int outputs, int64_t weight_stride) {
    constexpr int ALIGNED = 16 / sizeof(W);
    int input = int(in.input);
    CHECK_RANGE(input, int(Input::READY), int(Input::QUANTIZE));
    CHECK_RANGE(in.rows, 1, is_streamed(in) ? 64 : FUSED_TOKENS);
    CHECK_RANGE(outputs, 1, 1 << 30);
    CHECK_RANGE(in.width, 1, 1 << 24);
    CHECK_MULTIPLE(in.width, ALIGNED);
    CHECK_POINTER(in.x);
    CHECK_POINTER(weight);
    CHECK_ALIGNED(y, 2);
    CHECK_STRIDE(weight_stride, ALIGNED);
    CHECK_STRIDE(in.x_stride, in.input == Input::READY ? ALIGNED : VECTOR);
    CHECK_OPTIONAL(in.fixed_scale, 4);
    CHECK(in.eps >= 0, "eps must not be negative, got ", in.eps);
    if (in.input == Input::NORM) CHECK_POINTER(in.norm);
    if (in.residual != nullptr) {
        CHECK_POINTER(in.residual);
        CHECK_POINTER(in.sum);
        CHECK_STRIDE(in.residual_stride, VECTOR);
    }
    if (in.made != nullptr) {
        CHECK(in.input != Input::READY, "made must be null for an input that is there, got ", in.made);
        CHECK_POINTER(in.made);
        CHECK_ALIGNED(in.counts, 4);
        CHECK_MULTIPLE(in.width, VECTOR);
        if (sizeof(W) == 1) CHECK_ALIGNED(in.made_scales, 4);
    }
}

template <class W, int TOKENS, bool IS_BLOCK, Input INPUT>
void launch_small_linear(bf16* y, const LinearInputs& in, const W* weight, int outputs, int64_t weight_stride,
                         const LinearScales& scales, Stream stream) {
    constexpr bool IS_STREAMED = INPUT == Input::READY;
    int chunks = ceil_div(in.width, CHUNK_BYTES / int(sizeof(W)));
    SmallPlan plan = plan_small_linear(in.rows, outputs, chunks, IS_STREAMED, can_make_parts<W, INPUT>());
    SmallLinear p{.y = y,
                  .rows = in.rows,
                  .outputs = outputs,
                  .chunks = chunks,
                  .tile_rows = plan.tile_rows,
                  .stages = plan.stages,
                  .cluster = plan.cluster,
                  .shared_tokens = plan.shared_tokens,
                  .made_steps = plan.made_steps,
                  .scales = scales,
                  .input = {.x = static_cast<const bf16*>(in.x),
                            .residual = in.residual,
                            .norm = in.norm,
                            .sum = in.sum,
                            .fixed_scale = in.fixed_scale,
                            .eps = in.eps,
                            .rows = in.rows,
                            .width = in.width,
                            .x_stride = in.x_stride,
                            .residual_stride = in.residual_stride},
                  .shared = {.x = in.made, .scales = in.made_scales, .counts = in.counts, .input = in.input}};
    const void* x = in.x;
    int64_t x_stride = in.x_stride;
    if (in.made != nullptr) {
        x = in.made;
        x_stride = in.width;
        p.scales.x = in.made_scales;
        p.scales.x_stride = 1;
    }
    TensorMap w_map = chunk_map<W>(weight, outputs, in.width, weight_stride, plan.tile_rows);
    TensorMap x_map = IS_STREAMED ? chunk_map<W>(x, in.rows, in.width, x_stride, plan.shared_tokens) : w_map;
    launch({.name = "small_linear",
            .grid = dim3(unsigned(plan.blocks)),
            .threads = plan.consumers + PRODUCER_THREADS,
            .shared_bytes = plan.shared_bytes,
            .stream = stream,
            .cluster = plan.cluster},
           small_linear_kernel<W, TOKENS, IS_BLOCK, INPUT>, p, w_map, x_map);
}

// launch_for(std::integral_constant<int, tokens>{}): columns of the product, for `rows` tokens.
template <class LaunchFor>
void with_tokens(int rows, LaunchFor&& launch_for) {
    switch (ceil_div(rows, 16)) {
        case 1: return launch_for(std::integral_constant<int, 16>{});
        case 2: return launch_for(std::integral_constant<int, 32>{});
        case 3: return launch_for(std::integral_constant<int, 48>{});
        default: return launch_for(std::integral_constant<int, 64>{});
    }
}

}  // namespace nemo
