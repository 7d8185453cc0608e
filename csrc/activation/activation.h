// SiLU of the gate times the up projection, and quantisation to FP8: host functions. Rows are dense; strides are
// elements between rows; outputs are dense throughout.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// `width` is that of an output row: gate_up has rows of 2 * width, the gate first.
void silu_mul(bf16* y, const bf16* gate_up, int64_t rows, int width, int64_t stride, Stream stream);
// `scale`: a number for all rows, or null for one per row; `scales` gets what was used.
void silu_mul_fp8(fp8* y, float* scales, const bf16* gate_up, const float* scale, int64_t rows, int width,
                  int64_t stride, Stream stream);
void quantize_tokens(fp8* y, float* scales, const bf16* x, const float* scale, int64_t rows, int width, int64_t stride,
                     Stream stream);
// A scale for each 128 elements of a row, and for what is left at its end.
void quantize_token_blocks(fp8* y, float* scales, const bf16* x, int64_t rows, int width, int64_t stride,
                           Stream stream);

}  // namespace nemo
