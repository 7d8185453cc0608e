// Blocks that run together: their barrier, arrivals at each other's mbarriers, copies to several of them.
#pragma once

#include "emulation/tma.h"

namespace nemo {

inline int cluster_rank() { return emulated::machine().block->rank; }
inline void cluster_arrive() { emulated::machine().arrive_in_cluster(); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulated::machine().wait_for_cluster(); }
inline void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
    auto& m = emulated::machine();
    auto& target = m.peer(rank, "mbarrier_arrive_at");
    if (&target == m.block) return mbarrier_arrive(barrier);
    m.arrive_at(target, barrier);
}

inline void tma_load_2d_multicast(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1, uint16_t blocks, Keep = Keep::NORMAL) {
    auto& m = emulated::machine();
    if (map->spec.rank != 2) m.fail("tma_load_2d_multicast of a tensor map of rank 3");
    if (!blocks || blocks >> m.block->cluster->blocks.size()) m.fail(text("a multicast to the blocks ", blocks, " of a cluster of ", m.block->cluster->blocks.size()));
    emulated::load_box(to, map, barrier, {c0, c1, 0}, blocks);
}

}  // namespace nemo
