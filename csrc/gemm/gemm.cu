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

// The shape whose rounds of tiles take the least time. A step of a tile takes as long as the longest of: its products,
// which read shared memory for longer than they multiply where columns are few; what it asks of L2, 127 times as much a
// row as a product a pair of row and column (5.5 TB/s, 1400 TFLOP/s); its weights from memory, at 4.3 TB/s. The tile's
// start, some 300 cycles, and its end, 750 for 64 rows of 128 columns, are spread over 40 steps; a cluster's barriers
// take somewhat.
GemmShape choose_shape(int rows, int outputs, GemmKind kind) {
    int clusters_at_once[MAX_CLUSTER + 1];
    for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2)
        clusters_at_once[cluster] = cluster_places(cluster) / cluster;
    GemmShape best{};
    int64_t least = INT64_MAX;
    for (int parts : {2, 1}) {
        for (int columns : GEMM_COLUMNS) {
            if (kind == GemmKind::BLOCK && columns != 128) continue;
            if (kind == GemmKind::GATED && columns % 16) continue;
            for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2) {
                int at_once = clusters_at_once[cluster], height = 128 * parts, row_tiles = ceil_div(rows, height);
                if (at_once == 0) continue;  // of a GPU with fewer multiprocessors than a cluster has blocks
                int64_t clusters = int64_t(row_tiles) * ceil_div(ceil_div(outputs, columns), cluster);
                int products = height * std::max(columns, 32 + columns / 2);
                int step = std::max({products, 127 * (height / cluster + columns), 163 * columns / row_tiles});
                int64_t time = ceil_div(clusters, int64_t(at_once)) * (step + 256 + 5 * parts * columns) +
                               (cluster > 1 ? 512 : 0);
                if (time < least) {
                    least = time;
                    best = {parts, columns, cluster};
                }
            }
        }
    }
    return best;
}

TensorMapSpec operand_map(int rows, int width, int64_t stride, int box_rows) {
    return {.element = Element::U8,
            .rank = 2,
            .sizes = {width, rows, 1},
            .strides = {0, stride, 0},
            .box = {GEMM_DEPTH, box_rows, 1},
            .swizzle = Swizzle::B128};
}

template <int PARTS, int COLUMNS, GemmKind KIND>
void launch_gemm(const GemmInputs& in, int cluster, Stream stream) {
    using Tile = GemmTile<PARTS, COLUMNS, KIND>;
    static_assert(Tile::STAGES >= 3);
    int columns = KIND == GemmKind::GATED ? in.outputs / 2 : in.outputs;  // of y
    Gemm p{.in = in,
           .row_tiles = ceil_div(in.rows, Tile::ROWS),
           .column_tiles = ceil_div(ceil_div(columns, Tile::OUT_COLUMNS), cluster),
           .steps = ceil_div(in.width, GEMM_DEPTH),
           .added_steps = in.residual == nullptr ? 0 : PARTS,
           .stages = Tile::STAGES,
           .cluster = cluster};
    TensorMap x_map = make_tensor_map(in.x, operand_map(in.rows, in.width, in.x_stride, Tile::ROWS / cluster));
    TensorMapSpec w = operand_map(columns, in.width, in.w_stride, Tile::OUT_COLUMNS);
    if (KIND == GemmKind::GATED) {  // gates, and in a third dimension the up projections
        w.rank = 3;
        w.sizes[2] = w.box[2] = 2;
        w.strides[2] = columns * in.w_stride;
    }
    TensorMap w_map = make_tensor_map(in.w, w);
    TensorMapSpec y{.element = Element::BF16,
                    .rank = 2,
                    .sizes = {columns, in.rows, 1},
                    .strides = {0, int64_t(columns) * 2, 0},
                    .box = {Tile::BOX_COLUMNS, 64, 1},
                    .swizzle = Tile::BOX_SWIZZLE};
    TensorMap y_map = make_tensor_map(in.y, y), residual_map = y_map;
    if (in.residual != nullptr) {
        y.strides[1] = in.residual_stride * 2;
        residual_map = make_tensor_map(in.residual, y);
    }
    int blocks = std::min(p.row_tiles * p.column_tiles, cluster_places(cluster) / cluster) * cluster;
    launch({.name = "gemm_fp8",
            .grid = dim3(unsigned(blocks)),
            .threads = GEMM_THREADS,
            .shared_bytes = Tile::SHARED_BYTES,
            .stream = stream,
            .cluster = cluster},
           gemm_kernel<PARTS, COLUMNS, KIND>, p, x_map, w_map, y_map, residual_map);
}

}  // namespace

void gemm_fp8(const GemmInputs& in, Stream stream) {
    if (in.rows == 0) return;
    CHECK_RANGE(in.rows, 1, 1 << 24);
    CHECK_RANGE(in.outputs, 8, 1 << 24);
    CHECK_RANGE(in.width, 16, 1 << 24);
    CHECK_MULTIPLE(in.width, 16);
    CHECK_MULTIPLE(in.outputs, in.is_gated ? 16 : 8);
    CHECK(!in.is_gated || !in.is_block, "is_block must be false for a gated product: it has one scale per output");
    CHECK(!in.is_gated || in.residual == nullptr, "residual must be null for a gated product");
    CHECK(int64_t(ceil_div(in.rows, 128)) * ceil_div(in.outputs, GEMM_COLUMNS[0]) <= 0x7FFFFFFF,
          "rows and outputs make more tiles than an int holds: ", in.rows, " and ", in.outputs);
    CHECK_STRIDE(in.x_stride, 16);
    CHECK_STRIDE(in.w_stride, 16);
    CHECK_STRIDE(in.x_scale_stride, 1);
    CHECK_STRIDE(in.w_scale_stride, 1);
    CHECK_OPTIONAL(in.residual, 16);
    CHECK_STRIDE(in.residual_stride, 8);
    CHECK_POINTER(in.y);
    CHECK_POINTER(in.x);
    CHECK_POINTER(in.w);
    CHECK_ALIGNED(in.x_scales, 4);
    CHECK_ALIGNED(in.w_scales, 4);
    using Kind = GemmKind;
    Kind kind = in.is_gated ? Kind::GATED : in.is_block ? Kind::BLOCK : Kind::PLAIN;
    GemmShape shape = choose_shape(in.rows, in.outputs, kind);
    auto with_kind = [&](auto parts, auto columns) {
        if constexpr (columns() % 16 == 0) {
            if (kind == Kind::GATED) return launch_gemm<parts(), columns(), Kind::GATED>(in, shape.cluster, stream);
        }
        launch_gemm<parts(), columns(), Kind::PLAIN>(in, shape.cluster, stream);
    };
    auto with_columns = [&](auto parts) {
        if (kind == Kind::BLOCK) return launch_gemm<parts(), 128, Kind::BLOCK>(in, shape.cluster, stream);
        switch (shape.columns) {
            case 32: return with_kind(parts, std::integral_constant<int, 32>{});
            case 40: return with_kind(parts, std::integral_constant<int, 40>{});
            case 48: return with_kind(parts, std::integral_constant<int, 48>{});
            case 64: return with_kind(parts, std::integral_constant<int, 64>{});
            case 112: return with_kind(parts, std::integral_constant<int, 112>{});
            default: return with_kind(parts, std::integral_constant<int, 128>{});
        }
    };
    if (shape.parts == 2) return with_columns(std::integral_constant<int, 2>{});
    with_columns(std::integral_constant<int, 1>{});
}

}  // namespace nemo
