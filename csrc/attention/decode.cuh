// Attention of single queries, or runs of them, over paged keys and values, GQA-packed, with all keys split evenly over
// the blocks and the parts of an item combined by the last of them. An item is a query, or a run of queries of one
// request, each of which sees as many keys as it says; those of an item are those of the query that sees the most.
//
// Operands are swapped: keys, and then dimensions, are the 16 rows of a product, and the query heads of one KV head, of
// each query of the item, its columns: 8 of them make a tile, so that up to 8 cost what one does. Each warp streams
// keys of its own through its own ring of buffers and keeps its own maximum and sum: no barrier until the end.
//
// FP8 is widened to fp16, exactly, in registers. A product's k index may run over dimensions in any order if both
// operands agree: 4 neighbouring bytes of K are two operand registers as they lie. V comes as pairs of dimensions,
// transposed; a permutation of bytes parts even dimensions from odd, which become rows g and g + 8 of the product.
#pragma once

#include <type_traits>

#include "attention/decode.h"
#include "common/barrier.cuh"
#include "common/mma.cuh"

namespace nemo {

constexpr int DECODE_DIM = 128;
constexpr int DECODE_WARPS = 4;
constexpr int DECODE_THREADS = 32 * DECODE_WARPS;
constexpr int DECODE_STAGES = 3;  // 96 KiB a block: two blocks share a multiprocessor, with 128 KiB on their way
constexpr int MAX_GROUP = 8;
constexpr int MAX_TILES = MOST_COLUMNS / 8;
constexpr int MAX_REGISTER_TILES = 2;  // whose queries lie in registers; of more they lie in shared memory
constexpr float LOWEST_SCORE = -1e30f;  // of no key yet; finite, so that differences are numbers

// What a warp handles at once, in a stage of 8 KiB: 16 keys of bf16, 32 of fp8.
template <class T>
struct DecodeTile {
    static constexpr int KEYS = 32 / sizeof(T);
    static constexpr int ROW_BYTES = DECODE_DIM * sizeof(T);
    static constexpr int CHUNKS = ROW_BYTES / 16;
    static constexpr int MATRIX_BYTES = KEYS * ROW_BYTES;  // of K, and of V
    static constexpr int COPIES = KEYS * CHUNKS / 32;      // of each, by each lane
    static constexpr int BLOCK_KEYS = KEYS * DECODE_WARPS;
    static constexpr float P_EXPONENT = sizeof(T) == 1 ? 14.0f : 0.0f;  // small weights stay above fp16's smallest
};
constexpr int DECODE_WARP_BYTES = DECODE_STAGES * 8192;

// Of the queries as second operand, zeros beyond the last column: what a lane has of one tile, for two steps of 16
// dimensions each.
using Fragment = Vec<uint32_t, 4>;

// The queries of an item where registers do not hold them: fragments by pair of steps, tile and lane; and the ends of
// the keys that columns 2t and 2t + 1 of each tile see.
template <int TILES>
struct SharedQueries {
    Fragment fragments[4][TILES][32];
    Vec<int, 2> ends[TILES][4];
};
constexpr int DECODE_RINGS_BYTES = DECODE_WARPS * DECODE_WARP_BYTES + 16;  // and whether the block is the last
constexpr int decode_shared_bytes(int tiles) {
    return DECODE_RINGS_BYTES + (tiles > MAX_REGISTER_TILES ? int(sizeof(SharedQueries<MAX_TILES>)) : 0);
}
constexpr int MERGE_PITCH = DECODE_DIM + 4;  // floats between query heads, when the warps' results are merged

// ---- the plan: which keys a unit has. kernels/decode_split.py states the rule, and is what tests compare with.

constexpr int SPLIT_TILE = 64;  // keys; rows are cut between tiles
constexpr int PART_COST = 2;    // tiles that a block would read in the time in which it starts and ends a part
constexpr int MIN_SHARE = 2;    // tiles

struct DecodeCut {
    int32_t item, tile;
};

// A header (tiles of a share, items if some have no keys and else 0, units with work); where these units begin, and the
// end; of each item its length, its slot and its place on the line; of each query of a run how many keys it sees.
struct DecodePlan {
    int32_t *header, *cuts, *lengths, *slots, *places, *seen;

