// The linear layers of few tokens that csrc/linear offers.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// What the rows of x are made of, before the product: they are there already, or are the norm of x (+ residual), the
// gated activation of x, or x quantised.
enum class Input { READY, NORM, SILU_MUL, QUANTIZE };

struct LinearInputs {
    Input input;
    const void* x;          // of the weight's type if READY, else bf16; SILU_MUL: 2 * width wide
    const bf16* residual;   // NORM, or null
    const bf16* norm;       // NORM: (width)
    bf16* sum;              // NORM with a residual: x + residual, dense
    const float* fixed_scale;  // of FP8, or null
    float eps;
    int rows, width;
    int64_t x_stride, residual_stride;  // elements between rows
    // Null, or where the blocks of the launch make the rows together: (rows, width) dense, of the weight's type, and of
    // FP8 the rows' scales; `counts` are two zeros, and zeros again when the launch has ended.
    void* made;
    float* made_scales;
    int* counts;
};

// A scale per tensor (strides 0), per output, or per block of 128 x 128.
struct LinearScales {
    const float* x;  // READY: per token, or per token and 128 of K
    int64_t x_stride;
    const float* w;
    int64_t w_stride;  // between outputs, or rows of blocks
    bool is_block;
};

// Whether a launch's shared memory is enough for `rows` of this width where each block makes its input for itself: it
// is kept whole, but for a gated activation in bf16.
bool small_linear_fits(Input input, bool is_fp8, int rows, int outputs, int width);

// At most 64 rows, 8 of an input that each block makes for itself. y: (rows, outputs) dense; weight: (outputs, width).
void small_linear(bf16* y, const LinearInputs& in, const bf16* weight, int outputs, int64_t weight_stride,
                  Stream stream);
void small_linear_fp8(bf16* y, const LinearInputs& in, const fp8* weight, int outputs, int64_t weight_stride,
                      const LinearScales& scales, Stream stream);

}  // namespace nemo
