// Matrix products of a warp (mma.sync, operands in registers) and of a warpgroup (wgmma, operands in shared memory).
//
// Fragments of mma_16x8: with g = lane / 4 and t = lane % 4,
//   c, d (fp32): d[0], d[1] = row g, columns 2t, 2t + 1; d[2], d[3] = row g + 8, the same columns
//   a, 16-bit elements (k = 16): a[0] = row g, k 2t, 2t + 1; a[2] = row g, k 2t + 8, + 9; a[1], a[3] = row g + 8
//   b, 16-bit elements: b[0] = k 2t, 2t + 1 of column g; b[1] = k 2t + 8, 2t + 9
// the lowest index in the lowest bits. Accumulators of wgmma (m64): warp w of the four holds rows 16 w .. 16 w + 15,
// and d[4 j .. 4 j + 3] are the fragment above of columns 8 j .. 8 j + 7. Its A from registers: as a of mma_16x8, per
// warp.
#pragma once

#include "memory.cuh"
#include "warp.cuh"

#ifdef NEMO_EMULATED
#include "emulation/mma.h"
#else

namespace nemo {

// Four (two) 8x8 matrices of 16-bit elements from shared memory. Lane i gives the address of row i % 8 of matrix i / 8
// (16 aligned bytes); r[m] holds elements 2t, 2t + 1 of row g of matrix m. Transposed: of column g.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
// The counterpart of load_matrix_x4 (stmatrix).
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements held as r of load_matrix.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t r) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
    return transposed;
}

#define NEMO_MMA(NAME, SHAPE, TYPES)                                                                                   \
    __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {              \
        asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPES ".f32"                                            \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
// d += a b. There is none of FP8: sm_90 would make two of fp16 of it, beside the conversions; only wgmma has FP8
// products.
NEMO_MMA(mma_16x8x16_bf16, "m16n8k16", "bf16.bf16")
NEMO_MMA(mma_16x8x16_fp16, "m16n8k16", "f16.f16")
#undef NEMO_MMA

// ---- wgmma

// Orders register accesses before it against the products after it; before the first product, and again whenever
// registers of accumulators or of A were touched. All 128 threads of the warpgroup call all of these.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING groups of products are under way. Accumulators must not be touched before.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads of an accumulator above the wait.
template <int COUNT>
__device__ __forceinline__ void keep_in_registers(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// x is computed before what follows in the program, such as a wait for products. The assembler sees nothing in an empty
// asm and would compute x after the wait; a store to `nowhere`, shared memory that nobody reads, needs x first. It
// happens for one NaN only, which arithmetic does not make; a comparison of numbers the assembler decides itself where
// it knows that x >= 0.
__device__ __forceinline__ void compute_before(float x, float* nowhere) {
    asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, %0, 0xFFFFFFFF;\n@p st.shared.b32 [%1], %0;\n}" ::"r"(
                     bits_of_float(x)),
                 "r"(shared_address(nowhere))
                 : "memory");
}

template <int N>
struct Wgmma;

#define NEMO_P0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NEMO_P1 NEMO_P0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NEMO_P2 NEMO_P1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NEMO_P3 NEMO_P2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NEMO_P4 NEMO_P3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NEMO_P5 NEMO_P4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NEMO_P6 NEMO_P5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NEMO_P7 NEMO_P6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NEMO_P8 NEMO_P7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NEMO_P9 NEMO_P8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NEMO_P10 NEMO_P9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NEMO_P11 NEMO_P10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NEMO_P12 NEMO_P11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NEMO_P13 NEMO_P12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NEMO_P14 NEMO_P13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NEMO_P15 NEMO_P14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define NEMO_E4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NEMO_E(i) NEMO_E4(i), NEMO_E4(i + 4)
#define NEMO_D0 NEMO_E(0)
#define NEMO_D1 NEMO_D0, NEMO_E(8)
#define NEMO_D2 NEMO_D1, NEMO_E(16)
#define NEMO_D3 NEMO_D2, NEMO_E(24)
#define NEMO_D4 NEMO_D3, NEMO_E(32)
#define NEMO_D5 NEMO_D4, NEMO_E(40)
#define NEMO_D6 NEMO_D5, NEMO_E(48)
#define NEMO_D7 NEMO_D6, NEMO_E(56)
#define NEMO_D8 NEMO_D7, NEMO_E(64)
#define NEMO_D9 NEMO_D8, NEMO_E(72)
#define NEMO_D10 NEMO_D9, NEMO_E(80)
#define NEMO_D11 NEMO_D10, NEMO_E(88)
#define NEMO_D12 NEMO_D11, NEMO_E(96)
#define NEMO_D13 NEMO_D12, NEMO_E(104)
#define NEMO_D14 NEMO_D13, NEMO_E(112)
#define NEMO_D15 NEMO_D14, NEMO_E(120)