    __device__ __forceinline__ DecodeCut cut(int unit) const {
        return {load(cuts + 2 * unit), load(cuts + 2 * unit + 1)};
    }
};
__host__ __device__ __forceinline__ DecodePlan view_plan(int32_t* words, int num_items, int num_units) {
    int32_t *cuts = words + 3, *lengths = cuts + 2 * (num_units + 1);
    int64_t items = num_items;
    return {words, cuts, lengths, lengths + items, lengths + 2 * items, lengths + 3 * items};
}

constexpr int PLAN_THREADS = 1024;

struct MakePlan {
    DecodePlanInputs in;
};

// The first of `values` greater than x, less one: which of the ascending rows holds x.
__device__ __forceinline__ int row_holding(const int64_t* values, int first, int last, int64_t x) {
    while (last - first > 1) {
        int middle = (first + last) / 2;
        if (load(values + middle) <= x) {
            first = middle;
        } else {
            last = middle;
        }
    }
    return first;
}

// Sum of what the lanes up to this one bring.
__device__ __forceinline__ int sum_up_to(int x) {
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        int more = shuffle_up(x, by);
        if (lane_index() >= by) x += more;
    }
    return x;
}

__device__ __forceinline__ int tiles_of(int length) { return length > 0 ? ceil_div(length, SPLIT_TILE) : 0; }

// One cut after the other, by one warp, each from the item that holds the place on the line where the unit before it
// ends.
__device__ __forceinline__ int make_cuts(const DecodePlan& plan, int num_items, int total, int share) {
    int first = 0, unit = 0, place = 0, lane = lane_index();
    auto look = [&] { return first + lane < num_items ? load(plan.places + first + lane) : total; };
    auto note = [&](int item, int tile) {
        if (lane == 0) store(plan.cuts + 2 * unit, item), store(plan.cuts + 2 * unit + 1, tile);
    };
    note(0, 0);
    int here = look();  // where the item begins that this lane looks at
    while (place < total) {
        int reached = place + share + PART_COST;
        unit++;
        if (reached >= total) {
            place = total;
            note(num_items, 0);
            break;
        }
        uint32_t before = ballot(here <= reached);
        while (before == 0xFFFFFFFF) {
            first += 31;
            here = look();
            before = ballot(here <= reached);
        }
        int last = count_bits(before) - 1, start = shuffle(here, last);
        place = maximum(start, reached - PART_COST);
        note(first + last, place - start);
    }
    if (unit == 0) unit = 1, note(0, 0);
    return unit;
}

__global__ void __launch_bounds__(PLAN_THREADS) plan_decode_kernel(const MakePlan p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const DecodePlanInputs& in = p.in;
    DecodePlan plan = view_plan(in.plan, in.num_items, in.num_units);
    int* scratch = shared_memory<int>();
    int num_queries = int(load(in.starts + in.first_row + in.num_rows)) - in.first_query;
    int num_items = minimum(in.num_items, num_queries / in.width);
    int total = 0, num_empty = 0, lane = lane_index(), warp = warp_index();
    for (int first = 0; first < num_items; first += PLAN_THREADS) {
        int item = first + int(threadIdx.x), tiles = 0;
        if (item < num_items) {
            int row = 0, length = 0;
#pragma unroll 1
            for (int i = in.width - 1; i >= 0; i--) {  // to the first, whose slot is the item's
                int64_t query = in.first_query + int64_t(item) * in.width + i;
                row = row_holding(in.starts, in.first_row, in.first_row + in.num_rows, query);
                int seen = int(load(in.seq_lens + row) - (load(in.starts + row + 1) - 1 - query));
                if (in.width > 1) store(plan.seen + int64_t(item) * in.width + i, seen);
                length = maximum(length, seen);
            }
            store(plan.lengths + item, length);
            store(plan.slots + item, int32_t(load(in.slot_ids + row)));
            tiles = tiles_of(length);
            num_empty += tiles == 0;
        }
        // Places on the line: sums over warps, then over the block.
        int line = tiles > 0 ? tiles + PART_COST : 0, up_to = sum_up_to(line);
        block_sync();  // the scratch may still be read
        if (lane == 31) scratch[warp] = up_to;
        block_sync();
        int warps_up_to = sum_up_to(scratch[lane]), of_warp = scratch[warp];
        int place = total + shuffle(warps_up_to, warp) - of_warp + up_to - line;
        if (item < num_items) store(plan.places + item, place);
        total += shuffle(warps_up_to, 31);
    }
    num_empty = warp_sum(num_empty);
    block_sync();
    if (lane == 0) scratch[warp] = num_empty;
    block_sync();
    if (warp != 0) return;
    num_empty = warp_sum(scratch[lane]);
    int share = maximum(MIN_SHARE, ceil_div(total, in.num_units));
    int units = make_cuts(plan, num_items, total, share);
    if (lane != 0) return;
    store(plan.header, share), store(plan.header + 1, num_empty > 0 ? num_items : 0), store(plan.header + 2, units);
}

