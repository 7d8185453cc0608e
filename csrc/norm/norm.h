// RMSNorm: host functions. Rows are dense; strides are elements between rows.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// What both have: `sum` (dense) is x + residual if there is a residual; both are null if not.
struct RmsNormInputs {
    bf16* sum;
    const bf16 *x, *residual, *weight;
    int64_t rows;
    int width;
    int64_t x_stride, residual_stride;
    float eps;
};

void rms_norm(bf16* y, const RmsNormInputs& in, Stream stream);
// `scale`: a number for all rows, or null for one per row; `scales` gets what was used.
void rms_norm_fp8(fp8* y, float* scales, const RmsNormInputs& in, const float* scale, Stream stream);

}  // namespace nemo
