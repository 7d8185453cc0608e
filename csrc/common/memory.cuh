// Global and shared memory. Device code reads and writes global memory through these functions only, so that
// emulation sees every access; shared memory is dynamic, and is plain C++ objects.
#pragma once

#include "types.cuh"

#ifdef NEMO_EMULATED
#include "emulation/memory.h"
#else

namespace nemo {

// The block's dynamic shared memory, 1024-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Address in the shared window, as instructions and matrix descriptors want it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One aligned element or Vec. `load` for what this kernel or the previous one may have written.
template <class T>
__device__ __forceinline__ T load(const T* from) {
    return *from;
}
template <class T>
__device__ __forceinline__ void store(T* to, const T& value) {
    *to = value;
}

// 16 bytes that are read once by the whole grid: kept out of L1, first to leave L2.
template <class T>
__device__ __forceinline__ T load_streamed(const T* from) {
    static_assert(sizeof(T) == 16);
    union {
        uint32_t words[4];
        T value;
    } u;
    constexpr uint64_t EVICT_FIRST = 0x12F0000000000000ull;  // a cache policy, as createpolicy makes it
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "l"(from), "l"(EVICT_FIRST));
    return u.value;
}

// What another block published with store_release or an atomic.
__device__ __forceinline__ int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(int* to, int value) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Adds and returns what was there before; orders this thread's earlier and later accesses for the whole GPU.
__device__ __forceinline__ int atomic_add_ordered(int* to, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
    return before;
}
// Unordered; to global or shared memory.
template <class T>
__device__ __forceinline__ T atomic_add(T* to, T value) {
    return atomicAdd(to, value);
}
template <class T>
__device__ __forceinline__ T atomic_max(T* to, T value) {
    return atomicMax(to, value);
}
template <class T>
__device__ __forceinline__ T atomic_min(T* to, T value) {
    return atomicMin(to, value);
}
// Writes of this thread before it are seen by the GPU before its writes after it.
__device__ __forceinline__ void fence_global() { __threadfence(); }

// ---- asynchronous copies of 16 bytes (cp.async). `is_valid` false writes zeros and reads nothing.

__device__ __forceinline__ void copy_async(void* to_shared, const void* from, bool is_valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
                 "r"(is_valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups are under way. Other threads' copies need a barrier besides.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Ask for a line of global memory (128 bytes) in L2. Correctness never depends on it.
__device__ __forceinline__ void prefetch_l2(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

}  // namespace nemo

#endif