// ---- the kernel

template <class T>
struct Decode {
    DecodeInputs in;
    int group, page_shift;
    float log2_scale;

    // Columns of an item: column c is query head c % group of query c / group.
    __device__ __forceinline__ int columns() const { return group * in.width; }
    // Its place among all heads of all queries.
    __device__ __forceinline__ int64_t place(int item, int head, int column) const {
        return (int64_t(item) * in.width + column / group) * in.num_heads + head * group + column % group;
    }
};

// One part of one item, as a block sees it.
struct Part {
    int item, number, count;  // `number` of `count` parts
    int first_unit;           // that has the first of them; the others follow
    int begin, end;           // keys
    const int64_t* pages;
};

template <class T>
__device__ __forceinline__ Part find_part(const Decode<T>& p, const DecodePlan& plan, int share, int unit,
                                          DecodeCut from, DecodeCut to, int item) {
    int length = load(plan.lengths + item), tiles = tiles_of(length);
    int begin = item == from.item ? from.tile : 0, end = item == to.item ? to.tile : tiles;
    // Cuts of an item lie a share apart, and the first of them at most a share from its beginning.
    int number = ceil_div(begin, share), first_cut = begin == 0 ? end : (begin - 1) % share + 1;
    return {.item = item,
            .number = number,
            .count = 1 + ceil_div(tiles - first_cut, share),
            .first_unit = unit - number,
            .begin = begin * SPLIT_TILE,
            .end = minimum(end * SPLIT_TILE, length),
            .pages = p.in.page_table + load(plan.slots + item) * p.in.table_stride};
}

// The warp's keys of tile `tile`: where they lie, a page for each 16.
template <class T>
struct TileKeys {
    int first;
    int64_t pages[DecodeTile<T>::KEYS / 16];
};

template <class T>
__device__ __forceinline__ TileKeys<T> find_keys(const Decode<T>& p, const Part& part, int tile) {
    TileKeys<T> keys;
    keys.first = part.begin + tile * DecodeTile<T>::BLOCK_KEYS + warp_index() * DecodeTile<T>::KEYS;
#pragma unroll
    for (int i = 0; i < DecodeTile<T>::KEYS / 16; i++) {
        int key = keys.first + 16 * i;
        keys.pages[i] = key < part.end ? load(part.pages + (key >> p.page_shift)) : 0;
    }
    return keys;
}

// Swizzled, so that 8 neighbouring keys' chunks of one number lie in different banks.
template <class T>
__device__ __forceinline__ int chunk_at(int key, int chunk) {
    return key * DecodeTile<T>::ROW_BYTES + ((chunk ^ (key & 7)) << 4);
}

