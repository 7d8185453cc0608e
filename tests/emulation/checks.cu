// Small kernels that show what the emulation does: raw registers and bytes in and out, and planted mistakes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/launch.h"
#include "common/mma.cuh"

namespace nemo {
namespace {

// ---- matrix products of one warp: a (32, 4), b (32, 2), d (32, 4) as the lanes hold them

enum class Kind { BF16, FP16 };

template <Kind KIND>
__global__ void warp_product(float* d, const uint32_t* a, const uint32_t* b) {
    float d_mine[4];
    uint32_t a_mine[4], b_mine[2];
    int lane = threadIdx.x;
    for (int i = 0; i < 4; i++) d_mine[i] = load(d + lane * 4 + i), a_mine[i] = load(a + lane * 4 + i);
    for (int i = 0; i < 2; i++) b_mine[i] = load(b + lane * 2 + i);
    if constexpr (KIND == Kind::BF16) mma_16x8x16_bf16(d_mine, a_mine, b_mine);
    if constexpr (KIND == Kind::FP16) mma_16x8x16_fp16(d_mine, a_mine, b_mine);
    for (int i = 0; i < 4; i++) store(d + lane * 4 + i, d_mine[i]);
}

// ---- ldmatrix, stmatrix, movmatrix: 512 bytes of shared memory, lane i at byte `offsets[i]`; registers (32, 4)

template <class T>
__device__ void copy_in(void* to, const T* from, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) static_cast<T*>(to)[i] = load(from + i);
    block_sync();
}
template <class T>
__device__ void copy_out(T* to, const void* from, int count) {
    block_sync();
    for (int i = threadIdx.x; i < count; i += blockDim.x) store(to + i, static_cast<const T*>(from)[i]);
}

__global__ void move_matrices(uint32_t* registers, uint32_t* bytes, const int* offsets, int how) {
    auto* shared = shared_memory<unsigned char>();
    copy_in(shared, bytes, 128);
    int lane = threadIdx.x;
    void* row = shared + load(offsets + lane);
    uint32_t four[4], two[2];
    for (int i = 0; i < 4; i++) four[i] = load(registers + lane * 4 + i);
    if (how == 0) load_matrix_x4(four, row);
    if (how == 1) load_matrix_x4_transposed(four, row);
    if (how == 2 || how == 3) {
        if (how == 2) load_matrix_x2(two, row);
        if (how == 3) load_matrix_x2_transposed(two, row);
        four[0] = two[0], four[1] = two[1];
    }
    if (how == 4) store_matrix_x4(row, four);
    if (how == 5) four[0] = transpose_matrix(four[0]);
    for (int i = 0; i < 4; i++) store(registers + lane * 4 + i, four[i]);
    copy_out(bytes, shared, 128);
}

// ---- wgmma: tiles as they lie in shared memory; d (128, N / 2) and a (128, 4) as the threads hold them

enum class Operands { K_MAJOR, N_MAJOR, A_IN_REGISTERS, FP8 };

template <int N, Operands OPERANDS>
__global__ void group_product(float* d, const uint32_t* a, const uint32_t* b, int b_words, int k_step, int keep) {
    auto* shared = shared_memory<unsigned char>();
    constexpr int A_BYTES = 64 * 128;
    if (OPERANDS != Operands::A_IN_REGISTERS) copy_in(shared, a, A_BYTES / 4);
    copy_in(shared + A_BYTES, b, b_words);
    fence_async_proxy();
    block_sync();
    float sum[N / 2];
    uint32_t a_mine[4];
    for (int i = 0; i < N / 2; i++) sum[i] = load(d + threadIdx.x * (N / 2) + i);
    if (OPERANDS == Operands::A_IN_REGISTERS)
        for (int i = 0; i < 4; i++) a_mine[i] = load(a + threadIdx.x * 4 + i);
    wgmma_fence();
    constexpr bool IS_N_MAJOR = OPERANDS == Operands::N_MAJOR || OPERANDS == Operands::A_IN_REGISTERS;
    uint64_t a_matrix = matrix_k_major(shared + 32 * k_step);
    uint64_t b_matrix = IS_N_MAJOR ? matrix_n_major(shared + A_BYTES + 2048 * k_step, 64 * 128)
                                   : matrix_k_major(shared + A_BYTES + 32 * k_step);
    if constexpr (OPERANDS == Operands::FP8) {
        Wgmma<N>::fp8(sum, a_matrix, b_matrix, keep);
    } else if constexpr (OPERANDS == Operands::A_IN_REGISTERS) {
        Wgmma<N>::template bf16<IS_N_MAJOR>(sum, a_mine, b_matrix, keep);
    } else {
        Wgmma<N>::template bf16<IS_N_MAJOR>(sum, a_matrix, b_matrix, keep);
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_registers(sum);
    for (int i = 0; i < N / 2; i++) store(d + threadIdx.x * (N / 2) + i, sum[i]);
}

template <int N>
void run_group_product(float* d, const uint32_t* a, const uint32_t* b, int b_words, int operands, int k_step, int keep) {
    auto run = [&](auto kernel) {
        launch({.name = "group_product", .grid = 1, .threads = 128, .shared_bytes = 64 * 128 + b_words * 4, .is_dependent = false},
               kernel, d, a, b, b_words, k_step, keep);
    };
    if (operands == 0) run(group_product<N, Operands::K_MAJOR>);
    if (operands == 1) run(group_product<N, Operands::N_MAJOR>);
    if (operands == 2) run(group_product<N, Operands::A_IN_REGISTERS>);
    if (operands == 3) run(group_product<N, Operands::FP8>);
}

// ---- the copy engine: a box into shared memory and its bytes out, or the other way (2: not waited for, 3: from 256 bytes on)

__global__ void move_box(const __grid_constant__ TensorMap map, unsigned char* bytes, int count, int rank, int c0, int c1,
                         int c2, int is_store) {
    auto* shared = shared_memory<unsigned char>();
    auto* barrier = reinterpret_cast<Mbarrier*>(shared + count + 256);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    block_sync();
    if (is_store) {
        copy_in(shared, bytes, count);
        fence_async_proxy();
        block_sync();
        if (threadIdx.x == 0) {
            tma_store_2d(&map, shared + (is_store == 3) * 256, c0, c1);
            tma_store_commit();
            if (is_store != 2) tma_store_wait<0>();
        }
        return;
    }
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, count);
        if (rank == 2) tma_load_2d(shared, &map, barrier, c0, c1);
        if (rank == 3) tma_load_3d(shared, &map, barrier, c0, c1, c2);
    }
    mbarrier_wait(barrier, 0);
    copy_out(bytes, shared, count);
}

