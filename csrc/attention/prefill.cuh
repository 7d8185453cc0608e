// Causal attention of rows with several queries over paged keys and values. A block takes 128 rows of packed queries
// (queries times the heads that share a KV head) over tiles of 128 keys, last tile first: a warp feeds keys and values
// by the copy engine, two warpgroups take 64 rows each, and each has a warp that fetches the queries of its next item
// meanwhile. The blocks stay and take several items of work.
#pragma once

#include <cmath>

#include "attention/prefill.h"
#include "common/barrier.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/rows.cuh"
#include "common/tma.cuh"
#include "common/warp.cuh"

namespace nemo {

constexpr int PREFILL_DIM = 128;
constexpr int PREFILL_ROWS = 128;  // packed queries of an item
constexpr int PREFILL_KEYS = 128;  // of a tile
constexpr int PREFILL_STAGES = 2;
constexpr int PREFILL_ITEMS = 2;  // whose queries are there: one is computed, one comes
constexpr int PREFILL_CONSUMERS = 256;
constexpr int PREFILL_THREADS = 128 + PREFILL_CONSUMERS;
// 40 for the 128 threads that feed, 232 for those that compute: 504 of the 512 that a thread of each may have together.
constexpr int PREFILL_FEED_REGISTERS = 40;
constexpr int PREFILL_COMPUTE_REGISTERS = 232;
// Named barriers. ORDER + w: warpgroup w may issue its products. ROWS + w: among its threads.
constexpr int PREFILL_BARRIER_ORDER = 1;
constexpr int PREFILL_BARRIER_ROWS = 3;
constexpr int PREFILL_BARRIER_ALL = 5;

// A matrix of 128 rows of 128 bf16 as wgmma wants it: columns 0 .. 63, then 64 .. 127, rows of 128 bytes, swizzled.
struct PrefillMatrix {
    static constexpr int HALF = 128 * 128;  // bytes
    unsigned char bytes[2 * HALF];

    // The 16-byte chunk (0 .. 15) of a row.
    __device__ __forceinline__ unsigned char* chunk(int row, int index) {
        return bytes + index / 8 * HALF + row * 128 + ((index % 8) ^ (row % 8)) * 16;
    }
};

struct Prefill {
    PrefillInputs in;
    int num_items;    // tiles times KV heads
    int group_shift;  // log2 of the query heads of a KV head
    int page_shift;
    float score_scale;  // in base 2
};

// ---- work

// 128 / group queries of one row, and one KV head.
struct PrefillItem {
    int row;
    int head;            // KV head
    int start;           // of the row's queries in q
    int count;           // of the row's queries
    int first_query;     // of the row's
    int first_position;  // of that query, in keys
    int end;             // keys that the last query sees
    bool is_empty;       // no queries; in shared memory: nor is there another item
};

struct PrefillShared {
    PrefillMatrix q[PREFILL_ITEMS];  // then the results, on their way out
    PrefillMatrix k[PREFILL_STAGES], v[PREFILL_STAGES];
    Mbarrier k_full[PREFILL_STAGES], v_full[PREFILL_STAGES];
    Mbarrier k_empty[PREFILL_STAGES], v_empty[PREFILL_STAGES];
    Mbarrier q_full[2][PREFILL_ITEMS], q_empty[2][PREFILL_ITEMS];  // of each warpgroup's half of the rows
    PrefillItem items[2][PREFILL_ITEMS];                           // what the warpgroup reads of them
    float nowhere;
};

// Items in order of falling length go to the blocks there and back: 0 1 2, 2 1 0, ...
__device__ __forceinline__ int prefill_item_of(int round) {
    int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round & 1 ? blocks - 1 - block : block);
}

