// Launches of what gives rows in FP8.
#include "activation/quantize.cuh"

#include "activation/activation.h"
#include "common/launch.h"

namespace nemo {

namespace {

template <bool IS_GATED>
void launch_quantize_rows(const char* name, fp8* y, float* scales, const bf16* x, const float* scale, int64_t rows,
                          int width, int64_t stride, Stream stream) {
    if (rows == 0) return;
    check_rows(rows, width);
    CHECK_STRIDE(stride, VECTOR);
    CHECK_POINTER(y);
    CHECK_POINTER(x);
    CHECK_ALIGNED(scales, 4);
    CHECK_OPTIONAL(scale, 4);
    RowPlan plan = plan_row(rows, width, num_sms());
    Launch how{.name = name,
               .grid = dim3(unsigned(rows)),
               .threads = plan.threads,
               .shared_bytes = QUANTIZE_SHARED_BYTES,
               .stream = stream};
    with_vectors(plan, [&](auto vectors) {
        launch(how, quantize_rows_kernel<vectors(), IS_GATED>, y, scales, x, scale, width, stride);
    });
}

}  // namespace

void silu_mul_fp8(fp8* y, float* scales, const bf16* gate_up, const float* scale, int64_t rows, int width,
                  int64_t stride, Stream stream) {
    if (rows > 0) CHECK_POINTER(gate_up);
    launch_quantize_rows<true>("silu_mul_fp8", y, scales, gate_up, scale, rows, width, stride, stream);
}

void quantize_tokens(fp8* y, float* scales, const bf16* x, const float* scale, int64_t rows, int width, int64_t stride,
                     Stream stream) {
    launch_quantize_rows<false>("quantize_tokens", y, scales, x, scale, rows, width, stride, stream);
}

void quantize_token_blocks(fp8* y, float* scales, const bf16* x, int64_t rows, int width, int64_t stride,
                           Stream stream) {
    if (rows == 0) return;
    CHECK_RANGE(width, VECTOR, 1 << 24);
    CHECK_MULTIPLE(width, VECTOR);
    CHECK_STRIDE(stride, VECTOR);
    CHECK_POINTER(y);
    CHECK_POINTER(x);
    CHECK_ALIGNED(scales, 4);
    int groups = ceil_div(width, SCALE_BLOCK);
    CHECK_RANGE(rows, 0, (0x7FFFFFFF - BLOCKS_PER_BLOCK) / groups);
    int count = int(rows) * groups;
    Launch how{.name = "quantize_token_blocks",
               .grid = dim3(ceil_div(count, BLOCKS_PER_BLOCK)),
               .threads = QUANTIZE_BLOCKS_THREADS,
               .stream = stream};
    launch(how, quantize_blocks_kernel, y, scales, x, count, groups, width, stride);
}

}  // namespace nemo
