// Launches of decode attention, and the sizes of what it needs.
#include "attention/decode.cuh"

#include "common/launch.h"

namespace nemo {

constexpr int MOST_ITEMS = 1 << 24;

int64_t decode_plan_words(int num_items) {
    CHECK_RANGE(num_items, 0, MOST_ITEMS);
    return 2 + 4 * int64_t(num_items);
}

int decode_units(int num_items, int num_kv_heads) {
    CHECK_RANGE(num_items, 0, MOST_ITEMS);
    CHECK_RANGE(num_kv_heads, 1, MOST_HEADS);
    // Two blocks share a multiprocessor. Split rows have at most twice the extra units as parts.
    return num_items + ceil_div(2 * num_sms(), num_kv_heads);
}

int decode_shared_parts(int num_items, int num_units) { return 2 * (num_units - num_items); }

int64_t decode_scratch_words(int num_items, int num_units, int num_heads) {
    CHECK_RANGE(num_items, 0, MOST_ITEMS);
    CHECK_RANGE(num_units, num_items, MOST_UNITS);
    CHECK_RANGE(num_heads, 1, MOST_HEADS);
    return int64_t(decode_shared_parts(num_items, num_units)) * num_heads * MERGE_PITCH;
}

int decode_keys_per_tile(bool is_fp8) {
    return is_fp8 ? DecodeTile<fp8>::BLOCK_KEYS : DecodeTile<bf16>::BLOCK_KEYS;
}

void plan_decode(const DecodePlanInputs& in, Stream stream) {
    CHECK_ALIGNED(in.plan, 4);
    CHECK_ALIGNED(in.starts, 8);
    CHECK_ALIGNED(in.seq_lens, 8);
    CHECK_ALIGNED(in.slot_ids, 8);
    CHECK_RANGE(in.first_query, 0, 0x7FFFFFFF - MOST_ITEMS);
    CHECK_RANGE(in.num_items, 1, MOST_ITEMS);
    CHECK_RANGE(in.first_row, 0, 0x7FFFFFFF - MOST_ITEMS);
    CHECK_RANGE(in.num_rows, 1, MOST_ITEMS);
    CHECK_RANGE(in.num_units, in.num_items, MOST_UNITS);
    CHECK(in.keys_per_tile == decode_keys_per_tile(false) || in.keys_per_tile == decode_keys_per_tile(true),
          "keys_per_tile must be decode_keys_per_tile of the cache, got ", in.keys_per_tile);
    launch({.name = "plan_decode", .grid = dim3(1), .threads = PLAN_THREADS, .shared_bytes = 33 * 4, .stream = stream},
           plan_decode_kernel, MakePlan{in});
}

namespace {

template <class T>
void launch_decode(const DecodeInputs& in, Stream stream) {
    int page_shift = 0;
    while (1 << page_shift < in.page_size) page_shift++;
    launch({.name = sizeof(T) == 1 ? "decode_attention_fp8" : "decode_attention",
            .grid = dim3(unsigned(in.num_kv_heads), unsigned(in.num_units)),
            .threads = DECODE_THREADS,
            .shared_bytes = DECODE_SHARED_BYTES,
            .stream = stream},
           decode_kernel<T>,
           Decode<T>{in, in.num_heads / in.num_kv_heads, page_shift, in.scale * LOG2_E});
}

}  // namespace

void decode_attention(const DecodeInputs& in, Stream stream) {
    CHECK_RANGE(in.num_items, 1, MOST_ITEMS);
    CHECK_RANGE(in.num_units, in.num_items, MOST_UNITS);
    CHECK_RANGE(in.num_heads, 1, MOST_HEADS);
    CHECK_RANGE(in.num_kv_heads, 1, in.num_heads);
    CHECK_MULTIPLE(in.num_heads, in.num_kv_heads);
    CHECK_RANGE(in.num_heads, in.num_kv_heads, MAX_GROUP * in.num_kv_heads);
    CHECK(in.page_size >= 16 && (in.page_size & (in.page_size - 1)) == 0,
          "page_size must be a power of two, at least 16, got ", in.page_size);
    CHECK_POINTER(in.k_cache);
    CHECK_POINTER(in.v_cache);
    CHECK_ALIGNED(in.out, 2);
    CHECK_ALIGNED(in.q, 4);
    CHECK_OPTIONAL(in.k_scale, 4);
    CHECK_OPTIONAL(in.v_scale, 4);
    CHECK_ALIGNED(in.page_table, 8);
    CHECK_ALIGNED(in.plan, 4);
    CHECK_ALIGNED(in.scratch, 4);
    CHECK_ALIGNED(in.counters, 4);
    CHECK_STRIDE(in.q_stride, 2);
    CHECK_STRIDE(in.q_head_stride, 2);
    CHECK_STRIDE(in.table_stride, 1);
    if (in.is_fp8) {
        launch_decode<fp8>(in, stream);
    } else {
        launch_decode<bf16>(in, stream);
    }
}

}  // namespace nemo