// By a whole warp. Row i starts at tile starts[i] / queries + i; some tiles are therefore empty.
__device__ __forceinline__ PrefillItem find_prefill_item(const Prefill& p, int index) {
    int shift = 7 - p.group_shift, lane = lane_index();  // queries of a tile, as a shift
    int tile = (p.num_items - 1 - index) / p.in.num_kv_heads;  // the last tiles see the most keys: they go first
    const int64_t* starts = p.in.starts;
    int base = int(load(starts)), low = 0, high = p.in.num_rows;
    while (high - low > 1) {  // the last row whose first tile is not after this one, 32 at a time
        int step = ceil_div(high - low, 32), probe = low + lane * step;
        int before = (int(load(starts + minimum(probe, high - 1))) - base) >> shift;  // tiles
        bool is_before = probe < high && before + probe <= tile;
        low += step * (count_bits(ballot(is_before)) - 1);
        high = minimum(low + step, high);
    }
    PrefillItem item;
    item.row = low;
    item.head = index % p.in.num_kv_heads;
    item.start = int(load(starts + low));
    item.count = int(load(starts + low + 1)) - item.start;
    item.first_query = (tile - (((item.start - base) >> shift) + low)) << shift;
    item.is_empty = item.first_query >= item.count;
    int length = int(load(p.in.seq_lens + item.row));
    item.first_position = length - item.count + item.first_query;
    item.end = minimum(item.first_position + (1 << shift), length);
    return item;
}

// By a whole warp: feeder.feed_item of each item of this block.
template <class Feeder>
__device__ __forceinline__ void for_each_item(const Prefill& p, Feeder& feeder) {
    for (int round = 0, index; (index = prefill_item_of(round)) < p.num_items; round++) {
        PrefillItem item = find_prefill_item(p, index);
        if (!item.is_empty) feeder.feed_item(item);
    }
}

// ---- keys and values

// By one warp: lane l loads columns l % 2 * 64 .. of the l / 2-th page (or part of it) of each tile.
struct PrefillFeeder {
    const Prefill& p;
    const TensorMap *k_map, *v_map;
    PrefillShared* shared;
    int tiles_done = 0;

    // The row in the cache of this lane's keys of a tile; negative if there are none.
    __device__ __forceinline__ int place(const PrefillItem& item, const int64_t* table, int tile) const {
        int key = tile * PREFILL_KEYS + ((lane_index() / 2) << p.page_shift);
        if (((lane_index() / 2) << p.page_shift) >= PREFILL_KEYS || key >= item.end) return -1;
        return (int(load(table + (key >> p.page_shift))) * p.in.num_kv_heads + item.head) << p.page_shift;
    }

    __device__ __forceinline__ void feed(
        PrefillMatrix* to, const TensorMap* map, Mbarrier* full, Mbarrier* empty, uint32_t parity, int place) const {
        int half = lane_index() % 2, offset = (lane_index() / 2) << (p.page_shift + 7);
        int boxes = count_bits(ballot(place >= 0));
        mbarrier_wait(empty, parity ^ 1);
        if (lane_index() == 0) mbarrier_arrive_expect(full, boxes << (p.page_shift + 7));
        warp_sync();
        if (place >= 0) tma_load_2d(to->bytes + half * PrefillMatrix::HALF + offset, map, full, half * 64, place);
    }

    __device__ __forceinline__ void feed_item(const PrefillItem& item) {
        const int64_t* table = p.in.page_table + load(p.in.slot_ids + item.row) * p.in.table_stride;
        int tile = ceil_div(item.end, PREFILL_KEYS) - 1;
        int at = place(item, table, tile);
        for (; tile >= 0; tile--) {
            int next = tile > 0 ? place(item, table, tile - 1) : -1;  // ahead: a tile's copies wait for its pages
            int stage = tiles_done % PREFILL_STAGES;
            uint32_t parity = tiles_done / PREFILL_STAGES & 1;
            feed(&shared->k[stage], k_map, &shared->k_full[stage], &shared->k_empty[stage], parity, at);
            feed(&shared->v[stage], v_map, &shared->v_full[stage], &shared->v_empty[stage], parity, at);
            tiles_done++;
            at = next;
        }
    }
};

// ---- queries

// By a warp for each warpgroup: its half of the rows of every item, and what the item is.
struct PrefillQueries {
    const Prefill& p;
    PrefillShared* shared;
    int group;  // the warpgroup
    int items_done = 0;

    __device__ __forceinline__ void load_rows(PrefillMatrix& to, const PrefillItem& item) const {
        int chunk = lane_index() % 16;
#pragma unroll 4
        for (int i = 0; i < 32; i++) {
            int row = group * 64 + 2 * i + lane_index() / 16;
            int query = item.first_query + (row >> p.group_shift);
            int head = (item.head << p.group_shift) + (row & ((1 << p.group_shift) - 1));
            bool is_there = query < item.count;
            int64_t token = item.start + (is_there ? query : 0);
            const bf16* from = p.in.q + token * p.in.q_stride + head * p.in.q_head_stride;
            copy_async(to.chunk(row, chunk), from + chunk * VECTOR, is_there);
        }
        copy_async_commit();
        copy_async_wait<0>();
        fence_async_proxy();
    }

