// Attention of single queries over paged keys and values: host functions.
#pragma once

#include <cstdint>

namespace nemo {

struct bf16;
struct fp8;
using Stream = uintptr_t;

constexpr int MOST_UNITS = 65535;  // of a launch
constexpr int MOST_HEADS = 1024;

// Work is cut into units: an item (one query of one row) has one or more parts of its keys, and each KV head of a part
// is a block. The plan, made once a step on the device, says how.
struct DecodePlanInputs {
    int32_t* plan;  // decode_plan_words(num_items)
    const int64_t *starts, *seq_lens, *slot_ids;  // of rows: (R + 1,), (R,), (R,)
    int first_query, num_items;  // items are the queries first_query .. first_query + num_items - 1
    int first_row, num_rows;     // those of the rows first_row .. first_row + num_rows - 1
    int num_units;
    int keys_per_tile;  // of parts, which are whole tiles
};

int64_t decode_plan_words(int num_items);
// Units for a launch over `num_items` items: one each, and as many more as fill the GPU twice with blocks.
int decode_units(int num_items, int num_kv_heads);
// Parts of items that have several, at most: each needs decode_scratch_words.
int decode_shared_parts(int num_items, int num_units);
int64_t decode_scratch_words(int num_items, int num_units, int num_heads);
int decode_keys_per_tile(bool is_fp8);

void plan_decode(const DecodePlanInputs& in, Stream stream);

// Heads of 128. Strides in elements.
struct DecodeInputs {
    bf16* out;      // of the first item: (items, num_heads, 128), dense
    const bf16* q;  // of the first item
    const void *k_cache, *v_cache;  // (pages, num_kv_heads, page_size, 128), dense, bf16 or fp8
    const float *k_scale, *v_scale;  // (num_kv_heads,), or null for 1
    const int64_t* page_table;
    const int32_t* plan;
    float* scratch;     // decode_scratch_words
    int32_t* counters;  // num_items * num_kv_heads zeros, which are zeros again afterwards
    int64_t q_stride, q_head_stride, table_stride;
    int num_items, num_units;
    int num_heads, num_kv_heads;  // up to 8 query heads for each KV head
    int page_size;                // a power of two, at least 16
    float scale;
    bool is_fp8;
};

void decode_attention(const DecodeInputs& in, Stream stream);

}  // namespace nemo
