// Launch of prefill attention.
#include "attention/prefill.cuh"

#include <bit>

#include "common/launch.h"

namespace nemo {

namespace {

void check(const PrefillInputs& in) {
    CHECK_POINTER(in.out);
    CHECK_POINTER(in.q);
    CHECK_POINTER(in.k_cache);
    CHECK_POINTER(in.v_cache);
    CHECK_OPTIONAL(in.k_scale, 4);
    CHECK_OPTIONAL(in.v_scale, 4);
    CHECK_ALIGNED(in.page_table, 8);
    CHECK_ALIGNED(in.slot_ids, 8);
    CHECK_ALIGNED(in.starts, 8);
    CHECK_ALIGNED(in.seq_lens, 8);
    CHECK_STRIDE(in.out_stride, VECTOR);
    CHECK_STRIDE(in.q_stride, VECTOR);
    CHECK_STRIDE(in.q_head_stride, VECTOR);
    CHECK_STRIDE(in.table_stride, 1);
    CHECK_RANGE(in.num_kv_heads, 1, 64);
    CHECK_MULTIPLE(in.num_heads, in.num_kv_heads);
    int group = in.num_heads / in.num_kv_heads;
    CHECK(group >= 1 && group <= 8 && std::has_single_bit(unsigned(group)),
          "num_heads must be 1, 2, 4 or 8 times num_kv_heads, got ", in.num_heads, " and ", in.num_kv_heads);
    CHECK(in.page_size >= 16 && in.page_size <= 128 && std::has_single_bit(unsigned(in.page_size)),
          "page_size must be 16, 32, 64 or 128, got ", in.page_size);
    // Coordinates of the copy engine and items of work are 32-bit.
    CHECK_RANGE(in.num_pages, 1, 0x7FFFFFFF / (in.num_kv_heads * in.page_size));
    CHECK_RANGE(in.num_rows, 1, 1 << 22);
    CHECK_RANGE(in.num_queries, 1, 1 << 24);
}

// Rows of 128 numbers; a box is half a page of one head.
TensorMap cache_map(const bf16* cache, const PrefillInputs& in) {
    return make_tensor_map(cache, {.element = Element::BF16,
                                   .rank = 2,
                                   .sizes = {PREFILL_DIM, in.num_pages * in.num_kv_heads * in.page_size, 1},
                                   .strides = {0, PREFILL_DIM * 2, 0},
                                   .box = {64, in.page_size, 1},
                                   .swizzle = Swizzle::B128});
}

}  // namespace

void prefill_attention(const PrefillInputs& in, Stream stream) {
    if (in.num_rows == 0 || in.num_queries == 0) return;
    check(in);
    int group = in.num_heads / in.num_kv_heads;
    int tiles = in.num_queries / (PREFILL_ROWS / group) + in.num_rows;  // at most: see find_prefill_item
    Prefill p{.in = in,
              .num_items = tiles * in.num_kv_heads,
              .group_shift = std::countr_zero(unsigned(group)),
              .page_shift = std::countr_zero(unsigned(in.page_size)),
              .score_scale = in.scale * LOG2_E};
    // A block fills a multiprocessor's shared memory, and stays.
    int blocks = p.num_items < num_sms() ? p.num_items : num_sms();
    launch({.name = "prefill_attention",
            .grid = dim3(unsigned(blocks)),
            .threads = PREFILL_THREADS,
            .shared_bytes = sizeof(PrefillShared),
            .stream = stream},
           prefill_kernel, p, cache_map(in.k_cache, in), cache_map(in.v_cache, in));
}

}  // namespace nemo