// ---- planted mistakes: y[i] = x[i] rotated by one within a block of threads, by several ways; `mistake` 0 is right

enum Mistake {
    NONE,
    NO_BARRIER,
    NO_COPY_WAIT,
    NO_PHASE_WAIT,
    NO_PROXY_FENCE,
    NO_PRODUCT_WAIT,
    NO_PRODUCT_FENCE,
    PAST_THE_END,
    MISALIGNED,
    NOT_WRITTEN,
    PAST_SHARED,
    NO_DEPENDENCY_WAIT,
    READ_TOO_EARLY,
    DEADLOCK,
    UNEQUAL_COUNTS,
    LANES_APART,
    WRONG_LANE,
    TOO_MANY_ARRIVALS,
    NO_PHASE_BARRIER,
    WARP_MISSES_BARRIER,
    OVERWRITTEN_EARLY,
    FENCE_BY_ONE,
    TOO_MANY_BYTES,
    TOO_MANY_REGISTERS,
    REGISTERS_TAKEN_BY_LESS,
};

// Through shared memory, by ordinary stores, cp.async or the copy engine.
__global__ void rotate(float* y, const float* x, int mistake, int way) {
    auto* shared = shared_memory<float>();
    int count = blockDim.x, i = threadIdx.x;
    auto* barrier = reinterpret_cast<Mbarrier*>(shared + count);
    if (mistake == READ_TOO_EARLY) shared[i] = load(x + i);
    if (mistake != NO_DEPENDENCY_WAIT) wait_for_previous_kernel();
    if (i == 0 && mistake != NO_PHASE_BARRIER) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    block_sync();
    if (mistake == TOO_MANY_BYTES && i == 0) mbarrier_arrive_expect(barrier, 1 << 20);
    if (mistake == TOO_MANY_REGISTERS) take_registers<256>();
    if (mistake == REGISTERS_TAKEN_BY_LESS) take_registers<24>();
    const float* from = x + blockIdx.x * count;
    if (way == 0 && !(mistake == NOT_WRITTEN && i == 5)) shared[i + (mistake == PAST_SHARED) * 1024] = load(from + i + (mistake == PAST_THE_END));
    if (way == 1) {
        if (i % 4 == 0) copy_async(shared + i, from + i + (mistake == MISALIGNED));
        copy_async_commit();
        if (mistake != NO_COPY_WAIT) copy_async_wait<0>();
    }
    if (way == 2) {
        if (i == 0) {
            mbarrier_arrive_expect(barrier, count * 4);
            if (mistake == TOO_MANY_ARRIVALS) mbarrier_arrive(barrier);
            bulk_load(shared, from, count * 4, barrier);
        }
        if (mistake != NO_PHASE_WAIT) mbarrier_wait(barrier, 0);
    }
    if (mistake == WARP_MISSES_BARRIER && i < 32) return;
    if (mistake == DEADLOCK && i < 32) named_barrier_sync(1, 64);
    if (mistake == UNEQUAL_COUNTS) named_barrier_sync(1, i < 64 ? 64 : 96);
    if (mistake != NO_BARRIER) block_sync();
    if (mistake == LANES_APART) {
        if (i % 2) {
            ballot(true);
        } else {
            warp_sync();
        }
    }
    float value = shared[(i + 1) % count];
    if (mistake == WRONG_LANE) value = shuffle_up(value, 1);
    store(y + blockIdx.x * count + i, value);
}