// Of 40 columns, half of eight registers.
#define NEMO_P40 NEMO_P1 ", %16, %17, %18, %19"
#define NEMO_D40 NEMO_D1, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])

// N columns; i0 .. i6 are the numbers that follow those of the accumulators.
#define NEMO_WGMMA(N, P, D, i0, i1, i2, i3, i4, i5, i6)                                                                \
    template <>                                                                                                        \
    struct Wgmma<N> {                                                                                                  \
        template <bool B_IS_N_MAJOR>                                                                                   \
        static __device__ __forceinline__ void bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {             \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2 ", 0;\n"                                              \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" P "}, %" i0 ", %" i1             \
                         ", p, 1, 1, 0, %" i3 ";\n}"                                                                   \
                         : D                                                                                           \
                         : "l"(a), "l"(b), "r"(keep), "n"(int(B_IS_N_MAJOR)));                                         \
        }                                                                                                              \
        template <bool B_IS_N_MAJOR>                                                                                   \
        static __device__ __forceinline__ void bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5 ", 0;\n"                                              \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" P "}, {%" i0 ", %" i1 ", %" i2   \
                         ", %" i3 "}, %" i4 ", p, 1, 1, %" i6 ";\n}"                                          \
                         : D                                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(int(B_IS_N_MAJOR)));     \
        }                                                                                                              \
        static __device__ __forceinline__ void fp8(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {              \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2 ", 0;\n"                                              \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" P "}, %" i0 ", %" i1             \
                         ", p, 1, 1;\n}"                                                                               \
                         : D                                                                                           \
                         : "l"(a), "l"(b), "r"(keep));                                                                 \
        }                                                                                                              \
    };
NEMO_WGMMA(16, NEMO_P0, NEMO_D0, "8", "9", "10", "11", "12", "13", "14")
NEMO_WGMMA(32, NEMO_P1, NEMO_D1, "16", "17", "18", "19", "20", "21", "22")
NEMO_WGMMA(40, NEMO_P40, NEMO_D40, "20", "21", "22", "23", "24", "25", "26")
NEMO_WGMMA(48, NEMO_P2, NEMO_D2, "24", "25", "26", "27", "28", "29", "30")
NEMO_WGMMA(64, NEMO_P3, NEMO_D3, "32", "33", "34", "35", "36", "37", "38")
NEMO_WGMMA(80, NEMO_P4, NEMO_D4, "40", "41", "42", "43", "44", "45", "46")
NEMO_WGMMA(96, NEMO_P5, NEMO_D5, "48", "49", "50", "51", "52", "53", "54")
NEMO_WGMMA(112, NEMO_P6, NEMO_D6, "56", "57", "58", "59", "60", "61", "62")
NEMO_WGMMA(128, NEMO_P7, NEMO_D7, "64", "65", "66", "67", "68", "69", "70")
NEMO_WGMMA(160, NEMO_P9, NEMO_D9, "80", "81", "82", "83", "84", "85", "86")
NEMO_WGMMA(176, NEMO_P10, NEMO_D10, "88", "89", "90", "91", "92", "93", "94")
NEMO_WGMMA(192, NEMO_P11, NEMO_D11, "96", "97", "98", "99", "100", "101", "102")
NEMO_WGMMA(224, NEMO_P13, NEMO_D13, "112", "113", "114", "115", "116", "117", "118")
NEMO_WGMMA(256, NEMO_P15, NEMO_D15, "128", "129", "130", "131", "132", "133", "134")
#undef NEMO_WGMMA
#undef NEMO_E
#undef NEMO_E4

}  // namespace nemo

#endif

namespace nemo {

// A matrix in shared memory as wgmma wants it, with 128-byte swizzle as the copy engine writes it, 1024-byte aligned.
//
// K-major (A, and B with rows of K): each row of the tile is 128 bytes of K (64 bf16, 128 fp8), 8 rows make 1024 bytes.
// The next 16 (32 fp8) of K within those 128 bytes: add 32 bytes to `start`; the next 128 bytes of K are another tile.
// N-major (B of bf16 only): each row is one k with 64 columns; 8 of k make 1024 bytes; the next 16 of k: add 2048
// bytes; columns 64 .. 127 are another tile `bytes_to_next_64` away.
__device__ __forceinline__ uint64_t matrix_k_major(const void* start) {
    uint64_t address = shared_address(start);
    return ((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
__device__ __forceinline__ uint64_t matrix_n_major(const void* start, int bytes_to_next_64) {
    uint64_t address = shared_address(start);
    return ((address & 0x3FFFF) >> 4) | (uint64_t(bytes_to_next_64 >> 4) << 16) | (uint64_t(1024 >> 4) << 32) |
           (uint64_t(1) << 62);
}

}  // namespace nemo
