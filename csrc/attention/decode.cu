// Launches of decode attention, and the sizes of what it needs.
#include "attention/decode.cuh"

#include <algorithm>

#include "common/launch.h"

namespace nemo {

int decode_units(int num_kv_heads) {
    CHECK_RANGE(num_kv_heads, 1, MOST_HEADS);
    return std::max(1, 2 * num_sms() / num_kv_heads);  // two blocks share a multiprocessor
}

int64_t decode_plan_words(int num_items, int num_units, int width) {
    CHECK_RANGE(num_items, 0, MOST_ITEMS);
    CHECK_RANGE(num_units, 1, MOST_UNITS);
    CHECK_RANGE(width, 1, MOST_WIDTH);
    return 3 + 2 * (num_units + 1) + (3 + (width > 1 ? width : 0)) * int64_t(num_items);
}

int64_t decode_scratch_words(int num_units, int num_heads, int width) {
    CHECK_RANGE(num_units, 1, MOST_UNITS);
    CHECK_RANGE(num_heads, 1, MOST_HEADS);
    CHECK_RANGE(width, 1, MOST_WIDTH);
    return 2 * int64_t(num_units) * num_heads * width * MERGE_PITCH;
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
    CHECK_RANGE(in.num_units, 1, MOST_UNITS);
    CHECK_RANGE(in.width, 1, MOST_WIDTH);
    launch({.name = "plan_decode",
            .grid = dim3(1),
            .threads = PLAN_THREADS,
            .shared_bytes = PLAN_THREADS / 32 * 4,
            .stream = stream},
           plan_decode_kernel,
           MakePlan{in});
}

namespace {

template <class T, int TILES, bool IS_RUN>
void launch_decode(const DecodeInputs& in, Stream stream) {
    int page_shift = 0;
    while (1 << page_shift < in.page_size) page_shift++;
    launch({.name = sizeof(T) == 1 ? "decode_attention_fp8" : "decode_attention",
            .grid = dim3(unsigned(in.num_kv_heads), unsigned(in.num_units)),
            .threads = DECODE_THREADS,
            .shared_bytes = decode_shared_bytes(TILES),
            .stream = stream},
           decode_kernel<T, TILES, IS_RUN>,
           Decode<T>{in, in.num_heads / in.num_kv_heads, page_shift, in.scale * LOG2_E});
}

template <class T>
void choose_decode(const DecodeInputs& in, Stream stream) {
    int columns = in.num_heads / in.num_kv_heads * in.width;
    if (in.width == 1) {
        launch_decode<T, 1, false>(in, stream);
    } else if (columns <= 8) {
        launch_decode<T, 1, true>(in, stream);
    } else if (columns <= 16) {
        launch_decode<T, 2, true>(in, stream);
    } else {
        launch_decode<T, MAX_TILES, true>(in, stream);
    }
}

}  // namespace

void decode_attention(const DecodeInputs& in, Stream stream) {
    CHECK_RANGE(in.num_items, 1, MOST_ITEMS);
    CHECK_RANGE(in.num_units, 1, MOST_UNITS);
    CHECK_RANGE(in.num_heads, 1, MOST_HEADS);
    CHECK_RANGE(in.num_kv_heads, 1, in.num_heads);
    CHECK_MULTIPLE(in.num_heads, in.num_kv_heads);
    CHECK_RANGE(in.num_heads, in.num_kv_heads, MAX_GROUP * in.num_kv_heads);
    CHECK_RANGE(in.width, 1, MOST_WIDTH);
    CHECK(in.num_heads / in.num_kv_heads * in.width <= MOST_COLUMNS, "width must be at most ",
          MOST_COLUMNS * in.num_kv_heads / in.num_heads, ", got ", in.width);
    CHECK(in.page_size >= 16 && (in.page_size & (in.page_size - 1)) == 0,
          "page_size must be a power of two, at least 16, got ", in.page_size);
    CHECK_POINTER(in.k_cache);
    CHECK_POINTER(in.v_cache);
    CHECK_ALIGNED(in.out, 8);
    CHECK_ALIGNED(in.q, 4);
    CHECK_OPTIONAL(in.k_scale, 4);
    CHECK_OPTIONAL(in.v_scale, 4);
    CHECK_ALIGNED(in.page_table, 8);
    CHECK_ALIGNED(in.plan, 4);
    CHECK_ALIGNED(in.scratch, 16);
    CHECK_ALIGNED(in.counters, 4);
    CHECK_STRIDE(in.q_stride, 2);
    CHECK_STRIDE(in.q_head_stride, 2);
    CHECK_STRIDE(in.table_stride, 1);
    if (in.is_fp8) {
        choose_decode<fp8>(in, stream);
    } else {
        choose_decode<bf16>(in, stream);
    }
}

}  // namespace nemo
