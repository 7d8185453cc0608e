// Matrix products: a warp's lanes bring their fragments together; a warpgroup's products happen some time after they are asked for.
#pragma once

#include "emulation/memory.h"

namespace nemo {

namespace emulated {

template <class Slot, class Act>
void together(const char* primitive, Slot& mine, Act act) {
    machine().meet(primitive, &mine, [act](void** slots) { act(reinterpret_cast<Slot**>(slots)); });
}

struct MatrixRow {
    const void* row;
    uint32_t* registers;
};

// 8x8 matrices of 16-bit elements between rows in shared memory and registers.
void load_matrices(const char* primitive, MatrixRow mine, int matrices, bool is_transposed);
void store_matrices(const char* primitive, MatrixRow mine, int matrices);

enum class Format { BF16, FP16, FP8 };

struct Fragments {
    float* d;
    const uint32_t *a, *b;
};
void warp_product(const char* primitive, Format format, Fragments mine);

struct GroupFragments {
    float* d;  // N / 2
    const uint32_t* a;  // 4, or null
};
struct GroupProduct {
    const char* primitive;
    Format format;
    int columns;
    bool is_a_in_registers, is_b_n_major;
    uint64_t a, b;
    int keep;
};
void group_product(const GroupProduct& product, GroupFragments& mine);
void wait_for_products(int most);  // of this warp: until at most so many groups are under way

}  // namespace emulated

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    emulated::load_matrices("load_matrix_x4", {row, r}, 4, false);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    emulated::load_matrices("load_matrix_x4_transposed", {row, r}, 4, true);
}
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    emulated::load_matrices("load_matrix_x2", {row, r}, 2, false);
}
inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    emulated::load_matrices("load_matrix_x2_transposed", {row, r}, 2, true);
}
inline void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
    emulated::store_matrices("store_matrix_x4", {row, const_cast<uint32_t*>(r)}, 4);
}
uint32_t transpose_matrix(uint32_t r);

inline void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::warp_product("mma_16x8x16_bf16", emulated::Format::BF16, {d, a, b});
}
inline void mma_16x8x16_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::warp_product("mma_16x8x16_fp16", emulated::Format::FP16, {d, a, b});
}

void wgmma_fence();
void wgmma_commit();
template <int PENDING>
void wgmma_wait() {
    emulated::machine().meet("wgmma_wait", nullptr, [](void**) { emulated::wait_for_products(PENDING); });
}
template <int COUNT>
void keep_in_registers(float (&)[COUNT]) {}
inline void compute_before(float, float*) {}

template <int N>
struct Wgmma {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    template <bool B_IS_N_MAJOR>
    static void bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
        emulated::GroupFragments mine{d, nullptr};
        emulated::group_product({"wgmma of bf16", emulated::Format::BF16, N, false, B_IS_N_MAJOR, a, b, keep}, mine);
    }
    template <bool B_IS_N_MAJOR>
    static void bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
        emulated::GroupFragments mine{d, a};
        emulated::group_product({"wgmma of bf16, A in registers", emulated::Format::BF16, N, true, B_IS_N_MAJOR, 0, b, keep},
                                mine);
    }
    static void fp8(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
        emulated::GroupFragments mine{d, nullptr};
        emulated::group_product({"wgmma of fp8", emulated::Format::FP8, N, false, false, a, b, keep}, mine);
    }
};

}  // namespace nemo
