// The copy engine: boxes are copied some time after they are asked for.
#pragma once

#include <algorithm>

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
            for (int byte = 0; byte < row_bytes; byte += 16) {
                int64_t x = int64_t(at[0]) + byte / size;
                uint32_t place = swizzled(start + uint32_t((plane * spec.box[1] + row) * row_bytes + byte), spec.swizzle);
                if (is_inside && x >= 0 && x + 16 / size <= spec.sizes[0]) {
                    copy(place, line + x * size, 16);
                    continue;
                }
                for (int i = 0; i < 16; i += size, x++)
                    copy(place + i, is_inside && x >= 0 && x < spec.sizes[0] ? line + x * size : nullptr, size);
            }
        }
    }
}

inline int box_bytes(const TensorMapSpec& spec) {
    return element_bytes(spec.element) * spec.box[0] * spec.box[1] * (spec.rank > 2 ? spec.box[2] : 1);
}

// What an instruction refuses, and what the box touches of the tensor: each of its rows.
inline uint32_t check_box(const char* what, const void* shared, const TensorMap& map, const int (&at)[3], bool is_write) {
    auto& m = machine();
    const auto& spec = map.spec;
    uint32_t start = m.address_of_shared(shared, box_bytes(spec), what);
    uint32_t alignment = spec.swizzle == Swizzle::B128 ? 1024 : spec.swizzle == Swizzle::B64 ? 512 : spec.swizzle == Swizzle::B32 ? 256 : 128;
    if (start % alignment) m.fail(text(what, " of shared memory that is not ", alignment, "-byte aligned"));
    int size = element_bytes(spec.element), widest = spec.swizzle == Swizzle::NONE ? 1024 : int(alignment / 8);
    for (int i = 0; i < spec.rank; i++)
        if (spec.box[i] < 1 || spec.box[i] > 256) m.fail(text(what, " of a box of ", spec.box[i], " elements in dimension ", i));
    if (spec.box[0] * size % 16 || spec.box[0] * size > widest) m.fail(text(what, " of a box whose rows have ", spec.box[0] * size, " bytes"));
    int64_t first = std::max<int64_t>(at[0], 0), last = std::min<int64_t>(int64_t(at[0]) + spec.box[0], spec.sizes[0]) - 1;
    for (int plane = 0; plane < (spec.rank > 2 ? spec.box[2] : 1); plane++) {
        for (int row = 0; row < spec.box[1] && first <= last; row++) {
            int64_t y = int64_t(at[1]) + row, z = spec.rank > 2 ? int64_t(at[2]) + plane : 0;
            if (y < 0 || y >= spec.sizes[1] || z < 0 || (spec.rank > 2 && z >= spec.sizes[2])) continue;
            const unsigned char* line = map.base + y * spec.strides[1] + (spec.rank > 2 ? z * spec.strides[2] : 0);
            m.check_global(line + first * size, 1, is_write);
            m.check_global(line + (last + 1) * size - 1, 1, is_write);
            m.counter.copy(line + first * size, (last - first + 1) * size, is_write);
            if (!is_write) m.global.copy(m.block->races, m.block->foreign, m.block->number, m.current->thread, line + first * size, (last - first + 1) * size);
        }
    }
    return start;
}

// The copy engine writes `bytes` bytes of a block from `to` on, and tells its barrier, when `write` runs.
template <class Write>
void submit_load(Block& target, void* to, int bytes, Mbarrier* barrier, Write write) {
    auto& m = machine();
    auto& state = m.phase_barrier(target, barrier);
    if (&target != m.block) target.landings[state.slot] = state.phase + 1;
    target.races.load_box(m.visitor_of(target), m.offset_of(to), bytes, state.slot, state.phase);
    auto work = std::make_shared<Pending>();
    work->perform = [&m, &state, bytes, write] {
        write();
        state.bytes -= bytes;
        m.complete(state);
    };
    m.submit(work, target);
    m.maybe_yield();
}

// To the blocks of the cluster whose bits are set; 0 for this one.
inline void load_box(void* to, const TensorMap* map, Mbarrier* barrier, const int (&at)[3], unsigned blocks = 0) {
    auto& m = machine();
    uint32_t start = check_box("a TMA load", to, *map, at, false);
    int x = at[0], y = at[1], z = at[2];
    if (!blocks) blocks = 1u << m.block->rank;
    for (int rank = 0; blocks >> rank; rank++) {
        if (!(blocks >> rank & 1)) continue;
        Block& target = m.peer(rank, "a TMA load");
        submit_load(target, to, box_bytes(map->spec), barrier, [shared = target.shared, map = *map, start, x, y, z] {
            const uint64_t zero = 0;
            over_box(map, start, {x, y, z}, [&](uint32_t place, const unsigned char* from, int bytes) {
                std::memcpy(shared + (place - SHARED_BASE), from ? static_cast<const void*>(from) : &zero, bytes);
            });
        });
    }
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
    m.counter.copy(from, bytes, false);
    emulated::submit_load(*m.block, to, bytes, barrier, [to, from, bytes] { std::memcpy(to, from, bytes); });
}
inline void tma_store_2d(const TensorMap* map, const void* from, int c0, int c1) {
    auto& m = emulated::machine();
    auto& fiber = *m.current;
    uint32_t start = emulated::check_box("a TMA store", from, *map, {c0, c1, 0}, true);
    if (fiber.reader < 0) fiber.reader = m.block->races.new_reader();
    m.block->races.store_box(fiber.thread, m.offset_of(from), emulated::box_bytes(map->spec), fiber.reader, fiber.stores_committed + 1);
    auto work = std::make_shared<emulated::Pending>();
    work->perform = [&m, map = *map, start, c0, c1] {
        emulated::over_box(map, start, {c0, c1, 0}, [&](uint32_t place, const unsigned char* to, int bytes) {
            if (to) std::memcpy(const_cast<unsigned char*>(to), m.async_place(place, bytes), bytes);
        });
    };
    m.submit(work);
    m.current->open_stores.push_back(work);
}
inline void tma_store_commit() {
    auto& fiber = *emulated::machine().current;
    fiber.store_groups.push_back(std::move(fiber.open_stores));
    fiber.stores_committed++;
    fiber.open_stores.clear();
}
template <int PENDING>
void tma_store_wait_read() {
    auto& m = emulated::machine();
    auto& groups = m.current->store_groups;
    while (int(groups.size()) > PENDING) {
        for (auto& work : groups.front()) m.perform(work);
        groups.pop_front();
        m.block->races.learn(m.current->thread, m.current->reader, ++m.current->stores_read);
    }
    m.maybe_yield();
}
template <int PENDING>
void tma_store_wait() {
    tma_store_wait_read<PENDING>();
}

}  // namespace nemo
