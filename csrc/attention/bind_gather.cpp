// Python's view of csrc/attention/gather.
#include "attention/gather.h"
#include "common/bind.h"

namespace nemo {

void register_attention_gather(pybind11::module_& m) {
    define(m, "gather_pages",
           {"k_out", "v_out", "k_cache", "v_cache", "page_table", "slot_ids", "bounds", "table_stride", "num_rows",
            "out_pages", "num_kv_heads", "first_head", "num_heads", "page_size", "stream"},
           [](uintptr_t k_out, uintptr_t v_out, uintptr_t k_cache, uintptr_t v_cache, uintptr_t page_table,
              uintptr_t slot_ids, uintptr_t bounds, int64_t table_stride, int num_rows, int out_pages, int num_kv_heads,
              int first_head, int num_heads, int page_size, Stream stream) {
               gather_pages({.k_out = pointer<bf16>(k_out),
                             .v_out = pointer<bf16>(v_out),
                             .k_cache = pointer<fp8>(k_cache),
                             .v_cache = pointer<fp8>(v_cache),
                             .page_table = pointer<int64_t>(page_table),
                             .slot_ids = pointer<int64_t>(slot_ids),
                             .bounds = pointer<int64_t>(bounds),
                             .table_stride = table_stride,
                             .num_rows = num_rows,
                             .out_pages = out_pages,
                             .num_kv_heads = num_kv_heads,
                             .first_head = first_head,
                             .num_heads = num_heads,
                             .page_size = page_size},
                            stream);
           });
}

}  // namespace nemo
