// The copy engine: boxes are copied some time after they are asked for.
#pragma once

#include "emulation/barrier.h"

namespace nemo {

struct TensorMap {
    const unsigned char* base;
    TensorMapSpec spec;
};

namespace emulated {

inline int element_bytes(Element element) { return element == Element::U8 ? 1 : element == Element::BF16 ? 2 : 4; }

// Where byte `offset` of a box lies from the start of an aligned box.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    uint32_t bits = swizzle == Swizzle::B128 ? 7 : swizzle == Swizzle::B64 ? 3 : swizzle == Swizzle::B32 ? 1 : 0;
    return address ^ (((address >> 7) & bits) << 4);
}

// Between a box in shared memory and the tensor; calls copy(byte of shared memory, address or null outside, 16 or fewer bytes).
template <class Copy>
void over_box(const TensorMap& map, uint32_t start, const int (&at)[3], Copy copy) {
    const TensorMapSpec& spec = map.spec;
    int size = element_bytes(spec.element), row_bytes = spec.box[0] * size;
    int planes = spec.rank > 2 ? spec.box[2] : 1;
    for (int plane = 0; plane < planes; plane++) {
        for (int row = 0; row < spec.box[1]; row++) {
            int64_t y = int64_t(at[1]) + row, z = spec.rank > 2 ? int64_t(at[2]) + plane : 0;
            bool is_inside = y >= 0 && y < spec.sizes[1] && z >= 0 && (spec.rank < 3 || z < spec.sizes[2]);
            const unsigned char* line = map.base + y * spec.strides[1] + (spec.rank > 2 ? z * spec.strides[2] : 0);
            for (int byte = 0; byte < row_bytes; byte += size) {
                int64_t x = int64_t(at[0]) + byte / size;
                bool is_there = is_inside && x >= 0 && x < spec.sizes[0];
                uint32_t place = swizzled(start + uint32_t((plane * spec.box[1] + row) * row_bytes + byte), spec.swizzle);
                copy(place, is_there ? line + x * size : nullptr, size);
            }
        }
    }
}

inline int box_bytes(const TensorMapSpec& spec) {
    return element_bytes(spec.element) * spec.box[0] * spec.box[1] * (spec.rank > 2 ? spec.box[2] : 1);
}

inline void check_map(const TensorMap& map, bool is_write) {
    auto& m = machine();
    const auto& spec = map.spec;
    int64_t last = (spec.sizes[0] - 1) * element_bytes(spec.element);
    for (int i = 1; i < spec.rank; i++) last += (spec.sizes[i] - 1) * spec.strides[i];
    m.check_global(map.base, 1, is_write);
    m.check_global(map.base + last + element_bytes(spec.element) - 1, 1, is_write);
}

inline void load_box(void* to, const TensorMap* map, Mbarrier* barrier, const int (&at)[3]) {
    auto& m = machine();
    uint32_t start = m.address_of_shared(to, box_bytes(map->spec), "a TMA load");
    uint32_t alignment = map->spec.swizzle == Swizzle::NONE ? 128 : 1024;
    if (start % alignment) m.fail(text("a TMA load to shared memory that is not ", alignment, "-byte aligned"));
    check_map(*map, false);
    m.phase_barrier(barrier);
    int x = at[0], y = at[1], z = at[2];
    auto work = std::make_shared<Pending>();
    work->perform = [&m, map = *map, barrier, start, x, y, z] {
        const uint64_t zero = 0;
        over_box(map, start, {x, y, z}, [&](uint32_t place, const unsigned char* from, int bytes) {
            m.async_write(m.shared + (place - SHARED_BASE), from ? static_cast<const void*>(from) : &zero, bytes);
        });
        auto& state = m.phase_barrier(barrier);
        state.bytes -= box_bytes(map.spec);
        m.complete(state);
    };
    m.submit(work);
    m.maybe_yield();
}

}  // namespace emulated

TensorMap make_tensor_map(const void* base, const TensorMapSpec& spec);

inline void tma_prefetch_map(const TensorMap*) {}

inline void tma_load_2d(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1, Keep = Keep::NORMAL) {
    if (map->spec.rank != 2) emulated::machine().fail("tma_load_2d of a tensor map of rank 3");
    emulated::load_box(to, map, barrier, {c0, c1, 0});
}
inline void tma_load_3d(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1, int c2, Keep = Keep::NORMAL) {
    if (map->spec.rank != 3) emulated::machine().fail("tma_load_3d of a tensor map of rank 2");
    emulated::load_box(to, map, barrier, {c0, c1, c2});
}
inline void bulk_load(void* to, const void* from, int bytes, Mbarrier* barrier, Keep = Keep::NORMAL) {
    auto& m = emulated::machine();
    m.address_of_shared(to, bytes, "bulk_load");
    if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        m.fail("bulk_load of what is not whole aligned 16 bytes");
    m.check_global(from, bytes, false);
    m.phase_barrier(barrier);
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [&m, to, from, bytes, barrier] {
        m.async_write(static_cast<unsigned char*>(to), from, bytes);
        auto& state = m.phase_barrier(barrier);
        state.bytes -= bytes;
        m.complete(state);
    };
    m.submit(work);
    m.maybe_yield();
}
inline void tma_store_2d(const TensorMap* map, const void* from, int c0, int c1) {
    auto& m = emulated::machine();
    uint32_t start = m.address_of_shared(from, emulated::box_bytes(map->spec), "a TMA store");
    emulated::check_map(*map, true);
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [&m, map = *map, start, c0, c1] {
        emulated::over_box(map, start, {c0, c1, 0}, [&](uint32_t place, const unsigned char* to, int bytes) {
            if (to) std::memcpy(const_cast<unsigned char*>(to), m.async_read(place, bytes), bytes);
        });
    };
    m.submit(work);
    m.current->open_stores.push_back(work);
}
inline void tma_store_commit() {
    auto& fiber = *emulated::machine().current;
    fiber.store_groups.push_back(std::move(fiber.open_stores));
    fiber.open_stores.clear();
}
template <int PENDING>
void tma_store_wait_read() {
    auto& m = emulated::machine();
    auto& groups = m.current->store_groups;
    while (int(groups.size()) > PENDING) {
        for (auto& work : groups.front()) m.perform(work);
        groups.pop_front();
    }
    m.maybe_yield();
}
template <int PENDING>
void tma_store_wait() {
    tma_store_wait_read<PENDING>();
}

}  // namespace nemo
