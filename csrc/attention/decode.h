// Attention of single queries, or runs of them, over paged keys and values: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

constexpr int MOST_UNITS = 65535;    // of a launch
constexpr int MOST_ITEMS = 1 << 20;  // of 131,072 keys each: places on the line are ints
constexpr int MOST_HEADS = 1024;
constexpr int MOST_WIDTH = 8;     // queries of an item
constexpr int MOST_COLUMNS = 32;  // query heads of a KV head times queries of an item

// Items, of `width` queries each, are cut into units of equal work, and each KV head of a unit is a block. The plan,
// made once a step on the device, says where. The queries of an item are of one slot, that of the first; what those of
// another see means nothing.
struct DecodePlanInputs {
    int32_t* plan;  // decode_plan_words(num_items, num_units, width)
    const int64_t *starts, *seq_lens, *slot_ids;  // of rows: (R + 1,), (R,), (R,)
    int first_query, num_items;  // items are of the queries from first_query on, num_items or as many as there are
    int first_row, num_rows;     // of the rows first_row .. first_row + num_rows - 1, the last of which may have none
    int num_units;
    int width;
};

// Units such that the blocks of all KV heads run at once.
int decode_units(int num_kv_heads);
int64_t decode_plan_words(int num_items, int num_units, int width);
int64_t decode_scratch_words(int num_units, int num_heads, int width);

void plan_decode(const DecodePlanInputs& in, Stream stream);

// Heads of 128. Strides in elements.
struct DecodeInputs {
    bf16* out;      // of the first item: (items * width, num_heads, 128), dense
    const bf16* q;  // of the first item
    const void *k_cache, *v_cache;  // (pages, num_kv_heads, page_size, 128), dense, bf16 or fp8
    const float *k_scale, *v_scale;  // (num_kv_heads,), or null for 1
    const int64_t* page_table;
    int32_t* plan;      // only read
    float* scratch;     // decode_scratch_words
    int32_t* counters;  // num_units * num_kv_heads zeros, which are zeros again afterwards
    int64_t q_stride, q_head_stride, table_stride;
    int num_items, num_units, width;
    int num_heads, num_kv_heads;  // up to 8 query heads for each KV head, 32 times width
    int page_size;                // a power of two, at least 16
    float scale;
    bool is_fp8;
};

void decode_attention(const DecodeInputs& in, Stream stream);

}  // namespace nemo
