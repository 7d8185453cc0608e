// How every kernel is launched: one place for shared memory, dependent launch and errors.
#pragma once

#include "check.h"
#include "cluster.cuh"

namespace nemo {

constexpr int MAX_SHARED_BYTES = 227 * 1024;  // of a block on Hopper

using Stream = uintptr_t;  // a cudaStream_t, as Python hands it over

struct Launch {
    const char* name;  // the kernel's, for errors
    dim3 grid;
    int threads;
    int shared_bytes = 0;  // dynamic
    Stream stream = 0;
    int cluster = 1;           // blocks along x that run together (cluster.cuh); divides the grid's
    bool is_dependent = true;  // may start before the previous kernel ends (the kernel calls wait_for_previous_kernel)
};

// Streaming multiprocessors of the current device.
int num_sms();

// Blocks that need a multiprocessor each and can run at once in clusters of this size: a cluster lies within one of the
// GPU's groups of multiprocessors, so that some may be left over.
int cluster_places(int cluster);

}  // namespace nemo

#ifdef NEMO_EMULATED
#include "emulation/launch.h"
#else

namespace nemo {

// launch({.name = "rms_norm", ...}, kernel<Some>, arguments...). Throws RuntimeError naming the kernel.
template <class... Wanted, class... Given>
void launch(const Launch& how, void (*kernel)(Wanted...), Given&&... given) {
    auto fail = [&](cudaError_t answer) {
        cudaGetLastError();  // not sticky: the next launch starts clean
        throw std::runtime_error(text("launch of ", how.name, ": ", cudaGetErrorName(answer), ", ",
                                      cudaGetErrorString(answer), " (grid ", how.grid.x, "x", how.grid.y, "x",
                                      how.grid.z, " in clusters of ", how.cluster, ", ", how.threads, " threads, ",
                                      how.shared_bytes, " bytes of shared memory)"));
    };
    if (how.shared_bytes > 48 * 1024) {
        cudaError_t answer =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
        if (answer != cudaSuccess) fail(answer);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid;
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(how.stream);
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (how.is_dependent) {
        auto& dependent = attributes[config.numAttrs++];
        dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        dependent.val.programmaticStreamSerializationAllowed = 1;
    }
    if (how.cluster > 1) {
        auto& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {unsigned(how.cluster), 1, 1};
    }
    cudaError_t answer = cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(std::forward<Given>(given))...);
    if (answer != cudaSuccess) fail(answer);
}

}  // namespace nemo

#endif
