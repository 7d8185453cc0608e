// Python's view of csrc/attention/prefill.
#include "attention/prefill.h"
#include "common/bind.h"

namespace nemo {

void register_attention_prefill(pybind11::module_& m) {
    define(m, "prefill_attention",
           {"out", "q", "k_cache", "v_cache", "k_scale", "v_scale", "page_table", "slot_ids", "starts", "seq_lens",
            "out_stride", "q_stride", "q_head_stride", "table_stride", "num_pages", "num_rows", "num_queries",
            "num_heads", "num_kv_heads", "page_size", "scale", "stream"},
           [](uintptr_t out, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t k_scale, uintptr_t v_scale,
              uintptr_t page_table, uintptr_t slot_ids, uintptr_t starts, uintptr_t seq_lens, int64_t out_stride,
              int64_t q_stride, int64_t q_head_stride, int64_t table_stride, int64_t num_pages, int num_rows,
              int num_queries, int num_heads, int num_kv_heads, int page_size, float scale, Stream stream) {
               prefill_attention({.out = pointer<bf16>(out),
                                  .q = pointer<bf16>(q),
                                  .k_cache = pointer<bf16>(k_cache),
                                  .v_cache = pointer<bf16>(v_cache),
                                  .k_scale = pointer<float>(k_scale),
                                  .v_scale = pointer<float>(v_scale),
                                  .page_table = pointer<int64_t>(page_table),
                                  .slot_ids = pointer<int64_t>(slot_ids),
                                  .starts = pointer<int64_t>(starts),
                                  .seq_lens = pointer<int64_t>(seq_lens),
                                  .out_stride = out_stride,
                                  .q_stride = q_stride,
                                  .q_head_stride = q_head_stride,
                                  .table_stride = table_stride,
                                  .num_pages = num_pages,
                                  .num_rows = num_rows,
                                  .num_queries = num_queries,
                                  .num_heads = num_heads,
                                  .num_kv_heads = num_kv_heads,
                                  .page_size = page_size,
                                  .scale = scale},
                                 stream);
           });
}

}  // namespace nemo
