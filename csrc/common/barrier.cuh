// Barriers of a block, mbarriers, and the hand-over from one kernel to the next (programmatic dependent launch).
#pragma once

#include "memory.cuh"

namespace nemo {

// An mbarrier in shared memory; 8-byte aligned, initialised by one thread.
struct alignas(8) Mbarrier {
    uint64_t state;
};

}  // namespace nemo

#ifdef NEMO_EMULATED
#include "emulation/barrier.h"
#else

namespace nemo {

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Named barriers 1 .. 15 of `threads` threads, a multiple of 32. sync waits, arrive does not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary writes to shared memory before it are seen by the copy engine and the tensor cores (wgmma) after it. Each
// writing thread calls it, before the barrier that lets the others read.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same of writes to global memory, which the copy engine reads in this launch: by the writing thread, before it
// lets others know; and by the thread that asks for the copy, once it knows.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A phase completes when `arrivals` have arrived and all expected bytes have come. Then call mbarrier_init_fence, and a
// block barrier before other threads use it.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async_proxy();
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// This thread's cp.async copies so far, once done, arrive (one arrival, to be counted in mbarrier_init).
__device__ __forceinline__ void mbarrier_arrive_after_copies(Mbarrier* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Whether the phase of this parity (0 first, then 1, 0, ...) is complete.
__device__ __forceinline__ bool mbarrier_test(Mbarrier* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
    while (!mbarrier_test(barrier, parity)) {
    }
}

// Programmatic dependent launch. Before wait_for_previous_kernel, a kernel may read only what no kernel writes
// (weights); it writes global memory only after it. Every thread that touches such memory calls it, and every block
// does. let_next_kernel_start: once all blocks have called it or ended, the next kernel's blocks may take free places.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Registers of this warpgroup, a multiple of 8: called by all its 128 threads.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace nemo

#endif
