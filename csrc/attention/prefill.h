// Causal attention of rows with several queries over paged keys and values: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
using Stream = uintptr_t;

// Row i has queries starts[i] .. starts[i + 1] - 1, which are the last of its seq_lens[i] keys. Its pages are
// page_table[slot_ids[i]]; entries past its last key mean nothing. Heads of 128. Strides in elements.
struct PrefillInputs {
    bf16* out;      // (T, num_heads, 128), heads dense
    const bf16* q;  // (T, num_heads, 128)
    const bf16 *k_cache, *v_cache;  // (num_pages, num_kv_heads, page_size, 128), dense
    const float *k_scale, *v_scale;  // (num_kv_heads,): what the entries are to be multiplied by; null for 1
    const int64_t* page_table;      // (slots, pages)
    const int64_t *slot_ids, *starts, *seq_lens;  // (R,), (R + 1,), (R,)
    int64_t out_stride, q_stride, q_head_stride, table_stride, num_pages;
    int num_rows;
    int num_queries;  // of the rows together, or more
    int num_heads, num_kv_heads;  // 1, 2, 4 or 8 query heads for each KV head
    int page_size;                // 16, 32, 64 or 128
    float scale;
};

void prefill_attention(const PrefillInputs& in, Stream stream);

}  // namespace nemo
