// Rotary embedding of q and k, and the write of k and v into their pages: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

constexpr int ROPE_HEAD_DIM = 128;

// T tokens of heads of 128. Heads of a token are dense; the strides are elements between tokens.
struct RopeInputs {
    bf16* q_out;  // (T, num_heads, 128), dense
    const bf16 *q, *k, *v;
    const float* table;                         // (positions, 2, 64): cosines, sines
    const int64_t *positions, *slot_mapping;    // (T,)
    int64_t tokens, q_stride, k_stride, v_stride;
    int num_heads, num_kv_heads;
    int page_size;  // a power of two
};

// Caches: (pages, num_kv_heads, page_size, 128), dense.
void rope_and_append_kv(bf16* k_cache, bf16* v_cache, const RopeInputs& in, Stream stream);
// Entries divided by their head's scale (num_kv_heads,), or by 1 if null.
void rope_and_append_kv_fp8(fp8* k_cache, fp8* v_cache, const float* k_scale, const float* v_scale,
                            const RopeInputs& in, Stream stream);

}  // namespace nemo