    // An empty item says that it was the last.
    __device__ __forceinline__ void feed_item(const PrefillItem& item) {
        int stage = items_done % PREFILL_ITEMS;
        mbarrier_wait(&shared->q_empty[group][stage], (items_done / PREFILL_ITEMS & 1) ^ 1);
        if (!item.is_empty) load_rows(shared->q[stage], item);
        if (lane_index() == 0) shared->items[group][stage] = item;
        mbarrier_arrive(&shared->q_full[group][stage]);
        items_done++;
    }
};

// ---- results: each warp moves the 16 rows that it computes

__device__ __forceinline__ void store_results(
    PrefillMatrix* staging, const Prefill& p, const PrefillItem& item, int first, const float (&o)[64],
    const float (&factors)[2]) {
    int lane = lane_index();
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            r[i] = pack_bf16(o[4 * j + 2 * i] * factors[i % 2], o[4 * j + 2 * i + 1] * factors[i % 2]);
        store_matrix_x4(staging->chunk(first + lane % 16, j + lane / 16), r);
    }
    warp_sync();
    int chunk = lane % 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = first + 2 * i + lane / 16;
        int query = item.first_query + (row >> p.group_shift);
        int head = (item.head << p.group_shift) + (row & ((1 << p.group_shift) - 1));
        Pairs value = *reinterpret_cast<const Pairs*>(staging->chunk(row, chunk));
        int64_t at = (item.start + query) * p.in.out_stride + head * PREFILL_DIM;
        if (query < item.count) store(vector_at(p.in.out + at, chunk), value);
    }
    warp_sync();  // other queries come to the same place, once it is released
}

// ---- the computation of a warpgroup

struct PrefillRows {
    float o[64];        // 64 rows x 128 columns
    float s[64];        // scores of 128 keys, then their weights
    uint32_t w[8][4];   // the weights as A
    float best[2], mass[2];  // of rows g and g + 8 of this warp; mass: of this thread's columns only
    int last[2];             // key that these rows see
};

// s = q k^T, not yet waited for.
__device__ __forceinline__ void issue_scores(float (&s)[64], const unsigned char* q, const PrefillMatrix& k) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int at = i / 4 * PrefillMatrix::HALF + i % 4 * 32;
        Wgmma<128>::bf16<false>(s, matrix_k_major(q + at), matrix_k_major(k.bytes + at), i > 0);
    }
    wgmma_commit();
}

// o += w v, not yet waited for.
__device__ __forceinline__ void issue_values(float (&o)[64], const uint32_t (&w)[8][4], const PrefillMatrix& v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++)
        Wgmma<128>::bf16<true>(o, w[i], matrix_n_major(v.bytes + i * 2048, PrefillMatrix::HALF), 1);
    wgmma_commit();
}

// Scores to weights in base 2; returns in `decay` by what sums and results of earlier tiles are to be multiplied.
template <bool IS_MASKED>
__device__ __forceinline__ void soften(PrefillRows& r, float (&decay)[2], int first_key, float score_scale) {
    if (IS_MASKED) {
        int column = first_key + 2 * (lane_index() % 4);
#pragma unroll
        for (int i = 0; i < 64; i++) {
            int key = column + i / 4 * 8 + i % 2;
            r.s[i] = key <= r.last[i / 2 % 2] ? r.s[i] : -INFINITY;  // a choice: past the end there may be NaN
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float best = r.best[h];
#pragma unroll
        for (int i = 0; i < 32; i++) best = fmaxf(best, r.s[i / 2 * 4 + 2 * h + i % 2]);
        best = fmaxf(best, shuffle_xor(best, 1));
        best = fmaxf(best, shuffle_xor(best, 2));
        // A row that sees nothing yet: subtract 0, so that its weights are 0 and not NaN.
        float shift = best == -INFINITY ? 0.0f : best * score_scale;
        decay[h] = exp2_fast(multiply_add(r.best[h], score_scale, -shift));
        r.best[h] = best;
        float mass = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float& s = r.s[i / 2 * 4 + 2 * h + i % 2];
            s = exp2_fast(multiply_add(s, score_scale, -shift));
            mass += s;
        }
        r.mass[h] = multiply_add(r.mass[h], decay[h], mass);
    }
}

