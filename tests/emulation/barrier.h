// Barriers, mbarriers, dependent launch.
#pragma once

#include "emulation/memory.h"

namespace nemo {

inline void block_sync() {
    auto& m = emulated::machine();
    auto& barrier = m.barriers[0];
    if (++barrier.arrived == m.num_threads - m.num_ended) {
        barrier.arrived = 0;
        m.wake(barrier.queue);
        m.maybe_yield();
    } else {
        m.wait(barrier.queue, "block_sync");
    }
}
inline void named_barrier_sync(int id, int threads) { emulated::machine().arrive(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulated::machine().arrive(id, threads, false); }

inline void fence_async_proxy() { emulated::machine().is_fenced = true; }

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
    auto& m = emulated::machine();
    if (arrivals < 1) m.fail(text("mbarrier_init with ", arrivals, " arrivals"));
    auto address = m.address_of_shared(barrier, 8, "mbarrier_init");
    auto& state = m.phase_barriers[address];
    if (!state.queue.fibers.empty()) m.fail("mbarrier_init while threads wait at it");
    state = emulated::PhaseBarrier{};
    state.expected = state.pending = arrivals;
    barrier->state = 0;
}
inline void mbarrier_init_fence() { fence_async_proxy(); }
inline void mbarrier_arrive(Mbarrier* barrier) {
    auto& m = emulated::machine();
    auto& state = m.phase_barrier(barrier);
    state.pending--;
    m.complete(state);
    m.maybe_yield();
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    auto& m = emulated::machine();
    auto& state = m.phase_barrier(barrier);
    state.bytes += bytes;
    state.pending--;
    m.complete(state);
    m.maybe_yield();
}
inline void mbarrier_arrive_after_copies(Mbarrier* barrier) {
    auto& m = emulated::machine();
    m.phase_barrier(barrier);
    auto copies = m.current->open_copies;
    for (auto& group : m.current->copy_groups) copies.insert(copies.end(), group.begin(), group.end());
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [&m, barrier, copies] {
        for (auto& copy : copies) m.perform(copy);
        auto& state = m.phase_barrier(barrier);
        state.pending--;
        m.complete(state);
    };
    m.submit(work);
}
inline bool mbarrier_test(Mbarrier* barrier, uint32_t parity) {
    auto& m = emulated::machine();
    bool is_complete = (m.phase_barrier(barrier).phase & 1) != (parity & 1);
    if (!is_complete) m.yield();  // a thread that polls lets the others run
    return is_complete;
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
    auto& m = emulated::machine();
    auto& state = m.phase_barrier(barrier);
    while ((state.phase & 1) == (parity & 1)) m.wait(state.queue, "mbarrier_wait");
    m.maybe_yield();
}

inline void wait_for_previous_kernel() {
    auto& m = emulated::machine();
    m.current->has_waited = m.has_block_waited = true;
}
inline void let_next_kernel_start() {}

template <int COUNT>
void give_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulated::machine().meet("give_registers", nullptr, [](void**) {});
}
template <int COUNT>
void take_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulated::machine().meet("take_registers", nullptr, [](void**) {});
}

}  // namespace nemo
