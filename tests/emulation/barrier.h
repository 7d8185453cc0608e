// Barriers, mbarriers, dependent launch.
#pragma once

#include "emulation/memory.h"

namespace nemo {

inline void block_sync() { emulated::machine().arrive_all(); }
inline void named_barrier_sync(int id, int threads) { emulated::machine().arrive(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulated::machine().arrive(id, threads, false); }

inline void fence_async_proxy() {
    auto& m = emulated::machine();
    m.block->races.fence(m.current->thread);
}

inline void fence_async_proxy_global() {
    auto& m = emulated::machine();
    m.global.fence_async_proxy(m.block->races, m.block->number, m.current->thread);
}

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
    auto& m = emulated::machine();
    if (arrivals < 1) m.fail(text("mbarrier_init with ", arrivals, " arrivals"));
    auto address = m.address_of_shared(barrier, 8, "mbarrier_init");
    auto& state = m.block->phase_barriers[address];
    if (!state.queue.fibers.empty()) m.fail("mbarrier_init while threads wait at it");
    state = emulated::PhaseBarrier{};
    state.expected = state.pending = arrivals;
    state.slot = m.block->races.new_barrier();
    barrier->state = 0;
}
inline void mbarrier_init_fence() { fence_async_proxy(); }
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    auto& m = emulated::machine();
    m.arrive(m.phase_barrier(barrier), bytes);
}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_arrive_after_copies(Mbarrier* barrier) {
    auto& m = emulated::machine();
    auto& state = m.phase_barrier(barrier);
    auto copies = m.current->open_copies;
    for (auto& group : m.current->copy_groups) copies.insert(copies.end(), group.begin(), group.end());
    m.block->races.release(m.current->thread, state.arrived);
    for (auto& copy : copies)  // who sees the phase complete may read them
        m.block->races.finish_copy(copy->copied, {state.phase + 1, uint16_t(state.slot), 15, emulated::Kind::ASYNC});
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [&m, &state, copies] {
        for (auto& copy : copies) m.perform(copy);
        state.pending--;
        m.complete(state);
    };
    m.submit(work);
}
inline bool mbarrier_test(Mbarrier* barrier, uint32_t parity) {
    auto& m = emulated::machine();
    bool is_complete = m.has_observed(m.phase_barrier(barrier), parity);
    if (!is_complete) m.yield();  // a thread that polls lets the others run
    return is_complete;
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
    auto& m = emulated::machine();
    auto& state = m.phase_barrier(barrier);
    while (!m.has_observed(state, parity)) m.wait(state.queue, "mbarrier_wait");
    m.maybe_yield();
}

inline void wait_for_previous_kernel() {
    auto& m = emulated::machine();
    m.current->has_waited = m.block->has_waited = true;
}
inline void let_next_kernel_start() {}

namespace emulated {

inline void set_registers(const char* primitive, int count, bool is_more) {
    machine().meet(primitive, nullptr, [=](void**) {
        Warp& warp = machine().warp();
        if (is_more ? count < warp.registers : count > warp.registers)
            machine().fail(text(primitive, " to ", count, " of a warp that has ", warp.registers));
        warp.registers = count;
        warp.has_asked = true;
    });
}

}  // namespace emulated

template <int COUNT>
void give_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulated::set_registers("give_registers", COUNT, false);
}
template <int COUNT>
void take_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulated::set_registers("take_registers", COUNT, true);
}

}  // namespace nemo
