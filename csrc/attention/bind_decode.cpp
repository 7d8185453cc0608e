// Python's view of csrc/attention/decode.
#include "attention/decode.h"
#include "common/bind.h"

namespace nemo {

void register_attention_decode(pybind11::module_& m) {
    define(m, "decode_units", {"num_kv_heads"}, decode_units);
    define(m, "decode_plan_words", {"num_items", "num_units", "width"}, decode_plan_words);
    define(m, "decode_scratch_words", {"num_units", "num_heads", "width"}, decode_scratch_words);
    define(m, "plan_decode",
           {"plan", "starts", "seq_lens", "slot_ids", "first_query", "num_items", "first_row", "num_rows", "num_units",
            "width", "stream"},
           [](uintptr_t plan, uintptr_t starts, uintptr_t seq_lens, uintptr_t slot_ids, int first_query, int num_items,
              int first_row, int num_rows, int num_units, int width, Stream stream) {
               plan_decode({.plan = pointer<int32_t>(plan),
                            .starts = pointer<int64_t>(starts),
                            .seq_lens = pointer<int64_t>(seq_lens),
                            .slot_ids = pointer<int64_t>(slot_ids),
                            .first_query = first_query,
                            .num_items = num_items,
                            .first_row = first_row,
                            .num_rows = num_rows,
                            .num_units = num_units,
                            .width = width},
                           stream);
           });
    define(m, "decode_attention",
           {"is_fp8", "out", "q", "k_cache", "v_cache", "k_scale", "v_scale",
            "page_table", "plan", "scratch", "counters", "q_stride", "q_head_stride", "table_stride",
            "num_items", "num_units", "width", "num_heads", "num_kv_heads", "page_size", "scale", "stream"},
           [](bool is_fp8, uintptr_t out, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t k_scale,
              uintptr_t v_scale, uintptr_t page_table, uintptr_t plan, uintptr_t scratch, uintptr_t counters,
              int64_t q_stride, int64_t q_head_stride, int64_t table_stride, int num_items, int num_units,
              int width, int num_heads, int num_kv_heads, int page_size, float scale, Stream stream) {
               decode_attention({.out = pointer<bf16>(out),
                                 .q = pointer<bf16>(q),
                                 .k_cache = pointer<void>(k_cache),
                                 .v_cache = pointer<void>(v_cache),
                                 .k_scale = pointer<float>(k_scale),
                                 .v_scale = pointer<float>(v_scale),
                                 .page_table = pointer<int64_t>(page_table),
                                 .plan = pointer<int32_t>(plan),
                                 .scratch = pointer<float>(scratch),
                                 .counters = pointer<int32_t>(counters),
                                 .q_stride = q_stride,
                                 .q_head_stride = q_head_stride,
                                 .table_stride = table_stride,
                                 .num_items = num_items,
                                 .num_units = num_units,
                                 .width = width,
                                 .num_heads = num_heads,
                                 .num_kv_heads = num_kv_heads,
                                 .page_size = page_size,
                                 .scale = scale,
                                 .is_fp8 = is_fp8},
                                stream);
           });
}

}  // namespace nemo
