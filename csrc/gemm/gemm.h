// FP8 matrix products of many tokens: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// y (rows, outputs) = x (rows, width) w^T (outputs, width), scaled; a residual is added to their values in bf16. Gated:
// the first half of the outputs are gates and the others up projections, y (rows, outputs / 2) = silu(gate) * up of
// their values in bf16. Strides are elements between rows; those of y and the residual a multiple of 8, width of 16.
struct GemmInputs {
    bf16* y;  // dense
    const fp8 *x, *w;
    const bf16* residual;  // (rows, outputs), or null; not of a gated product
    const float* x_scales;  // per token, or per token and 128 of K
    const float* w_scales;  // of all, per output, or per block of 128 x 128
    int64_t x_stride, w_stride, residual_stride;
    int64_t x_scale_stride, w_scale_stride;  // between tokens; between outputs (0: one for all) or rows of blocks
    int rows, outputs, width;
    bool is_block, is_gated;  // not both
};

void gemm_fp8(const GemmInputs& in, Stream stream);

}  // namespace nemo