// Asks for K and V of these keys; those past the end become zeros. 16 keys of a head lie in a row within their page.
template <class T>
__device__ __forceinline__ void copy_keys(const Decode<T>& p, const Part& part, const TileKeys<T>& keys, int head,
                                          unsigned char* to) {
    using Tile = DecodeTile<T>;
    constexpr int GROUPS = Tile::KEYS / 16, COPIES = Tile::COPIES / GROUPS;
    int lane = lane_index();
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int first = keys.first + 16 * group;
        int64_t row = ((keys.pages[group] * p.in.num_kv_heads + head) << p.page_shift) + (first & (p.in.page_size - 1));
        const unsigned char* k = static_cast<const unsigned char*>(p.in.k_cache) + row * Tile::ROW_BYTES + lane * 16;
        const unsigned char* v = static_cast<const unsigned char*>(p.in.v_cache) + row * Tile::ROW_BYTES + lane * 16;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int key = (i * 32 + lane) / Tile::CHUNKS;
            unsigned char* place = to + chunk_at<T>(16 * group + key, lane % Tile::CHUNKS);
            bool is_valid = first + key < part.end;
            copy_async(place, k + i * 512, is_valid);
            copy_async(place + Tile::MATRIX_BYTES, v + i * 512, is_valid);
        }
    }
}

__device__ __forceinline__ float bf16_to_float(uint32_t bits) { return float_of_bits(bits << 16); }
// Two bf16 as two fp16, which hold all but the extremes.
__device__ __forceinline__ uint32_t to_fp16(uint32_t pair) {
    constexpr float MOST = 65504.0f;
    float low = bf16_to_float(pair & 0xFFFF), high = bf16_to_float(pair >> 16);
    low = low > MOST ? MOST : low < -MOST ? -MOST : low;
    high = high > MOST ? MOST : high < -MOST ? -MOST : high;
    return pack_fp16(low, high);
}

// Of steps 2 `pair` and 2 `pair` + 1.
template <class T, bool IS_RUN>
__device__ __forceinline__ Fragment load_fragment(const Decode<T>& p, const Part& part, int head, int tile, int pair) {
    int column = 8 * tile + lane_index() / 4, t = lane_index() % 4;
    int64_t query = IS_RUN ? int64_t(part.item) * p.in.width + column / p.group : part.item;
    int of_group = IS_RUN ? column % p.group : column;
    bool is_there = column < (IS_RUN ? p.columns() : p.group);
    const bf16* row = p.in.q + query * p.in.q_stride + (head * p.group + of_group) * p.in.q_head_stride;
    Fragment fragment;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int step = 2 * pair + i / 2, half = i % 2;
        // bf16: dimensions 2t + 8 half; fp8: those whose bytes neighbour in a register, 4t + 2 half.
        int dim = step * 16 + (sizeof(T) == 1 ? 4 * t + 2 * half : 2 * t + 8 * half);
        uint32_t bits = is_there ? load(reinterpret_cast<const uint32_t*>(row + dim)) : 0;
        fragment[i] = sizeof(T) == 1 ? to_fp16(bits) : bits;
    }
    return fragment;
}

// Where the keys end that columns 2t and 2t + 1 of a tile see.
template <class T, bool IS_RUN>
__device__ __forceinline__ Vec<int, 2> load_ends(const Decode<T>& p, const DecodePlan& plan, const Part& part,
                                                 int tile) {
    Vec<int, 2> ends{part.end, part.end};
    if constexpr (IS_RUN) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = 8 * tile + 2 * (lane_index() % 4) + i;
            if (column >= p.columns()) continue;
            ends[i] = minimum(part.end, load(plan.seen + int64_t(part.item) * p.in.width + column / p.group));
        }
    }
    return ends;
}

// The queries of an item, as a lane of each warp needs them.
template <class T, int TILES, bool IS_RUN>
struct Queries {
    static constexpr bool IS_SHARED = TILES > MAX_REGISTER_TILES;
    Fragment fragments[4][IS_SHARED ? 1 : TILES];
    Vec<int, 2> ends_here[IS_SHARED ? 1 : TILES];
    SharedQueries<TILES>* shared;

