// Launches of FP8 matrix products.
#include "gemm/gemm.cuh"

#include "common/launch.h"

namespace nemo {

namespace {

// Columns of a tile for what can have any: the width whose rounds of tiles take the least time, a round taking its
// columns and some 16 more for its start and its end.
int choose_columns(int rows, int outputs, int num_sms) {
    int best = 128;
    int64_t least = INT64_MAX;
    for (int columns : {192, 128, 96}) {
        int64_t tiles = int64_t(ceil_div(rows, GEMM_ROWS)) * ceil_div(outputs, columns);
        int64_t time = ceil_div(tiles, int64_t(num_sms)) * (columns + 16);
        if (time < least) {
            least = time;
            best = columns;
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

template <int COLUMNS, bool IS_BLOCK>
void launch_gemm(const GemmInputs& in, Stream stream) {
    using Tile = GemmTile<COLUMNS>;
    static_assert(Tile::STAGES >= 3);
    Gemm p{.in = in,
           .row_tiles = ceil_div(in.rows, GEMM_ROWS),
           .column_tiles = ceil_div(in.outputs, COLUMNS),
           .steps = ceil_div(in.width, GEMM_DEPTH),
           .stages = Tile::STAGES};
    TensorMap x_map = operand_map(in.x, in.rows, in.width, in.x_stride, GEMM_ROWS);
    TensorMap w_map = operand_map(in.w, in.outputs, in.width, in.w_stride, COLUMNS);
    TensorMap y_map = make_tensor_map(in.y, {.element = Element::BF16,
                                             .rank = 2,
                                             .sizes = {in.outputs, in.rows, 1},
                                             .strides = {0, int64_t(in.outputs) * 2, 0},
                                             .box = {BOX_COLUMNS, 64, 1},
                                             .swizzle = Swizzle::B64});
    int tiles = p.row_tiles * p.column_tiles, sms = num_sms();
    launch({.name = "gemm_fp8",
            .grid = dim3(unsigned(tiles < sms ? tiles : sms)),
            .threads = GEMM_THREADS,
            .shared_bytes = Tile::SHARED_BYTES,
            .stream = stream},
           gemm_kernel<COLUMNS, IS_BLOCK>, p, x_map, w_map, y_map);
}

}  // namespace

void gemm_fp8(const GemmInputs& in, Stream stream) {
    if (in.rows == 0) return;
    CHECK_RANGE(in.rows, 1, 1 << 24);
    CHECK_RANGE(in.outputs, 8, 1 << 24);
    CHECK_RANGE(in.width, 16, 1 << 24);
    CHECK_MULTIPLE(in.width, 16);
    CHECK_MULTIPLE(in.outputs, 8);
    CHECK(int64_t(ceil_div(in.rows, GEMM_ROWS)) * ceil_div(in.outputs, 96) <= 0x7FFFFFFF,
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
    if (in.is_block) return launch_gemm<128, true>(in, stream);
    switch (choose_columns(in.rows, in.outputs, num_sms())) {
        case 96: return launch_gemm<96, false>(in, stream);
        case 192: return launch_gemm<192, false>(in, stream);
        default: return launch_gemm<128, false>(in, stream);
    }
}

}  // namespace nemo
