// Python's view of csrc/rope.
#include "common/bind.h"
#include "rope/rope.h"

namespace nemo {

void register_rope(pybind11::module_& m) {
    define(m, "rope_and_append_kv",
           {"is_fp8", "q_out", "q", "k", "v", "table", "positions", "slot_mapping",
            "k_cache", "v_cache", "k_scale", "v_scale", "tokens", "q_stride", "k_stride", "v_stride",
            "num_heads", "num_kv_heads", "page_size", "stream"},
           [](bool is_fp8, uintptr_t q_out, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t table, uintptr_t positions,
              uintptr_t slot_mapping, uintptr_t k_cache, uintptr_t v_cache, uintptr_t k_scale, uintptr_t v_scale,
              int64_t tokens, int64_t q_stride, int64_t k_stride, int64_t v_stride, int num_heads, int num_kv_heads,
              int page_size, Stream stream) {
               RopeInputs in{.q_out = pointer<bf16>(q_out),
                             .q = pointer<bf16>(q),
                             .k = pointer<bf16>(k),
                             .v = pointer<bf16>(v),
                             .table = pointer<float>(table),
                             .positions = pointer<int64_t>(positions),
                             .slot_mapping = pointer<int64_t>(slot_mapping),
                             .tokens = tokens,
                             .q_stride = q_stride,
                             .k_stride = k_stride,
                             .v_stride = v_stride,
                             .num_heads = num_heads,
                             .num_kv_heads = num_kv_heads,
                             .page_size = page_size};
               if (is_fp8) {
                   rope_and_append_kv_fp8(pointer<fp8>(k_cache), pointer<fp8>(v_cache), pointer<float>(k_scale),
                                          pointer<float>(v_scale), in, stream);
               } else {
                   rope_and_append_kv(pointer<bf16>(k_cache), pointer<bf16>(v_cache), in, stream);
               }
           });
}

}  // namespace nemo