    // By the whole block. In shared memory each warp leaves a quarter.
    __device__ __forceinline__ void fetch(const Decode<T>& p, const DecodePlan& plan, const Part& part, int head) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if constexpr (IS_SHARED) {
                int pair = warp_index(), lane = lane_index();
                shared->fragments[pair][tile][lane] = load_fragment<T, IS_RUN>(p, part, head, tile, pair);
                if (pair == 0 && lane < 4) shared->ends[tile][lane] = load_ends<T, IS_RUN>(p, plan, part, tile);
            } else {
#pragma unroll
                for (int pair = 0; pair < 4; pair++)
                    fragments[pair][tile] = load_fragment<T, IS_RUN>(p, part, head, tile, pair);
                ends_here[tile] = load_ends<T, IS_RUN>(p, plan, part, tile);
            }
        }
        if (IS_SHARED) block_sync();
    }
    __device__ __forceinline__ Fragment at(int pair, int tile) const {
        if constexpr (IS_SHARED) return shared->fragments[pair][tile][lane_index()];
        return fragments[pair][IS_SHARED ? 0 : tile];
    }
    __device__ __forceinline__ Vec<int, 2> ends(int tile) const {
        if constexpr (IS_SHARED) return shared->ends[tile][lane_index() % 4];
        return ends_here[IS_SHARED ? 0 : tile];
    }
};

__device__ __forceinline__ uint32_t widen_low(uint32_t bytes) { return fp8x2_to_fp16x2(uint16_t(bytes)); }
__device__ __forceinline__ uint32_t widen_high(uint32_t bytes) { return fp8x2_to_fp16x2(uint16_t(bytes >> 16)); }

template <class T>
__device__ __forceinline__ void add_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 1) {
        mma_16x8x16_fp16(d, a, b);
    } else {
        mma_16x8x16_bf16(d, a, b);
    }
}

// Scores of the tile's keys, 16 at a time: s[0], s[1] of key g and columns 2t, 2t + 1; s[2], s[3] of key g + 8.
template <class T, int TILES, bool IS_RUN>
__device__ __forceinline__ void score(float (&s)[DecodeTile<T>::KEYS / 16][TILES][4], const unsigned char* k,
                                      const Queries<T, TILES, IS_RUN>& queries) {
    using Tile = DecodeTile<T>;
    int matrix = lane_index() / 8, row = (matrix & 1) * 8 + lane_index() % 8;
#pragma unroll
    for (int i = 0; i < Tile::KEYS / 16 * TILES * 4; i++) s[i / 4 / TILES][i / 4 % TILES][i % 4] = 0.0f;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        Fragment b[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) b[tile] = queries.at(pair, tile);
#pragma unroll
        for (int part = 0; part < Tile::KEYS / 16; part++) {
            auto add = [&](int half, const uint32_t (&a)[4]) {
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
                    add_product<T>(s[part][tile], a, {b[tile][2 * half], b[tile][2 * half + 1]});
            };
            uint32_t r[4];
            if constexpr (sizeof(T) == 1) {  // two chunks of 16 bytes are two steps
                load_matrix_x4(r, k + chunk_at<T>(16 * part + row, 2 * pair + (matrix >> 1)));
                add(0, {widen_low(r[0]), widen_low(r[1]), widen_high(r[0]), widen_high(r[1])});
                add(1, {widen_low(r[2]), widen_low(r[3]), widen_high(r[2]), widen_high(r[3])});
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    load_matrix_x4(r, k + chunk_at<T>(row, 4 * pair + 2 * half + (matrix >> 1)));
                    add(half, r);
                }
            }
        }
    }
}

// Adds 16 keys' values, weighted. Rows of o[step]: dimensions 16 step + g and + 8, or for fp8 16 step + 2g and + 1.
template <class T, int TILES>
__device__ __forceinline__ void add_values(float (&o)[TILES][8][4], const unsigned char* v, int first_key,
                                           const uint32_t (&weights)[TILES][2]) {
    int matrix = lane_index() / 8, row = first_key + lane_index() % 8;
    auto add = [&](int step, const uint32_t (&a)[4]) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) add_product<T>(o[tile][step], a, weights[tile]);
    };
    if constexpr (sizeof(T) == 1) {
        row += (matrix & 1) * 8;
#pragma unroll
        for (int step = 0; step < 8; step += 2) {
            uint32_t r[4];
            load_matrix_x4_transposed(r, v + chunk_at<T>(row, step + (matrix >> 1)));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t low = permute_bytes(r[2 * i], 0, 0x3120), high = permute_bytes(r[2 * i + 1], 0, 0x3120);
                add(step + i, {widen_low(low), widen_high(low), widen_low(high), widen_high(high)});
            }
        }
    } else {
        row += (matrix >> 1) * 8;
#pragma unroll
        for (int step = 0; step < 8; step++) {
            uint32_t r[4];
            load_matrix_x4_transposed(r, v + chunk_at<T>(row, 2 * step + (matrix & 1)));
            add(step, r);
        }
    }
}

