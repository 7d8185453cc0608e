// The pages of rows of an FP8 cache, widened to bf16 and put one after the other: host function.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

// Row i's pages are the first bounds[i + 1] - bounds[i] of page_table[slot_ids[i]], and come to lie at bounds[i] and
// after, of the KV heads first_head .. first_head + num_heads - 1 alone. Heads of 128. Strides in elements.
struct GatherInputs {
    // (out_pages, num_heads, page_size, 128), dense; pages from bounds[R] on are left as they are
    bf16 *k_out, *v_out;
    const fp8 *k_cache, *v_cache;     // (pages, num_kv_heads, page_size, 128), dense
    const int64_t* page_table;        // (slots, pages)
    const int64_t *slot_ids, *bounds; // (R,), (R + 1,)
    int64_t table_stride;
    int num_rows, out_pages;
    int num_kv_heads, first_head, num_heads;
    int page_size;
};

void gather_pages(const GatherInputs& in, Stream stream);

}  // namespace nemo
