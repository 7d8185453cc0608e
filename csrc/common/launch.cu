// The host functions of common/: the device's facts, and tensor maps.
#include "launch.h"

#include <atomic>
#include <utility>

namespace nemo {

constexpr int H100_SMS = 132;  // of an H200 as well

int num_sms() {
    constexpr int MAX_DEVICES = 64;
    static std::atomic<int> counts[MAX_DEVICES];
    int device = 0;
    // Without a device, the launch that follows says so, and names its kernel.
    if (cudaGetDevice(&device) != cudaSuccess || device >= MAX_DEVICES) {
        cudaGetLastError();
        return H100_SMS;
    }
    int count = counts[device].load(std::memory_order_relaxed);
    if (count == 0) {
        CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
        counts[device].store(count, std::memory_order_relaxed);
    }
    return count;
}

namespace {

constexpr int MOST_OF_A_MULTIPROCESSOR = 160 * 1024;  // bytes of shared memory: beside it there is no place for another
__global__ void has_a_multiprocessor() {}

}  // namespace

int cluster_places(int cluster) {
    constexpr int MAX_DEVICES = 64;
    static std::atomic<int> places[MAX_DEVICES][MAX_CLUSTER + 1];
    CHECK_RANGE(cluster, 1, MAX_CLUSTER);
    int device = 0;
    if (cluster == 1 || cudaGetDevice(&device) != cudaSuccess || device >= MAX_DEVICES) {
        cudaGetLastError();
        return num_sms() / cluster * cluster;
    }
    int count = places[device][cluster].load(std::memory_order_relaxed);
    if (count == 0) {
        CHECK_CUDA(cudaFuncSetAttribute(has_a_multiprocessor, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        MOST_OF_A_MULTIPROCESSOR));
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(cluster), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(cluster));
        config.blockDim = dim3(32);
        config.dynamicSmemBytes = MOST_OF_A_MULTIPROCESSOR;
        config.attrs = &attribute;
        config.numAttrs = 1;
        CHECK_CUDA(cudaOccupancyMaxActiveClusters(&count, has_a_multiprocessor, &config));
        count *= cluster;
        places[device][cluster].store(count, std::memory_order_relaxed);
    }
    return count;
}

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that is loaded, so that nothing links against libcuda.
Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
        throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled: CUDA 12.0 or later is needed");
    return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType data_type(Element element) {
    switch (element) {
        case Element::U8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
        case Element::BF16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

CUtensorMapSwizzle swizzle_mode(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::B32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::B64: return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::B128: return CU_TENSOR_MAP_SWIZZLE_128B;
        default: return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

}  // namespace

TensorMap make_tensor_map(const void* base, const TensorMapSpec& spec) {
    static const Encode encode = find_encode();
    cuuint64_t sizes[3], strides[2];
    cuuint32_t box[3], steps[3] = {1, 1, 1};
    for (int i = 0; i < spec.rank; i++) {
        sizes[i] = spec.sizes[i];
        box[i] = spec.box[i];
        if (i > 0) strides[i - 1] = spec.strides[i];
    }
    TensorMap made;
    CUresult answer = encode(&made.map, data_type(spec.element), spec.rank, const_cast<void*>(base), sizes, strides,
                             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_mode(spec.swizzle),
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK(answer == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused (", int(answer), ") base ", base, ", sizes ",
          sizes[0], " x ", sizes[1], ", box ", box[0], " x ", box[1]);
    return made;
}

}  // namespace nemo
