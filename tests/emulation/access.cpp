// What the compiler calls at every load and store of the kernels, which are compiled with -fsanitize=thread; no sanitizer is
// linked. Only accesses to the shared memory of the running block are looked at.
#include <cstddef>
#include <cstdint>

#include "emulation/machine.h"

namespace {

inline __attribute__((always_inline)) void told(const void* address, size_t bytes, bool is_write) {
    using namespace nemo::emulated;
    uintptr_t offset = reinterpret_cast<uintptr_t>(address) - tracked_begin;
    if (offset >= tracked_bytes) return;
    Machine& m = machine();
    int inside = int(std::min<size_t>(bytes, tracked_bytes - offset));
    m.counter.access_shared(m.block->number, m.current->thread, __builtin_return_address(0), uint32_t(offset), inside);
    m.block->races.access(m.current->thread, uint32_t(offset), inside, is_write);
}

}  // namespace

#define TOLD extern "C" __attribute__((visibility("hidden"))) void
#define TOLD_OF(n)                                                                  \
    TOLD __tsan_read##n(void* address) { told(address, n, false); }                \
    TOLD __tsan_write##n(void* address) { told(address, n, true); }                \
    TOLD __tsan_unaligned_read##n(void* address) { told(address, n, false); }      \
    TOLD __tsan_unaligned_write##n(void* address) { told(address, n, true); }
TOLD_OF(1)
TOLD_OF(2)
TOLD_OF(4)
TOLD_OF(8)
TOLD_OF(16)
TOLD __tsan_read_range(void* address, size_t bytes) { told(address, bytes, false); }
TOLD __tsan_write_range(void* address, size_t bytes) { told(address, bytes, true); }
TOLD __tsan_func_entry(void*) {}
TOLD __tsan_func_exit() {}
TOLD __tsan_init() {}
TOLD __tsan_vptr_update(void**, void*) {}
TOLD __tsan_vptr_read(void**) {}

// Atomics of the emulation itself (reference counts, guards): done as they stand there.
#define ATOMIC(bits, Type)                                                                                                        \
    extern "C" __attribute__((visibility("hidden"))) Type __tsan_atomic##bits##_load(const volatile Type* at, int) {               \
        return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                                             \
    }                                                                                                                             \
    TOLD __tsan_atomic##bits##_store(volatile Type* at, Type value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); }        \
    extern "C" __attribute__((visibility("hidden"))) Type __tsan_atomic##bits##_fetch_add(volatile Type* at, Type value, int) {    \
        return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                             \
    extern "C" __attribute__((visibility("hidden"))) Type __tsan_atomic##bits##_fetch_sub(volatile Type* at, Type value, int) {    \
        return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                             \
    extern "C" __attribute__((visibility("hidden"))) int __tsan_atomic##bits##_compare_exchange_strong(                           \
        volatile Type* at, Type* expected, Type value, int, int) {                                                                \
        return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
    }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
