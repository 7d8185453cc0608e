// Launch of the widening of FP8 pages.
#include "attention/gather.cuh"

#include <bit>

#include "common/launch.h"

namespace nemo {

void gather_pages(const GatherInputs& in, Stream stream) {
    if (in.num_rows == 0 || in.out_pages == 0) return;
    CHECK_POINTER(in.k_out);
    CHECK_POINTER(in.v_out);
    CHECK_POINTER(in.k_cache);
    CHECK_POINTER(in.v_cache);
    CHECK_ALIGNED(in.page_table, 8);
    CHECK_ALIGNED(in.slot_ids, 8);
    CHECK_ALIGNED(in.bounds, 8);
    CHECK_STRIDE(in.table_stride, 1);
    CHECK_RANGE(in.num_rows, 0, 1 << 22);
    CHECK_RANGE(in.out_pages, 0, 0x7FFFFFFF);
    CHECK_RANGE(in.num_kv_heads, 1, 64);
    CHECK_RANGE(in.num_heads, 1, in.num_kv_heads);
    CHECK_RANGE(in.first_head, 0, in.num_kv_heads - in.num_heads);
    CHECK(in.page_size >= 16 && in.page_size <= 128 && std::has_single_bit(unsigned(in.page_size)),
          "page_size must be 16, 32, 64 or 128, got ", in.page_size);
    launch({.name = "gather_pages", .grid = dim3(unsigned(in.out_pages)), .threads = GATHER_THREADS, .stream = stream},
           gather_pages_kernel, in);
}

}  // namespace nemo