__device__ __forceinline__ void pack_weights(PrefillRows& r) {
#pragma unroll
    for (int i = 0; i < 32; i++) r.w[i / 4][i % 4] = pack_bf16(r.s[2 * i], r.s[2 * i + 1]);
}

struct PrefillComputer {
    const Prefill& p;
    PrefillShared* shared;
    int group;  // 0 or 1: the warpgroup
    int warp;   // of its four
    int tiles_done = 0, items_done = 0;

    __device__ __forceinline__ int stage(int tile) const { return tile % PREFILL_STAGES; }
    __device__ __forceinline__ uint32_t parity(int tile) const { return tile / PREFILL_STAGES & 1; }
    __device__ __forceinline__ void release(Mbarrier* empty) const {
        if (lane_index() == 0) mbarrier_arrive(empty);
    }
    // The two warpgroups issue in turns, so that one computes weights while the other's products run.
    __device__ __forceinline__ void take_turn() const {
        named_barrier_sync(PREFILL_BARRIER_ORDER + group, PREFILL_CONSUMERS);
    }
    __device__ __forceinline__ void pass_turn() const {
        named_barrier_arrive(PREFILL_BARRIER_ORDER + 1 - group, PREFILL_CONSUMERS);
    }
    __device__ __forceinline__ PrefillMatrix& matrix() const { return shared->q[items_done % PREFILL_ITEMS]; }
    __device__ __forceinline__ const unsigned char* queries() const { return matrix().bytes + group * 64 * 128; }

    // What lies past the end may be NaN, and 0 times NaN is not 0. By both warpgroups.
    __device__ __forceinline__ void clear_past_end(int first_row) const {
        PrefillMatrix& v = shared->v[stage(tiles_done)];
        mbarrier_wait(&shared->v_full[stage(tiles_done)], parity(tiles_done));
        int thread = group * 128 + threadIdx.x % 128;
        for (int i = first_row * 16 + thread; i < PREFILL_KEYS * 16; i += PREFILL_CONSUMERS)
            *reinterpret_cast<Pairs*>(v.chunk(i / 16, i % 16)) = Pairs{};
        fence_async_proxy();
        named_barrier_sync(PREFILL_BARRIER_ALL, PREFILL_CONSUMERS);
    }

    // The scores of this tile while the values of the tile before are added.
    template <bool IS_MASKED>
    __device__ __forceinline__ void step(PrefillRows& r, int tile, float score_scale) {
        int before = tiles_done - 1, stage_now = stage(tiles_done), stage_before = stage(before);
        float decay[2];
        mbarrier_wait(&shared->k_full[stage_now], parity(tiles_done));
        take_turn();
        issue_scores(r.s, queries(), shared->k[stage_now]);
        mbarrier_wait(&shared->v_full[stage_before], parity(before));
        issue_values(r.o, r.w, shared->v[stage_before]);
        pass_turn();
        wgmma_wait<1>();
        keep_in_registers(r.s);
        release(&shared->k_empty[stage_now]);
        soften<IS_MASKED>(r, decay, tile * PREFILL_KEYS, score_scale);
        compute_before(r.mass[0], &shared->nowhere);  // the weights, while the products run
        compute_before(r.mass[1], &shared->nowhere);
        wgmma_wait<0>();
        keep_in_registers(r.o);
        release(&shared->v_empty[stage_before]);
#pragma unroll
        for (int i = 0; i < 64; i++) r.o[i] *= decay[i / 2 % 2];
        pack_weights(r);
        tiles_done++;
    }

    __device__ __forceinline__ void first_step(PrefillRows& r, int tile, int end, float score_scale) {
        float decay[2];
        mbarrier_wait(&shared->k_full[stage(tiles_done)], parity(tiles_done));
        take_turn();
        issue_scores(r.s, queries(), shared->k[stage(tiles_done)]);
        pass_turn();
        wgmma_wait<0>();
        keep_in_registers(r.s);
        release(&shared->k_empty[stage(tiles_done)]);
        soften<true>(r, decay, tile * PREFILL_KEYS, score_scale);
        pack_weights(r);
        if (end % PREFILL_KEYS != 0) clear_past_end(end % PREFILL_KEYS);
        tiles_done++;
    }