// What a warp has of its keys; this lane's columns of each tile are 2t and 2t + 1.
template <int TILES>
struct Running {
    float most[TILES][2], mass[TILES][2];  // mass: of this lane's keys alone
    float o[TILES][8][4];

    __device__ __forceinline__ Running() {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int column = 0; column < 2; column++) most[tile][column] = LOWEST_SCORE, mass[tile][column] = 0.0f;
#pragma unroll
            for (int i = 0; i < 32; i++) o[tile][i / 4][i % 4] = 0.0f;
        }
    }
};

// One tile of the warp's keys: scores, softmax against the running maximum, weighted values.
template <class T, int TILES, bool IS_RUN>
__device__ __forceinline__ void attend(Running<TILES>& run, const unsigned char* stage,
                                       const Queries<T, TILES, IS_RUN>& queries, int first_key, float log2_scale) {
    using Tile = DecodeTile<T>;
    constexpr int PARTS = Tile::KEYS / 16;
    float s[PARTS][TILES][4];
    int g = lane_index() / 4;
    score(s, stage, queries);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        Vec<int, 2> ends = queries.ends(tile);
#pragma unroll
        for (int i = 0; i < 4 * PARTS; i++) {
            float& x = s[i / 4][tile][i % 4];
            x = first_key + 16 * (i / 4) + g + i % 4 / 2 * 8 < ends[i % 2] ? multiply(x, log2_scale) : -INFINITY;
        }
    }
    float factor[TILES][2];
    bool is_higher = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float most = s[0][tile][column];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                most = maximum(most, s[part][tile][column]);
                most = maximum(most, s[part][tile][column + 2]);
            }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) most = maximum(most, shuffle_xor(most, mask));
            most = maximum(run.most[tile][column], most);
            factor[tile][column] = exp2_fast(run.most[tile][column] - most);
            is_higher = is_higher || factor[tile][column] != 1.0f;
            run.most[tile][column] = most;
            run.mass[tile][column] *= factor[tile][column];
        }
    }
    if (ballot(is_higher)) {
#pragma unroll
        for (int i = 0; i < 32 * TILES; i++) run.o[i / 32][i / 4 % 8][i % 4] *= factor[i / 32][i % 2];
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        uint32_t weights[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float weight[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                weight[i] = exp2_fast(s[part][tile][i] - run.most[tile][i % 2] + Tile::P_EXPONENT);
                run.mass[tile][i % 2] += weight[i];
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float low = weight[2 * i], high = weight[2 * i + 1];
                weights[tile][i] = transpose_matrix(sizeof(T) == 1 ? pack_fp16(low, high) : pack_bf16(low, high));
            }
        }
        add_values<T>(run.o, stage + Tile::MATRIX_BYTES, 16 * part, weights);
    }
}

