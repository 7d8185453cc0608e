// What the 32 lanes of a warp do together. Every function is to be called by all lanes of the warp.
#pragma once

#include "types.cuh"

#ifdef NEMO_EMULATED
#include "emulation/warp.h"
#else

namespace nemo {

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
// Uniform over the warp, and known to be so by the compiler.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }

template <class T>
__device__ __forceinline__ T shuffle(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
// From the lane `by` lower; the lowest `by` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T x, int by) {
    return __shfl_up_sync(0xffffffffu, x, by);
}
__device__ __forceinline__ uint32_t ballot(bool is_so) { return __ballot_sync(0xffffffffu, is_so); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
// Position of the lowest set bit; bits must not be 0.
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }

}  // namespace nemo

#endif

namespace nemo {

// Over groups of WIDTH neighbouring lanes; every lane gets the result. The order of additions is fixed.
template <int WIDTH = 32, class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask >>= 1) x = x + shuffle_xor(x, mask);
    return x;
}
template <int WIDTH = 32, class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask >>= 1) x = maximum(x, shuffle_xor(x, mask));
    return x;
}
template <int WIDTH = 32, class T>
__device__ __forceinline__ T warp_min(T x) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask >>= 1) x = minimum(x, shuffle_xor(x, mask));
    return x;
}

}  // namespace nemo
