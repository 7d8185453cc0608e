// Rotary embedding of q and k, and the write of k and v into their pages. Eight lanes, a team, hold a head: a lane has
// 8 elements of its first half and the 8 of its second half that are rotated with them.
#pragma once

#include <type_traits>

#include "common/quantize.cuh"
#include "rope/rope.h"

namespace nemo {

constexpr int ROPE_LANES = ROPE_HEAD_DIM / 2 / VECTOR;
constexpr int ROPE_THREADS = 128;
constexpr int ROPE_TEAMS = ROPE_THREADS / ROPE_LANES;  // of a block

template <class Cached>
struct Rope {
    RopeInputs in;
    Cached *k_cache, *v_cache;
    const float *k_scale, *v_scale;  // or null
    int page_shift;                  // page_size is 2 to this
    int teams_of_token;              // team t has heads t, t + teams_of_token, ... of q, then k, then v
};

struct Halves {
    Pairs first, second;
};

struct Angles {
    float cos[VECTOR], sin[VECTOR];
};

__device__ __forceinline__ Angles load_angles(const float* table, int64_t position, int lane) {
    using Four = Vec<float, 4>;
    const auto* from = reinterpret_cast<const Four*>(table + position * ROPE_HEAD_DIM + lane * VECTOR);
    constexpr int TO_SINES = ROPE_HEAD_DIM / 2 / 4;
    Four parts[4] = {load(from), load(from + 1), load(from + TO_SINES), load(from + TO_SINES + 1)};
    Angles angles;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        angles.cos[i] = parts[i / 4][i % 4];
        angles.sin[i] = parts[2 + i / 4][i % 4];
    }
    return angles;
}

// The first product is rounded, the second is not: as the definition has it.
__device__ __forceinline__ Halves rotated(const Halves& x, const Angles& angles) {
    Halves y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float first[2] = {low_bf16(x.first[i]), high_bf16(x.first[i])};
        float second[2] = {low_bf16(x.second[i]), high_bf16(x.second[i])};
        float turned_first[2], turned_second[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float cos = angles.cos[2 * i + j], sin = angles.sin[2 * i + j];
            turned_first[j] = multiply_add(-second[j], sin, multiply(first[j], cos));
            turned_second[j] = multiply_add(first[j], sin, multiply(second[j], cos));
        }
        y.first[i] = pack_bf16(turned_first[0], turned_first[1]);
        y.second[i] = pack_bf16(turned_second[0], turned_second[1]);
    }
    return y;
}

// Where a head begins, for this token: head h is one of q, then of k, then of v.
template <class Cached>
__device__ __forceinline__ const bf16* source_of(const Rope<Cached>& p, int64_t token, int head) {
    int kv_head = head - p.in.num_heads;
    if (kv_head < 0) return p.in.q + token * p.in.q_stride + head * ROPE_HEAD_DIM;
    if (kv_head < p.in.num_kv_heads) return p.in.k + token * p.in.k_stride + kv_head * ROPE_HEAD_DIM;
    return p.in.v + token * p.in.v_stride + (kv_head - p.in.num_kv_heads) * ROPE_HEAD_DIM;
}

// The scale of a head of k or v, 1 without one.
template <class Cached>
__device__ __forceinline__ float scale_of_head(const Rope<Cached>& p, int head) {
    int kv_head = head - p.in.num_heads;
    if (kv_head < 0) return 1.0f;
    bool is_k = kv_head < p.in.num_kv_heads;
    const float* scales = is_k ? p.k_scale : p.v_scale;
    return scales == nullptr ? 1.0f : load(scales + (is_k ? kv_head : kv_head - p.in.num_kv_heads));
}

__device__ __forceinline__ void store_halves(bf16* row, int lane, const Halves& x, float) {
    store(vector_at(row, lane), x.first);
    store(vector_at(row, lane + ROPE_LANES), x.second);
}
__device__ __forceinline__ void store_halves(fp8* row, int lane, const Halves& x, float scale_value) {
    Scale scale = make_scale(scale_value);
    store(vector_at(row, lane), quantize(x.first, scale));
    store(vector_at(row, lane + ROPE_LANES), quantize(x.second, scale));
}

// Rotates what is to be rotated, and writes a head of q to its row, one of k or v to its place in the cache.
template <class Cached>
__device__ __forceinline__ void finish_head(const Rope<Cached>& p, const Halves& x, const Angles& angles, int64_t token,
                                            int64_t slot, int head, int lane, float scale) {
    int kv_head = head - p.in.num_heads;
    if (kv_head < 0) {
        bf16* row = p.in.q_out + (token * p.in.num_heads + head) * ROPE_HEAD_DIM;
        return store_halves(row, lane, rotated(x, angles), 1.0f);
    }
    bool is_k = kv_head < p.in.num_kv_heads;
    if (!is_k) kv_head -= p.in.num_kv_heads;
    int64_t page = slot >> p.page_shift, offset = slot & (p.in.page_size - 1);
    int64_t row = (page * p.in.num_kv_heads + kv_head) * p.in.page_size + offset;
    store_halves((is_k ? p.k_cache : p.v_cache) + row * ROPE_HEAD_DIM, lane, is_k ? rotated(x, angles) : x, scale);
}

template <int HEADS, class Cached>
__global__ void __launch_bounds__(ROPE_THREADS) rope_kernel(const Rope<Cached> p) {
    let_next_kernel_start();
    int lane = threadIdx.x % ROPE_LANES;
    int team = blockIdx.x * ROPE_TEAMS + threadIdx.x / ROPE_LANES;
    int64_t token = team / p.teams_of_token;
    int first_head = team % p.teams_of_token, all_heads = p.in.num_heads + 2 * p.in.num_kv_heads;
    bool has_token = token < p.in.tokens;
    Halves x[HEADS];
    float scales[HEADS];
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        int head = first_head + i * p.teams_of_token;
        bool has_scale = std::is_same_v<Cached, fp8> && has_token && head < all_heads;
        scales[i] = has_scale ? scale_of_head(p, head) : 1.0f;
    }
    wait_for_previous_kernel();
    if (!has_token) return;
    int64_t position = load(p.in.positions + token), slot = load(p.in.slot_mapping + token);
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        int head = first_head + i * p.teams_of_token;
        if (head < all_heads) {
            const bf16* from = source_of(p, token, head);
            x[i] = {load_streamed(vector_at(from, lane)), load_streamed(vector_at(from, lane + ROPE_LANES))};
        }
    }
    Angles angles = load_angles(p.in.table, position, lane);
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        int head = first_head + i * p.teams_of_token;
        if (head < all_heads) finish_head(p, x[i], angles, token, slot, head, lane, scales[i]);
    }
}

}  // namespace nemo
