// Clusters: neighbouring blocks (along x) of a launch that run at the same time and reach each other's shared memory
// (Launch::cluster). What lies at an address of this block's shared memory lies there in that of every block.
#pragma once

#include "tma.cuh"

namespace nemo {

constexpr int MAX_CLUSTER = 8;  // that every Hopper GPU takes

}  // namespace nemo

#ifdef NEMO_EMULATED
#include "emulation/cluster.h"
#else

namespace nemo {

// This block's place in its cluster: blockIdx.x % cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// A barrier of all threads of all blocks of the cluster, in two halves: each thread calls both in turn, in as many
// rounds as the others. What came before the first half is seen after the second. A block's shared memory is gone when
// it ends: one of whose memory others may still use waits for them so.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// The first half where all that others need is mbarriers, which mbarrier_init_fence has published: without a fence of
// memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// At the mbarrier of block `rank`: after its initialisation and a cluster barrier, before its block ends. It orders
// what products and copies have read that this thread has waited for; what threads write for another block needs a
// cluster barrier, because a release to the cluster is a fence of all memory, and too slow for every stage of a ring.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// As tma_load_2d, to the same place of every block whose bit is set in `blocks`, by one read of L2; each block's
// mbarrier gets the full bytes.
__device__ __forceinline__ void tma_load_2d_multicast(void* to_shared, const TensorMap* map, Mbarrier* barrier, int c0,
                                                      int c1, uint16_t blocks, Keep keep = Keep::NORMAL) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(to_shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks), "l"(cache_policy(keep))
        : "memory");
}

}  // namespace nemo

#endif