// d = a a^T of the first 64 bf16 columns, from ordinary writes.
__global__ void square(float* d, const uint32_t* a, int mistake) {
    auto* shared = shared_memory<unsigned char>();
    copy_in(shared, a, 64 * 128 / 4);
    if (mistake != NO_PROXY_FENCE && (mistake != FENCE_BY_ONE || threadIdx.x == 0)) fence_async_proxy();
    block_sync();
    float sum[32];
    for (int i = 0; i < 32; i++) sum[i] = -1.0f;
    if (mistake != NO_PRODUCT_FENCE) wgmma_fence();
    for (int k = 0; k < 4; k++)
        Wgmma<64>::bf16<false>(sum, matrix_k_major(shared + 32 * k), matrix_k_major(shared + 32 * k), k > 0);
    wgmma_commit();
    if (mistake == OVERWRITTEN_EARLY)
        for (int i = threadIdx.x; i < 64 * 128 / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(shared)[i] = 0;
    if (mistake != NO_PRODUCT_WAIT) wgmma_wait<0>();
    for (int i = 0; i < 32; i++) store(d + threadIdx.x * 32 + i, sum[i]);
}

// Blocks of a cluster that each copy a row of 32 numbers to all, in rounds: y (blocks, rounds, 32 * cluster).
enum SharingMistake {
    SHARES_RIGHT,
    NO_FIRST_BARRIER,
    NO_LAST_BARRIER,
    NO_WAIT_FOR_RELEASE,
    RELEASED_TO_ITSELF,
    RELEASED_BEFORE_READ,
    ONE_LEFT_OUT,
    TWO_HALVES,
    NO_SECOND_HALF,
    BEYOND_THE_CLUSTER,
};

__global__ void share(float* y, const __grid_constant__ TensorMap map, int rounds, int cluster, int mistake) {
    auto* shared = shared_memory<float>();
    auto* full = reinterpret_cast<Mbarrier*>(shared + 32 * cluster);
    auto* empty = full + 1;
    int i = threadIdx.x, lane = lane_index(), count = blockDim.x;
    if (i == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, cluster * count / 32);
        mbarrier_init_fence();
    }
    auto meet = [&] {
        cluster_arrive();
        if (mistake == TWO_HALVES) cluster_arrive();
        if (mistake != NO_SECOND_HALF) cluster_wait();
    };
    block_sync();
    if (mistake != NO_FIRST_BARRIER) meet();
    for (int round = 0; round < rounds; round++) {
        if (i == 0) {
            if (round > 0 && mistake != NO_WAIT_FOR_RELEASE) mbarrier_wait(empty, (round - 1) & 1);
            mbarrier_arrive_expect(full, 128 * cluster);
            uint16_t all = (1 << cluster) - 1;
            if (mistake == BEYOND_THE_CLUSTER) all |= 1 << cluster;
            if (mistake == ONE_LEFT_OUT) all &= ~(2 >> cluster_rank());
            tma_load_2d_multicast(shared + 32 * cluster_rank(), &map, full, 0, round * cluster + cluster_rank(), all);
        }
        mbarrier_wait(full, round & 1);
        if (mistake == RELEASED_BEFORE_READ && lane < cluster) mbarrier_arrive_at(empty, lane);
        store(y + (blockIdx.x * rounds + round) * count + i, shared[i]);
        warp_sync();
        if (mistake == RELEASED_TO_ITSELF && lane < cluster) mbarrier_arrive(empty);
        if (mistake != RELEASED_TO_ITSELF && mistake != RELEASED_BEFORE_READ && lane < cluster) mbarrier_arrive_at(empty, lane);
    }
    if (mistake != NO_LAST_BARRIER) meet();
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void register_emulation_checks(pybind11::module_& parent) {
    auto m = parent.def_submodule("checks", "Kernels for tests of the emulation.");
    m.def("warp_product", [](uintptr_t d, uintptr_t a, uintptr_t b, int kind) {
        auto run = [&](auto kernel) {
            launch({.name = "warp_product", .grid = 1, .threads = 32, .is_dependent = false}, kernel, pointer<float>(d),
                   pointer<const uint32_t>(a), pointer<const uint32_t>(b));
        };
        if (kind == 0) run(warp_product<Kind::BF16>);
        if (kind == 1) run(warp_product<Kind::FP16>);
    });
    m.def("move_matrices", [](uintptr_t registers, uintptr_t bytes, uintptr_t offsets, int how) {
        launch({.name = "move_matrices", .grid = 1, .threads = 32, .shared_bytes = 512, .is_dependent = false}, move_matrices,
               pointer<uint32_t>(registers), pointer<uint32_t>(bytes), pointer<const int>(offsets), how);
    });
    m.def("group_product", [](uintptr_t d, uintptr_t a, uintptr_t b, int b_words, int n, int operands, int k_step, int keep) {
        auto run = n == 16 ? run_group_product<16> : n == 48 ? run_group_product<48> : n == 128 ? run_group_product<128> : run_group_product<224>;
        run(pointer<float>(d), pointer<const uint32_t>(a), pointer<const uint32_t>(b), b_words, operands, k_step, keep);
    });
    m.def("move_box", [](uintptr_t base, std::array<int64_t, 3> sizes, std::array<int64_t, 3> strides, std::array<int, 3> box,
                         int rank, int element, int swizzle, uintptr_t bytes, std::array<int, 3> at, int is_store) {
        TensorMapSpec spec{static_cast<Element>(element), rank, {sizes[0], sizes[1], sizes[2]}, {0, strides[1], strides[2]},
                           {box[0], box[1], box[2]}, static_cast<Swizzle>(swizzle)};
        int count = box[0] * box[1] * (rank > 2 ? box[2] : 1) * emulated::element_bytes(spec.element);
        launch({.name = "move_box", .grid = 1, .threads = 64, .shared_bytes = count + 272, .is_dependent = false}, move_box,
               make_tensor_map(pointer<void>(base), spec), pointer<unsigned char>(bytes), count, rank, at[0], at[1], at[2],
               is_store);
    });
    m.def("rotate", [](uintptr_t y, uintptr_t x, int blocks, int threads, int mistake, int way) {
        launch({.name = "rotate", .grid = dim3(blocks), .threads = threads, .shared_bytes = threads * 4 + 16}, rotate,
               pointer<float>(y), pointer<const float>(x), mistake, way);
    });
    m.def("square", [](uintptr_t d, uintptr_t a, int mistake) {
        launch({.name = "square", .grid = 1, .threads = 128, .shared_bytes = 64 * 128, .is_dependent = false}, square,
               pointer<float>(d), pointer<const uint32_t>(a), mistake);
    });
    m.def("share", [](uintptr_t y, uintptr_t x, int blocks, int rounds, int cluster, int mistake) {
        TensorMapSpec spec{Element::F32, 2, {32, rounds * cluster, 1}, {0, 128, 0}, {32, 1, 1}, Swizzle::NONE};
        launch({.name = "share", .grid = dim3(blocks), .threads = 32 * cluster, .shared_bytes = 128 * cluster + 16, .cluster = cluster,
                .is_dependent = false}, share, pointer<float>(y), make_tensor_map(pointer<void>(x), spec), rounds, cluster, mistake);
    });
    m.def("pack_bf16", pack_bf16);
    m.def("pack_fp16", pack_fp16);
    m.def("pack_fp8", pack_fp8);
    m.def("fp16_to_float", fp16_to_float);
    m.def("fp8x2_to_fp16x2", fp8x2_to_fp16x2);
    m.def("permute_bytes", permute_bytes);
    m.def("exp2_fast", exp2_fast);
}

}  // namespace nemo
