// FP8 matrix products of many tokens: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// What becomes of a product, times its scales, before it is stored.
enum class Epilogue { NONE, ADD_RESIDUAL, SILU_MUL, SILU_MUL_QUANTIZE };

// y (rows, outputs) = x (rows, width) w^T (outputs, width), scaled. Strides are elements between rows; outputs a multiple of 8, width of 16.
struct GemmInputs {
    void* y;  // dense; bf16, or fp8 of SILU_MUL_QUANTIZE; of both SILU_MUL half as many columns
    const fp8 *x, *w;
    const float* x_scales;  // per token, or per token and 128 of K
    const float* w_scales;  // of all, per output, or per block of 128 x 128
    int64_t x_stride, w_stride;
    int64_t x_scale_stride, w_scale_stride;  // between tokens; between outputs (0: one for all) or rows of blocks
    const bf16* residual;    // ADD_RESIDUAL
    int64_t residual_stride;
    const float* out_scale;  // SILU_MUL_QUANTIZE: one number
    int rows, outputs, width;
    Epilogue epilogue;
    bool is_block;
};

// SILU_MUL: rows of w lie in groups of 8, of the gate and of what it multiplies in turn.
void gemm_fp8(const GemmInputs& in, Stream stream);

}  // namespace nemo
