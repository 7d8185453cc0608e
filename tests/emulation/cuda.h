// The words of CUDA that host C++ lacks, and the indices of the running thread.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
// As on the GPU; and the compiler tells of a store of what a function returns only if the function is inlined.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace nemo::emulated {

// Of the running thread; written by the scheduler when it switches.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

}  // namespace nemo::emulated

#define threadIdx (::nemo::emulated::thread_index)
#define blockIdx (::nemo::emulated::block_index)
#define blockDim (::nemo::emulated::block_size)
#define gridDim (::nemo::emulated::grid_size)
