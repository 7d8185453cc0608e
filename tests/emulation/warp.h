// Warp primitives: the 32 lanes meet, the last computes for all.
#pragma once

#include <numeric>

#include "emulation/machine.h"

namespace nemo {

inline int lane_index() { return threadIdx.x & 31; }
inline int warp_index() { return threadIdx.x >> 5; }

namespace emulated {

template <class T>
struct Shuffle {
    T mine, result;
    int from;  // a lane
};

template <class T>
T shuffle_from(const char* primitive, T x, int lane) {
    Shuffle<T> slot{x, x, lane};
    machine().meet(primitive, &slot, [](void** slots) {
        for (int i = 0; i < 32; i++) {
            auto* to = static_cast<Shuffle<T>*>(slots[i]);
            to->result = static_cast<Shuffle<T>*>(slots[to->from & 31])->mine;
        }
    });
    return slot.result;
}

}  // namespace emulated

template <class T>
T shuffle(T x, int lane) {
    return emulated::shuffle_from("shuffle", x, lane);
}
template <class T>
T shuffle_xor(T x, int mask) {
    return emulated::shuffle_from("shuffle_xor", x, lane_index() ^ mask);
}
template <class T>
T shuffle_up(T x, int by) {
    return emulated::shuffle_from("shuffle_up", x, lane_index() >= by ? lane_index() - by : lane_index());
}
inline uint32_t ballot(bool is_so) {
    struct {
        bool mine;
        uint32_t result;
    } slot{is_so, 0};
    using Slot = decltype(slot);
    emulated::machine().meet("ballot", &slot, [](void** slots) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; i++) bits |= uint32_t(static_cast<Slot*>(slots[i])->mine) << i;
        for (int i = 0; i < 32; i++) static_cast<Slot*>(slots[i])->result = bits;
    });
    return slot.result;
}
inline void warp_sync() {
    emulated::machine().meet("warp_sync", nullptr, [](void**) {  // of all, the one that orders memory
        auto& m = emulated::machine();
        std::vector<int> lanes(32);
        std::iota(lanes.begin(), lanes.end(), m.current->thread / 32 * 32);
        m.block->races.meet(lanes, {});
    });
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }

}  // namespace nemo