    __device__ __forceinline__ void last_step(PrefillRows& r) {
        int stage_before = stage(tiles_done - 1);
        mbarrier_wait(&shared->v_full[stage_before], parity(tiles_done - 1));
        issue_values(r.o, r.w, shared->v[stage_before]);
        wgmma_wait<0>();
        keep_in_registers(r.o);
        release(&shared->v_empty[stage_before]);
    }

    __device__ __forceinline__ void compute_item(const PrefillItem& item) {
        int first = group * 64 + warp * 16;  // of this warp's rows
        PrefillRows r;
#pragma unroll
        for (int i = 0; i < 64; i++) r.o[i] = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = first + lane_index() / 4 + 8 * h;
            r.last[h] = minimum(item.first_position + (row >> p.group_shift), item.end - 1);
            r.best[h] = -INFINITY;
            r.mass[h] = 0.0f;
        }
        int tile = ceil_div(item.end, PREFILL_KEYS) - 1;
        int seen_by_all = (item.first_position + ((group * 64) >> p.group_shift) + 1) / PREFILL_KEYS;  // tiles
        float score_scale = p.in.k_scale == nullptr ? p.score_scale : p.score_scale * load(p.in.k_scale + item.head);
        first_step(r, tile--, item.end, score_scale);
        for (; tile >= seen_by_all; tile--) step<true>(r, tile, score_scale);
        for (; tile >= 0; tile--) step<false>(r, tile, score_scale);
        last_step(r);
        float factors[2], value_scale = p.in.v_scale == nullptr ? 1.0f : load(p.in.v_scale + item.head);
#pragma unroll
        for (int h = 0; h < 2; h++) factors[h] = divide(value_scale, warp_sum<4>(r.mass[h]));
        named_barrier_sync(PREFILL_BARRIER_ROWS + group, 128);  // all its products have read the queries
        store_results(&matrix(), p, item, first, r.o, factors);
    }

    // Each item as its queries come.
    __device__ __forceinline__ void compute_items() {
        for (;; items_done++) {
            int stage = items_done % PREFILL_ITEMS;
            mbarrier_wait(&shared->q_full[group][stage], items_done / PREFILL_ITEMS & 1);
            PrefillItem item = shared->items[group][stage];
            if (item.is_empty) return;
            compute_item(item);
            release(&shared->q_empty[group][stage]);
        }
    }
};

__device__ __forceinline__ void set_up_prefill(PrefillShared* shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < PREFILL_STAGES; i++) {
            mbarrier_init(&shared->k_full[i], 1);
            mbarrier_init(&shared->v_full[i], 1);
            mbarrier_init(&shared->k_empty[i], PREFILL_CONSUMERS / 32);
            mbarrier_init(&shared->v_empty[i], PREFILL_CONSUMERS / 32);
        }
        for (int i = 0; i < 2 * PREFILL_ITEMS; i++) {
            mbarrier_init(&shared->q_full[i % 2][i / 2], 32);
            mbarrier_init(&shared->q_empty[i % 2][i / 2], PREFILL_CONSUMERS / 2 / 32);
        }
        mbarrier_init_fence();
    }
    block_sync();
}

__global__ void __launch_bounds__(PREFILL_THREADS, 1)
    prefill_kernel(const __grid_constant__ Prefill p, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map) {
    auto* shared = shared_memory<PrefillShared>();
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        tma_prefetch_map(&k_map);
        tma_prefetch_map(&v_map);
    }
    set_up_prefill(shared);
    wait_for_previous_kernel();
    int group = warp_index() / 4;
    if (group == 0) {
        give_registers<PREFILL_FEED_REGISTERS>();
        if (warp_index() == 0) {
            PrefillFeeder feeder{p, &k_map, &v_map, shared};
            for_each_item(p, feeder);
        } else if (warp_index() <= 2) {
            PrefillQueries queries{p, shared, warp_index() - 1};
            for_each_item(p, queries);
            queries.feed_item(PrefillItem{.is_empty = true});
        }
    } else {
        take_registers<PREFILL_COMPUTE_REGISTERS>();
        PrefillComputer computer{p, shared, group - 1, warp_index() % 4};
        if (group == 2) computer.pass_turn();  // the first is the other's
        computer.compute_items();
        if (group == 1) computer.take_turn();  // the one that is left over
    }
}

}  // namespace nemo