// The warp's keys of the whole part, through its ring of stages.
template <class T, int TILES, bool IS_RUN>
__device__ __forceinline__ void stream_keys(const Decode<T>& p, const Part& part, int head,
                                            const Queries<T, TILES, IS_RUN>& queries, float log2_scale,
                                            unsigned char* ring, Running<TILES>& run) {
    int tiles = ceil_div(part.end - part.begin, DecodeTile<T>::BLOCK_KEYS);
    TileKeys<T> keys = find_keys(p, part, 0);
#pragma unroll
    for (int stage = 0; stage < DECODE_STAGES - 1; stage++) {
        if (stage < tiles) copy_keys(p, part, keys, head, ring + stage * 8192);
        copy_async_commit();
        keys = find_keys(p, part, stage + 1);
    }
    for (int tile = 0; tile < tiles; tile++) {
        copy_async_wait<DECODE_STAGES - 2>();
        warp_sync();  // the other lanes' copies are there, and all have read the stage that is written next
        int ahead = tile + DECODE_STAGES - 1;
        if (ahead < tiles) copy_keys(p, part, keys, head, ring + ahead % DECODE_STAGES * 8192);
        copy_async_commit();
        keys = find_keys(p, part, ahead + 1);
        int first = part.begin + tile * DecodeTile<T>::BLOCK_KEYS + warp_index() * DecodeTile<T>::KEYS;
        if (first < part.end) attend(run, ring + tile % DECODE_STAGES * 8192, queries, first, log2_scale);
    }
    copy_async_wait<0>();
    warp_sync();
}

// The warps' results, in their own rings: [column][dimension] and, at the end of a row, maximum and mass.
template <class T, int TILES>
__device__ __forceinline__ void publish(const Running<TILES>& run, float* to) {
    int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        int tile = i / 2, column = i % 2;
        float* row = to + (8 * tile + 2 * t + column) * MERGE_PITCH;
        float mass = run.mass[tile][column];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) mass += shuffle_xor(mass, mask);
        if (g == 0) row[DECODE_DIM] = run.most[tile][column], row[DECODE_DIM + 1] = mass;
#pragma unroll
        for (int step = 0; step < 8; step++) {
            int dim = step * 16 + (sizeof(T) == 1 ? 2 * g : g);
            row[dim] = run.o[tile][step][column];
            row[dim + (sizeof(T) == 1 ? 1 : 8)] = run.o[tile][step][column + 2];
        }
    }
}

// A column's share of this lane's 4 dimensions: weighted values, their mass, and the maximum that both refer to.
using Dims = Vec<float, 4>;
struct Share {
    Dims values;
    float mass, most;
};

// Of `count` parts, in their order. at(i): where part i lies; get(address): what lies there.
template <class At, class Get>
__device__ __forceinline__ Share merge(int count, At at, Get get) {
    Share all{{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, LOWEST_SCORE};
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        const float* row = at(i);
        Dims values = get(reinterpret_cast<const Dims*>(row) + lane_index());
        auto beside = get(reinterpret_cast<const Vec<float, 2>*>(row + DECODE_DIM));
        float most = maximum(all.most, beside[0]);
        float ours = exp2_fast(all.most - most), theirs = exp2_fast(beside[0] - most);
#pragma unroll
        for (int dim = 0; dim < 4; dim++) all.values[dim] = all.values[dim] * ours + values[dim] * theirs;
        all.mass = all.mass * ours + beside[1] * theirs;
        all.most = most;
    }
    return all;
}

// Zeros of a query that sees no key, in a run of others that do.
__device__ __forceinline__ void store_result(bf16* to, const Share& all, float v_scale) {
    Dims values;
#pragma unroll
    for (int dim = 0; dim < 4; dim++)
        values[dim] = all.mass == 0.0f ? 0.0f : multiply(divide(all.values[dim], all.mass), v_scale);
    store(reinterpret_cast<Vec<uint32_t, 2>*>(to) + lane_index(),
          {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3])});
}

template <int TILES, bool IS_RUN, class T>
__device__ __forceinline__ void attend_part(const Decode<T>& p, const DecodePlan& plan, const Part& part, int head,
                                            unsigned char* shared, float k_scale) {
    unsigned char* ring = shared + warp_index() * DECODE_WARP_BYTES;
    Queries<T, TILES, IS_RUN> queries;
    queries.shared = reinterpret_cast<SharedQueries<TILES>*>(shared + DECODE_RINGS_BYTES);
    queries.fetch(p, plan, part, head);
    Running<TILES> run;
    stream_keys(p, part, head, queries, p.log2_scale * k_scale, ring, run);
    publish<T>(run, reinterpret_cast<float*>(ring));
}

