// Global memory with its bounds checked, shared memory, and asynchronous copies.
#pragma once

#include "emulation/machine.h"

namespace nemo {

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulated::machine().block->shared);
}
inline uint32_t shared_address(const void* pointer) {
    return emulated::machine().address_of_shared(pointer, 1, "shared_address");
}

template <class T>
__forceinline__ T load(const T* from) {
    emulated::machine().access_global(from, sizeof(T), false);
    return *from;
}
template <class T>
__forceinline__ void store(T* to, const T& value) {
    emulated::machine().access_global(to, sizeof(T), true);
    *to = value;
}
template <class T>
__forceinline__ T load_streamed(const T* from) {
    static_assert(sizeof(T) == 16);
    return load(from);
}

namespace emulated {

enum class Order { RELAXED, ACQUIRE, RELEASE, BOTH };

// change(place) reads and writes the place at once.
template <class T, class Change>
auto atomic(T* to, Order order, bool is_write, Change change) {
    auto& m = machine();
    auto& races = m.block->races;
    auto& foreign = m.block->foreign;
    int thread = m.current->thread;
    if (m.is_shared(to)) {
        races.access(thread, m.offset_of(to), sizeof(T), is_write, true);
    } else {
        m.access_global(to, sizeof(T), is_write, Access::ATOMIC);
        if (order == Order::RELAXED) m.global.relaxed(foreign, thread, to);
        if (order == Order::ACQUIRE || order == Order::BOTH) m.global.acquire(races, foreign, thread, to);
        if (order == Order::RELEASE || order == Order::BOTH) m.global.release(races, foreign, m.block->number, thread, to);
    }
    auto result = [&] {
        Untracked untracked;
        return change(*to);
    }();
    m.maybe_yield();
    return result;
}

template <class T, class Combine>
T atomic_combine(T* to, T value, Order order, Combine combine) {
    return atomic(to, order, true, [&](T& place) {
        T before = place;
        place = combine(before, value);
        return before;
    });
}

}  // namespace emulated

template <class T>
T atomic_add(T* to, T value) {
    return emulated::atomic_combine(to, value, emulated::Order::RELAXED, [](T a, T b) { return T(a + b); });
}
template <class T>
T atomic_max(T* to, T value) {
    return emulated::atomic_combine(to, value, emulated::Order::RELAXED, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T atomic_min(T* to, T value) {
    return emulated::atomic_combine(to, value, emulated::Order::RELAXED, [](T a, T b) { return b < a ? b : a; });
}
inline int atomic_add_ordered(int* to, int value) {
    return emulated::atomic_combine(to, value, emulated::Order::BOTH, [](int a, int b) { return a + b; });
}
inline int load_acquire(const int* from) {
    return emulated::atomic(const_cast<int*>(from), emulated::Order::ACQUIRE, false, [](int& place) { return place; });
}
inline void store_release(int* to, int value) {
    emulated::atomic(to, emulated::Order::RELEASE, true, [=](int& place) { return place = value; });
}
inline void fence_global() {
    auto& m = emulated::machine();
    m.global.fence(m.block->races, m.block->foreign, m.block->number, m.current->thread);
}

inline void copy_async(void* to_shared, const void* from, bool is_valid = true) {
    auto& m = emulated::machine();
    m.address_of_shared(to_shared, 16, "copy_async");
    if (reinterpret_cast<uintptr_t>(to_shared) % 16) m.fail("copy_async to shared memory that is not 16-byte aligned");
    if (is_valid) m.access_global(from, 16, false, emulated::Access::COPY);
    m.block->races.start_copy(m.current->thread, m.offset_of(to_shared));
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [=] {
        if (is_valid) {
            std::memcpy(to_shared, from, 16);
        } else {
            std::memset(to_shared, 0, 16);
        }
    };
    work->copied = int(m.offset_of(to_shared));
    m.submit(work);
    m.current->open_copies.push_back(work);
}
inline void copy_async_commit() {
    auto& fiber = *emulated::machine().current;
    fiber.copy_groups.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
}
template <int PENDING>
void copy_async_wait() {
    auto& m = emulated::machine();
    auto& groups = m.current->copy_groups;
    while (int(groups.size()) > PENDING) {
        for (auto& work : groups.front()) {
            m.perform(work);
            m.block->races.finish_own_copy(m.current->thread, work->copied);
        }
        groups.pop_front();
    }
    m.maybe_yield();
}
inline void prefetch_l2(const void*) {}

}  // namespace nemo
