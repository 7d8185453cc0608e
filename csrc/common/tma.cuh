// The copy engine (TMA): boxes of up to three dimensions between global and shared memory.
#pragma once

#include "barrier.cuh"

namespace nemo {

// How a box lies in shared memory. SWIZZLE_128B: rows of 128 bytes, whose 16-byte chunks are permuted by
// chunk ^= row % 8 (by address bits: bits 4-6 ^= bits 7-9), the box 1024-byte aligned.
enum class Swizzle { NONE, B32, B64, B128 };

// Whether what was read will be read again soon by others: weights and KV of one row are not.
enum class Keep { NORMAL, EVICT_FIRST, EVICT_LAST };

// The element whose bits are 0 also fills what lies outside of the tensor.
enum class Element { U8, BF16, F32 };

struct TensorMapSpec {
    Element element;
    int rank;             // 2 or 3
    int64_t sizes[3];     // elements, innermost first
    int64_t strides[3];   // bytes between neighbours of dimension 1 and 2 (index 0 unused); multiples of 16
    int box[3];           // elements, each at most 256; innermost bytes a multiple of 16, at most the swizzle's width
    Swizzle swizzle;
};

}  // namespace nemo

#ifdef NEMO_EMULATED
#include "emulation/tma.h"
#else

#include <cuda.h>

namespace nemo {

// Passed to a kernel by value as `const __grid_constant__ TensorMap`.
struct TensorMap {
    CUtensorMap map;
};

// Host: describes global memory at `base`, 16-byte aligned. Throws if the driver refuses. Defined in launch.cu.
TensorMap make_tensor_map(const void* base, const TensorMapSpec& spec);

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ uint64_t cache_policy(Keep keep) {
    return keep == Keep::EVICT_FIRST ? 0x12F0000000000000ull
                                     : keep == Keep::EVICT_LAST ? 0x14F0000000000000ull : 0x1000000000000000ull;
}

// By one thread. The box at element coordinates (c0 innermost) arrives at `to_shared` and counts its full bytes
// (also those outside of the tensor, which are 0) on `barrier`.
__device__ __forceinline__ void tma_load_2d(
    void* to_shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1, Keep keep = Keep::NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to_shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "l"(cache_policy(keep))
        : "memory");
}
__device__ __forceinline__ void tma_load_3d(
    void* to_shared, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, Keep keep = Keep::NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to_shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(cache_policy(keep))
        : "memory");
}
// `bytes` (a multiple of 16) in a row, both ends 16-byte aligned.
__device__ __forceinline__ void bulk_load(
    void* to_shared, const void* from, int bytes, Mbarrier* barrier, Keep keep = Keep::NORMAL) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(to_shared)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(cache_policy(keep))
        : "memory");
}
// From shared to global memory, what lies outside of the tensor is not written; after fence_async_proxy and a barrier.
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, const void* from_shared, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(from_shared)), "r"(c0), "r"(c1)
                 : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING groups of this thread still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Until at most PENDING groups of this thread are not yet written.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace nemo

#endif