// Zeros for those of the items that have no keys: a share of them, of one KV head.
template <class T>
__device__ __forceinline__ void clear_empty(const Decode<T>& p, const DecodePlan& plan, int num_items, int units,
                                            int head) {
    for (int item = blockIdx.y; item < num_items; item += units) {
        if (load(plan.lengths + item) > 0) continue;
        for (int i = 0; i < p.columns(); i++)
            store(p.in.out + p.place(item, head, i) * DECODE_DIM + threadIdx.x, bf16{0});
    }
}

// What the block's warps have of a part: merged, a column a warp, and the result if it is all of its item. Else it is
// left in the scratch, and the last part to come combines all of them, in their order.
template <class T>
__device__ __forceinline__ void finish_part(const Decode<T>& p, const Part& part, int head, unsigned char* shared,
                                            float v_scale) {
    // A unit has at most one part that begins its item and is not all of it, and one that goes on with an item.
    int64_t pitch = int64_t(p.in.num_kv_heads) * p.columns() * MERGE_PITCH;  // between parts
    float* scratch = p.in.scratch + 2 * part.first_unit * pitch + int64_t(head) * p.columns() * MERGE_PITCH;
    auto place = [&](int number) { return scratch + (2 * number + (number == 0)) * pitch; };
    auto finish = [&](int column, const Share& all) {
        store_result(p.in.out + p.place(part.item, head, column) * DECODE_DIM, all, v_scale);
    };
    for (int i = warp_index(); i < p.columns(); i += DECODE_WARPS) {
        auto warp = [&](int w) {
            return reinterpret_cast<const float*>(shared + w * DECODE_WARP_BYTES) + i * MERGE_PITCH;
        };
        Share all = merge(DECODE_WARPS, warp, [](const auto* from) { return *from; });
        if (part.count == 1) {
            finish(i, all);
            continue;
        }
        float* row = place(part.number) + i * MERGE_PITCH;
        store(reinterpret_cast<Dims*>(row) + lane_index(), all.values);
        if (lane_index() == 0) store(reinterpret_cast<Vec<float, 2>*>(row + DECODE_DIM), {all.most, all.mass});
    }
    if (part.count == 1) return;

    int* is_last = reinterpret_cast<int*>(shared + DECODE_WARPS * DECODE_WARP_BYTES);
    int32_t* counter = p.in.counters + part.first_unit * p.in.num_kv_heads + head;
    block_sync();
    if (threadIdx.x == 0) *is_last = atomic_add_ordered(counter, 1) == part.count - 1;
    block_sync();
    if (!*is_last) return;
    for (int i = warp_index(); i < p.columns(); i += DECODE_WARPS) {
        auto row = [&](int number) { return place(number) + i * MERGE_PITCH; };
        finish(i, merge(part.count, row, [](const auto* from) { return load(from); }));
    }
    if (threadIdx.x == 0) store(counter, 0);
}

// TILES: of 8 columns, an item's query heads of one KV head. IS_RUN: items of several queries.
template <class T, int TILES, bool IS_RUN>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_kernel(const Decode<T> p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int head = blockIdx.x, unit = blockIdx.y;
    DecodePlan plan = view_plan(p.in.plan, p.in.num_items, p.in.num_units);
    int units = load(plan.header + 2);
    if (unit >= units) return;
    DecodeCut from = plan.cut(unit), to = plan.cut(unit + 1);
    int share = load(plan.header);
    auto* shared = shared_memory<unsigned char>();
    float k_scale = p.in.k_scale == nullptr ? 1.0f : load(p.in.k_scale + head);
    float v_scale = p.in.v_scale == nullptr ? 1.0f : load(p.in.v_scale + head);
    clear_empty(p, plan, load(plan.header + 1), units, head);
    for (int item = from.item; item < to.item + (to.tile > 0); item++) {
        Part part = find_part(p, plan, share, unit, from, to, item);
        if (part.begin >= part.end) continue;
        attend_part<TILES, IS_RUN>(p, plan, part, head, shared, k_scale);
        block_sync();
        finish_part(p, part, head, shared, v_scale);
        block_sync();  // the warps' results are read: the next part's keys may come
    }
}

}  // namespace nemo
