// Global memory with its bounds checked, shared memory, and asynchronous copies.
#pragma once

#include "emulation/machine.h"

namespace nemo {

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulated::machine().shared);
}
inline uint32_t shared_address(const void* pointer) {
    return emulated::machine().address_of_shared(pointer, 1, "shared_address");
}

template <class T>
T load(const T* from) {
    emulated::machine().check_global(from, sizeof(T), false);
    return *from;
}
template <class T>
void store(T* to, const T& value) {
    emulated::machine().check_global(to, sizeof(T), true);
    *to = value;
}
template <class T>
T load_streamed(const T* from) {
    static_assert(sizeof(T) == 16);
    return load(from);
}
inline int load_acquire(const int* from) { return load(from); }
inline void store_release(int* to, int value) { store(to, value); }

namespace emulated {

template <class T, class Combine>
T atomic(T* to, T value, Combine combine) {
    auto* byte = reinterpret_cast<unsigned char*>(to);
    bool is_shared = byte >= machine().shared && byte < machine().shared + machine().shared_bytes;
    if (!is_shared) machine().check_global(to, sizeof(T), true);
    T before = *to;
    *to = combine(before, value);
    machine().maybe_yield();
    return before;
}

}  // namespace emulated

template <class T>
T atomic_add(T* to, T value) {
    return emulated::atomic(to, value, [](T a, T b) { return T(a + b); });
}
template <class T>
T atomic_max(T* to, T value) {
    return emulated::atomic(to, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T atomic_min(T* to, T value) {
    return emulated::atomic(to, value, [](T a, T b) { return b < a ? b : a; });
}
inline int atomic_add_ordered(int* to, int value) { return atomic_add(to, value); }
inline void fence_global() {}

inline void copy_async(void* to_shared, const void* from, bool is_valid = true) {
    auto& m = emulated::machine();
    m.address_of_shared(to_shared, 16, "copy_async");
    if (reinterpret_cast<uintptr_t>(to_shared) % 16) m.fail("copy_async to shared memory that is not 16-byte aligned");
    if (is_valid) m.check_global(from, 16, false);
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [=] {
        if (is_valid) {
            std::memcpy(to_shared, from, 16);
        } else {
            std::memset(to_shared, 0, 16);
        }
    };
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
        for (auto& work : groups.front()) m.perform(work);
        groups.pop_front();
    }
    m.maybe_yield();
}
inline void prefetch_l2(const void*) {}

}  // namespace nemo
