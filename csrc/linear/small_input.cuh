// The rows of x made in the launch that multiplies them, while its first weights are on their way: norm, gated
// activation or quantisation. Of at most 8 tokens by each block for itself, in shared memory as the tensor cores read
// it; of more by all blocks together, through global memory.
#pragma once

#include <type_traits>

#include "activation/silu_mul.cuh"
#include "linear/linear.h"
#include "norm/rms_norm.cuh"

namespace nemo {

constexpr int FUSED_TOKENS = 8;         // one group of rows of the 128-byte swizzle
constexpr int CHUNK_BYTES = 128;        // of K
constexpr int X_CHUNK_BYTES = FUSED_TOKENS * CHUNK_BYTES;
constexpr int CONSUMER_BARRIER = 1;

struct SmallInput {
    const bf16 *x, *residual, *norm;
    bf16* sum;
    const float* fixed_scale;
    float eps;
    int rows, width;
    int64_t x_stride, residual_stride;
};

// How the consumers' warps share the rows: `per_row` neighbouring warps do one.
struct Share {
    int warps, per_row;
    __device__ __forceinline__ int first_row() const { return warp_index() / per_row; }
    __device__ __forceinline__ int rows_at_once() const { return warps / per_row; }
    __device__ __forceinline__ int first_vector() const { return warp_index() % per_row * 32 + lane_index(); }
    __device__ __forceinline__ int step() const { return per_row * 32; }
};

__device__ __forceinline__ Share share_rows(int rows, int consumers) {
    Share share{consumers / 32, consumers / 32};
    while (share.per_row > 1 && share.warps / share.per_row < rows) share.per_row /= 2;
    return share;
}

// Vector `index` of row `row` before the norm.
__device__ __forceinline__ Pairs raw_vector(const SmallInput& p, int row, int index) {
    Pairs x = load(vector_at(p.x + row * p.x_stride, index));
    if (p.residual == nullptr) return x;
    return sum_of(x, load(vector_at(p.residual + row * p.residual_stride, index)));
}

// Vector `index` of row `row` of the product's input, before its quantisation.
template <Input INPUT>
__device__ __forceinline__ Pairs input_vector(const SmallInput& p, int row, int index, float inverse) {
    if constexpr (INPUT == Input::NORM) {
        return normalised(raw_vector(p, row, index), load(vector_at(p.norm, index)), inverse);
    } else if constexpr (INPUT == Input::SILU_MUL) {
        const bf16* gate = p.x + row * p.x_stride;
        return silu_mul(load(vector_at(gate, index)), load(vector_at(gate + p.width, index)));
    } else {
        return load(vector_at(p.x + row * p.x_stride, index));
    }
}

// Where vector `index` of a row lies: rows of 128 bytes in groups of 8, chunks of 16 bytes swizzled.
template <class W>
__device__ __forceinline__ unsigned char* place_of(unsigned char* x, int row, int index) {
    constexpr int BYTES = VECTOR * sizeof(W), VECTORS = CHUNK_BYTES / BYTES;
    int byte = index % VECTORS * BYTES;
    return x + index / VECTORS * X_CHUNK_BYTES + row * CHUNK_BYTES + ((byte & ~15) ^ (row << 4)) + (byte & 15);
}

// One over the root of the mean square of this warp's row. `scratch`: a word per warp, used again only after a barrier.
__device__ __forceinline__ float inverse_root(const SmallInput& p, const Share& share, int row, float* scratch) {
    float squares = 0;
    if (row < p.rows) {
#pragma unroll 4
        for (int i = share.first_vector(); i < p.width / VECTOR; i += share.step()) {
            squares = squares_of(raw_vector(p, row, i), squares);
        }
    }
    squares = warp_sum(squares);
    if (lane_index() == 0) scratch[warp_index()] = squares;
    named_barrier_sync(CONSUMER_BARRIER, share.warps * 32);
    squares = 0;
    int first = warp_index() / share.per_row * share.per_row;
    for (int i = 0; i < share.per_row; i++) squares = add(squares, scratch[first + i]);
    return rsqrt_fast(add(divide(squares, float(p.width)), p.eps));
}

template <Input INPUT>
__device__ __forceinline__ Scale scale_of_row(
    const SmallInput& p, const Share& share, int row, float inverse, uint32_t* scratch) {
    uint32_t largest = 0;
    if (row < p.rows) {
#pragma unroll 4
        for (int i = share.first_vector(); i < p.width / VECTOR; i += share.step()) {
            largest = largest_magnitude(input_vector<INPUT>(p, row, i, inverse), largest);
        }
    }
    largest = warp_max(largest);
    if (lane_index() == 0) scratch[warp_index()] = largest;
    named_barrier_sync(CONSUMER_BARRIER, share.warps * 32);
    largest = 0;
    int first = warp_index() / share.per_row * share.per_row;
    for (int i = 0; i < share.per_row; i++) largest = maximum(largest, scratch[first + i]);
    return scale_of(largest, p.fixed_scale);
}

// Whether the input may be made in parts of K: it has no number of the whole row, a mean square or a scale.
template <class W, Input INPUT>
__host__ __device__ constexpr bool can_make_parts() {
    return INPUT == Input::SILU_MUL && !std::is_same_v<W, fp8>;
}

// Makes the vectors first .. end - 1 of a row, 0 beyond the width, for put(index, vector), and returns the row's scale.
// A sum with the residual is stored where stores_sum(index). By all consumers; rows beyond the last have none.
// `scratch`: two words per warp, used again only after a barrier.
template <class W, Input INPUT, class StoresSum, class Put>
__device__ __forceinline__ float make_row(const SmallInput& p, const Share& share, int row, int first, int end,
                                          float* scratch, StoresSum stores_sum, Put put) {
    constexpr bool IS_FP8 = std::is_same_v<W, fp8>;
    float inverse = 0;
    Scale scale{};
    if constexpr (INPUT == Input::NORM) inverse = inverse_root(p, share, row, scratch);
    if constexpr (IS_FP8) {
        scale = scale_of_row<INPUT>(p, share, row, inverse, reinterpret_cast<uint32_t*>(scratch) + share.warps);
    }
    if (row >= p.rows) return 0;
#pragma unroll 4
    for (int i = first + share.first_vector(); i < end; i += share.step()) {
        bool is_inside = i * VECTOR < p.width;
        Pairs vector{};
        if (is_inside) {
            vector = input_vector<INPUT>(p, row, i, inverse);
            if (INPUT == Input::NORM && p.residual != nullptr && stores_sum(i)) {
                store(vector_at(p.sum + int64_t(row) * p.width, i), raw_vector(p, row, i));
            }
        }
        if constexpr (IS_FP8) {
            put(i, is_inside ? quantize(vector, scale) : Vec<uint16_t, 4>{});
        } else {
            put(i, vector);
        }
    }
    return scale.value;
}

// ---- by each block for itself

// Fills x (`chunks` of 128 bytes of K from `first_chunk` on, 0 beyond the width) and of FP8 the scales of the rows. By
// all consumers; they may multiply after it.
template <class W, Input INPUT>
__device__ __forceinline__ void make_input(
    unsigned char* x, float* scales, float* scratch, const SmallInput& p, int first_chunk, int chunks, int consumers) {
    Share share = share_rows(p.rows, consumers);
    constexpr int CHUNK_VECTORS = CHUNK_BYTES / (VECTOR * int(sizeof(W)));
    int first = first_chunk * CHUNK_VECTORS;
    for (int base = 0; base < p.rows; base += share.rows_at_once()) {
        int row = base + share.first_row();
        float scale = make_row<W, INPUT>(
            p, share, row, first, first + chunks * CHUNK_VECTORS, scratch,
            [](int i) { return i % int(gridDim.x) == int(blockIdx.x); },
            [&](int i, const auto& vector) {
                *reinterpret_cast<std::remove_cvref_t<decltype(vector)>*>(place_of<W>(x, row, i - first)) = vector;
            });
        if (std::is_same_v<W, fp8> && row < p.rows && share.first_vector() == 0) scales[row] = scale;
        named_barrier_sync(CONSUMER_BARRIER, consumers);  // the scratch is free again
    }
    fence_async_proxy();
    named_barrier_sync(CONSUMER_BARRIER, consumers);
}

// ---- by all blocks together

// Rows that the blocks of a launch make for one another, in global memory, where the copy engine then finds them. A
// block takes a row as long as there are any: it waits for blocks that run and for no others, so that it does not
// matter how many run at once.
struct SharedInput {
    void* x;        // of the weight's type, dense; null where the input is there, or each block makes its own
    float* scales;  // of FP8: one a row
    int* counts;    // rows taken; rows made, and after them the blocks that have seen so. The last of these leaves 0
    Input input;
};

template <class W, Input INPUT>
__device__ __forceinline__ void make_shared_row(
    const SharedInput& to, const SmallInput& p, int row, float* scratch, int consumers) {
    W* x = static_cast<W*>(to.x) + int64_t(row) * p.width;
    float scale = make_row<W, INPUT>(
        p, {consumers / 32, consumers / 32}, row, 0, p.width / VECTOR, scratch, [](int) { return true; },
        [&](int i, const auto& vector) { store(vector_at(x, i), vector); });
    if (std::is_same_v<W, fp8> && threadIdx.x == 0) store(to.scales + row, scale);
}

// By all consumers, which may read the scales after it. `taken`: a word of shared memory; `made`: of one arrival, after
// which the copy engine may read x.
template <class W>
__device__ __forceinline__ void make_shared_input(
    const SharedInput& to, const SmallInput& p, int* taken, Mbarrier* made, float* scratch, int consumers) {
    int *rows_taken = to.counts, *rows_made = to.counts + 1;
    for (;;) {
        if (threadIdx.x == 0) *taken = atomic_add(rows_taken, 1);
        named_barrier_sync(CONSUMER_BARRIER, consumers);
        int row = *taken;
        if (row >= p.rows) break;
        if (to.input == Input::NORM) {
            make_shared_row<W, Input::NORM>(to, p, row, scratch, consumers);
        } else if (to.input == Input::SILU_MUL) {
            make_shared_row<W, Input::SILU_MUL>(to, p, row, scratch, consumers);
        } else if constexpr (std::is_same_v<W, fp8>) {
            make_shared_row<W, Input::QUANTIZE>(to, p, row, scratch, consumers);
        }
        fence_async_proxy_global();
        named_barrier_sync(CONSUMER_BARRIER, consumers);  // all of the row is there, and the scratch is free again
        if (threadIdx.x == 0) atomic_add_ordered(rows_made, 1);
    }
    if (threadIdx.x == 0) {
        while (load_acquire(rows_made) < p.rows) {
        }
        mbarrier_arrive(made);
        if (atomic_add_ordered(rows_made, 1) == p.rows + int(gridDim.x) - 1) {  // all have taken their last, and seen
            store(rows_taken, 0);
            store(rows_made, 0);
        }
    }
    named_barrier_sync(CONSUMER_BARRIER, consumers);  // all know what the first has seen
}

}  // namespace nemo
