// Launches of FP8 matrix products.
#include "gemm/gemm.cuh"

#include <algorithm>
#include <type_traits>

#include "common/launch.h"

namespace nemo {

namespace {

// Parts of 64 rows of each warpgroup and columns of a tile, and blocks that share x.
struct GemmShape {
    int parts, columns, cluster;
};
constexpr int GEMM_COLUMNS[] = {32, 40, 48, 64, 112, 128};

// The shape whose rounds of tiles take the least time. A step of a tile takes as long as the longest of: its products, which
// read shared memory for longer than they multiply where columns are few; what it asks of L2, 127 times as much a row as a
// product a pair of row and column (5.5 TB/s, 1400 TFLOP/s); its weights from memory, at 4.3 TB/s. The tile's start, some 300
// cycles, and its end, 750 for 64 rows of 128 columns, are spread over 40 steps; a cluster's barriers take somewhat.
GemmShape choose_shape(int rows, int outputs, bool is_block) {
    int clusters_at_once[MAX_CLUSTER + 1];
    for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2) clusters_at_once[cluster] = cluster_places(cluster) / cluster;
    GemmShape best{};
    int64_t least = INT64_MAX;
    for (int parts : {2, 1}) {
        for (int columns : GEMM_COLUMNS) {
            if (is_block && columns != 128) continue;
            for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2) {
                int at_once = clusters_at_once[cluster], height = 128 * parts, row_tiles = ceil_div(rows, height);
                if (at_once == 0) continue;  // of a GPU with fewer multiprocessors than a cluster has blocks
                int64_t clusters = int64_t(row_tiles) * ceil_div(ceil_div(outputs, columns), cluster);
                int products = height * std::max(columns, 32 + columns / 2);
                int step = std::max({products, 127 * (height / cluster + columns), 163 * columns / row_tiles});
                int64_t time = ceil_div(clusters, int64_t(at_once)) * (step + 256 + 5 * parts * columns) + (cluster > 1 ? 512 : 0);
                if (time < least) {
                    least = time;
                    best = {parts, columns, cluster};
                }
            }
        }
    }
    return best;
}

TensorMap operand_map(const fp8* base, int rows, int width, int64_t stride, int box_rows) {
    return make_tensor_map(base, {.element = Element::U8,
                                  .rank = 2,
                                  .sizes = {width, rows, 1},
                                  .strides = {0, stride, 0},
                                  .box = {GEMM_DEPTH, box_rows, 1},
                                  .swizzle = Swizzle::B128});
}

template <int PARTS, int COLUMNS, bool IS_BLOCK>
void launch_gemm(const GemmInputs& in, int cluster, Stream stream) {
    using Tile = GemmTile<PARTS, COLUMNS>;
    static_assert(Tile::STAGES >= 3);
    Gemm p{.in = in,
           .row_tiles = ceil_div(in.rows, Tile::ROWS),
           .column_tiles = ceil_div(ceil_div(in.outputs, COLUMNS), cluster),
           .steps = ceil_div(in.width, GEMM_DEPTH),
           .stages = Tile::STAGES,
           .cluster = cluster};
    TensorMap x_map = operand_map(in.x, in.rows, in.width, in.x_stride, Tile::ROWS / cluster);
    TensorMap w_map = operand_map(in.w, in.outputs, in.width, in.w_stride, COLUMNS);
    TensorMap y_map = make_tensor_map(in.y, {.element = Element::BF16,
                                             .rank = 2,
                                             .sizes = {in.outputs, in.rows, 1},
                                             .strides = {0, int64_t(in.outputs) * 2, 0},
                                             .box = {Tile::BOX_COLUMNS, 64, 1},
                                             .swizzle = Tile::BOX_SWIZZLE});
    int blocks = std::min(p.row_tiles * p.column_tiles, cluster_places(cluster) / cluster) * cluster;
    launch({.name = "gemm_fp8",
            .grid = dim3(unsigned(blocks)),
            .threads = GEMM_THREADS,
            .shared_bytes = Tile::SHARED_BYTES,
            .stream = stream,
            .cluster = cluster},
           gemm_kernel<PARTS, COLUMNS, IS_BLOCK>, p, x_map, w_map, y_map);
}

}  // namespace

void gemm_fp8(const GemmInputs& in, Stream stream) {
    if (in.rows == 0) return;
    CHECK_RANGE(in.rows, 1, 1 << 24);
    CHECK_RANGE(in.outputs, 8, 1 << 24);
    CHECK_RANGE(in.width, 16, 1 << 24);
    CHECK_MULTIPLE(in.width, 16);
    CHECK_MULTIPLE(in.outputs, 8);
    CHECK(int64_t(ceil_div(in.rows, 128)) * ceil_div(in.outputs, GEMM_COLUMNS[0]) <= 0x7FFFFFFF,
          "rows and outputs make more tiles than an int holds: ", in.rows, " and ", in.outputs);
    CHECK_STRIDE(in.x_stride, 16);
    CHECK_STRIDE(in.w_stride, 16);
    CHECK_STRIDE(in.x_scale_stride, 1);
    CHECK_STRIDE(in.w_scale_stride, 1);
    CHECK_POINTER(in.y);
    CHECK_POINTER(in.x);
    CHECK_POINTER(in.w);
    CHECK_ALIGNED(in.x_scales, 4);
    CHECK_ALIGNED(in.w_scales, 4);
    GemmShape shape = choose_shape(in.rows, in.outputs, in.is_block);
    auto with_columns = [&](auto parts) {
        if (in.is_block) return launch_gemm<parts(), 128, true>(in, shape.cluster, stream);
        switch (shape.columns) {
            case 32: return launch_gemm<parts(), 32, false>(in, shape.cluster, stream);
            case 40: return launch_gemm<parts(), 40, false>(in, shape.cluster, stream);
            case 48: return launch_gemm<parts(), 48, false>(in, shape.cluster, stream);
            case 64: return launch_gemm<parts(), 64, false>(in, shape.cluster, stream);
            case 112: return launch_gemm<parts(), 112, false>(in, shape.cluster, stream);
            default: return launch_gemm<parts(), 128, false>(in, shape.cluster, stream);
        }
    };
    if (shape.parts == 2) return with_columns(std::integral_constant<int, 2>{});
    with_columns(std::integral_constant<int, 1>{});
}

}  // namespace nemo
