// The token of each row in one launch. Blocks survey pieces of a row, and note of every sub-block of 256 tokens its
// highest logit and, as the row needs it, the mass or the lowest cost of its tokens. The last block of a row to come
// knows from these bounds that surely hold what can be chosen, and looks at those sub-blocks again: at most twice, but
// for distributions made to be hard. The first look makes a histogram of the distances' bits; where the counts or
// masses of nearer tokens reach what top_k or top_p ask for, the second keeps the tokens of that bucket, among which
// bisection decides, and takes the lowest cost of nearer ones. If few tokens are near, the first look keeps them and
// there is no second. Nothing is sorted. What decides adds integers or takes minima, so no order matters.
//
// Noise, penalties and filters are those of nemo_engine/ops/sampling.py: the draw is the token with the lowest
// distance + log(E), where distance = (best - logit) / temperature.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/barrier.cuh"
#include "common/numbers.cuh"
#include "common/rows.cuh"
#include "sampling/sampling.h"

namespace nemo {

constexpr int SUB = 256;  // tokens: 8 to each lane of a warp
constexpr int SAMPLE_WARPS = 8;
constexpr int SAMPLE_THREADS = 32 * SAMPLE_WARPS;
constexpr int PIECE_SUBS = 2 * SAMPLE_WARPS;  // that a block surveys
constexpr int MAX_CANDIDATES = 4096;  // that are kept in shared memory
constexpr int BUCKETS = 2048;         // of a histogram
constexpr int FIRST_SHIFT = 14;       // of the first one: 512 buckets to an octave, over 4 octaves
constexpr uint32_t TWO_OCTAVES = 2u << 23;  // of a float's bits
constexpr int BUCKETS_EACH = BUCKETS / SAMPLE_THREADS;  // of a thread
constexpr uint32_t LARGEST_BITS = 0x7F7FFFFFu;
constexpr float MASS_ONE = 1099511627776.0f;  // 2^40: the mass of the likeliest token
constexpr float NO_MASS = 28.0f;  // a distance from which on floor(2^40 exp(-distance)) is 0
constexpr float COST_MARGIN = 1e-3f;  // the survey's costs are surely that good
constexpr int64_t NOT_FINITE = -1;
constexpr int64_t ALL_MASKED = -2;
constexpr float FINITE_MAX = 3.4028234663852886e38f;

// Where the weight of the nearest tokens reaches what is asked for: at distances whose bits are low .. high, which
// `inside` tokens have; count and mass are those of nearer tokens.
struct Crossing {
    uint32_t low, high;
    int64_t count, mass, inside, inside_mass;
};

struct SampleShared {
    float distances[MAX_CANDIDATES];
    int ids[MAX_CANDIDATES];
    uint32_t counts[BUCKETS], mass_low[BUCKETS], mass_high[BUCKETS];
    Crossing crossing;
    int64_t sums[SAMPLE_WARPS];
    double totals[SAMPLE_WARPS];
    uint64_t keys[SAMPLE_WARPS];
    int count, is_last;
};

__device__ __forceinline__ float infinity() { return float_of_bits(0x7F800000u); }

// ---- the row

// A row and what its slot wants.
template <class T>
struct SampleRow {
    const T* logits;
    int32_t* counts;
    const uint8_t* prompt;
    uint64_t key;
    double min_p, top_p;
    int64_t top_k;
    float temperature, frequency, presence, repetition;
    int vocab_size;
    bool has_penalties, is_aligned;
    __device__ __forceinline__ bool is_drawn() const { return temperature > 0.0f; }
    __device__ __forceinline__ bool has_top_k() const { return top_k < vocab_size; }
    __device__ __forceinline__ bool is_cut() const { return min_p > 0.0 || has_top_k(); }
};

__device__ __forceinline__ uint64_t row_key(int64_t seed_key, int64_t position) {
    uint64_t z = uint64_t(seed_key) + uint64_t(position) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

template <class T>
__device__ __forceinline__ SampleRow<T> read_row(const SampleInputs& in, int row) {
    int64_t slot = load(in.slot_ids + row);
    SampleRow<T> r;
    r.logits = static_cast<const T*>(in.logits) + row * in.stride;
    r.counts = in.output_counts + slot * in.vocab_size;
    r.prompt = in.prompt_mask + slot * in.vocab_size;
    r.key = row_key(load(in.seed_keys + slot), load(in.positions + row));
    r.min_p = load(in.min_p + slot);
    r.top_p = load(in.top_p + slot);
    r.top_k = load(in.top_k + slot);
    double temperature = load(in.temperature + slot), repetition = load(in.repetition + slot);
    double frequency = load(in.frequency + slot), presence = load(in.presence + slot);
    r.temperature = float(temperature);
    if (temperature > 0.0 && r.temperature == 0.0f) r.temperature = float_of_bits(1);  // drawn all the same
    r.frequency = float(frequency);
    r.presence = float(presence);
    r.has_penalties = repetition != 1.0 || frequency != 0.0 || presence != 0.0;
    repetition = repetition < double(TINY) ? double(TINY) : repetition;
    r.repetition = float(repetition > double(FINITE_MAX) ? double(FINITE_MAX) : repetition);
    r.vocab_size = in.vocab_size;
    r.is_aligned = reinterpret_cast<uintptr_t>(r.logits) % 16 == 0;
    return r;
}

template <class T>
__device__ __forceinline__ float widened(T x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        return float_of_bits(uint32_t(x.bits) << 16);
    }
}

template <class T>
__device__ __forceinline__ float penalised(const SampleRow<T>& r, float x, int token) {
    int count = load(r.counts + token);
    bool is_known = count > 0 || load(r.prompt + token) != 0;
    if (is_known && x > -infinity()) {
        x = x > 0.0f ? divide(x, r.repetition) : multiply(x, r.repetition);
        x = minimum(maximum(x, -FINITE_MAX), FINITE_MAX);
    }
    x = add(x, -multiply(r.frequency, float(count)));
    return add(x, count > 0 ? -r.presence : 0.0f);
}

// This lane's 8 logits of a sub-block, as they are; -inf beyond the vocabulary.
template <class T>
__device__ __forceinline__ void read_logits(const SampleRow<T>& r, int first, float (&x)[8]) {
    if (r.is_aligned && first + 8 <= r.vocab_size) {
        constexpr int WIDTH = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < 8; i += WIDTH) {
            auto some = load(reinterpret_cast<const Vec<T, WIDTH>*>(r.logits + first + i));
#pragma unroll
            for (int j = 0; j < WIDTH; j++) x[i + j] = widened(some[j]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = first + i < r.vocab_size ? widened(load(r.logits + first + i)) : -infinity();
}

// As read_logits, after penalties: the very numbers that decide.
template <class T>
__device__ __forceinline__ void final_logits(const SampleRow<T>& r, int first, float (&x)[8]) {
    read_logits(r, first, x);
    if (!r.has_penalties) return;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (first + i < r.vocab_size) x[i] = penalised(r, x[i], first + i);
}

__device__ __forceinline__ float distance_of(float best, float x, float temperature) {
    return divide(fabsf(best - x), temperature);
}

// ---- noise

__device__ __forceinline__ uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0xD35A2D97u;
    return x ^ (x >> 15);
}
__device__ __forceinline__ float uniform_of(uint64_t key, int token) {
    uint32_t x = mix32(mix32(uint32_t(token) ^ uint32_t(key)) ^ uint32_t(key >> 32));
    return minimum(multiply(add(float(x), 0.5f), 2.3283064365386963e-10f), 1.0f - 5.9604644775390625e-08f);
}
__device__ __forceinline__ float log_exponential(uint64_t key, int token) {
    return logf(-log1pf(-uniform_of(key, token)));
}
// E to 1e-4 of itself, cheaply.
__device__ __forceinline__ float rough_exponential(uint64_t key, int token) {
    float u = uniform_of(key, token);
    return u < 0.00390625f ? u + 0.5f * u * u : -0.6931471805599453f * log2_fast(1.0f - u);
}

// ---- survey

template <class T>
__device__ __forceinline__ void survey_sub(const SampleInputs& in, const SampleRow<T>& r, int row, int sub,
                                           int num_subs) {
    int first = sub * SUB + lane_index() * 8;
    float x[8], raw[8];
    read_logits(r, first, raw);
    bool is_bad = false;
    float best = -infinity();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        is_bad |= !(raw[i] < infinity());
        x[i] = raw[i];
        if (r.has_penalties && first + i < r.vocab_size) x[i] = penalised(r, raw[i], first + i);
        best = maximum(best, x[i]);
    }
    best = warp_max(best);
    is_bad = ballot(is_bad) != 0;
    int64_t place = int64_t(row) * num_subs + sub;
    if (lane_index() == 0) store(in.best + place, is_bad ? infinity() : best);
    if (!r.is_drawn() || r.is_cut() || is_bad || best == -infinity()) return;
    float note = r.top_p < 1.0 ? 0.0f : infinity();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float distance = distance_of(best, x[i], r.temperature);
        if (r.top_p < 1.0) {
            note += expf(-distance);
        } else if (first + i < r.vocab_size) {
            note = minimum(note, rough_exponential(r.key, first + i) * expf(minimum(distance, 80.0f)));
        }
    }
    note = r.top_p < 1.0 ? warp_sum(note) : warp_min(note);
    if (lane_index() == 0) store(in.note + place, note);
}

// ---- over the deciding block

template <class V>
__device__ __forceinline__ V* scratch_of(SampleShared* s) {
    if constexpr (std::is_same_v<V, int64_t>) return s->sums;
    if constexpr (std::is_same_v<V, double>) return s->totals;
    if constexpr (std::is_same_v<V, uint64_t>) return s->keys;
}
// The order of additions is fixed.
template <class V>
__device__ __forceinline__ V block_total_of(SampleShared* s, V x) {
    x = warp_sum(x);
    block_sync();
    if (lane_index() == 0) scratch_of<V>(s)[warp_index()] = x;
    block_sync();
    V total = 0;
    for (int i = 0; i < SAMPLE_WARPS; i++) total += scratch_of<V>(s)[i];
    return total;
}
__device__ __forceinline__ uint64_t block_least(SampleShared* s, uint64_t x) {
    x = warp_min(x);
    block_sync();
    if (lane_index() == 0) s->keys[warp_index()] = x;
    block_sync();
    uint64_t least = s->keys[0];
    for (int i = 1; i < SAMPLE_WARPS; i++) least = minimum(least, s->keys[i]);
    return least;
}
// Floats as integers of the same order.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
    uint32_t bits = bits_of_float(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t bits) {
    return float_of_bits(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}
__device__ __forceinline__ float block_min_of(SampleShared* s, float x) {
    return from_ordered(uint32_t(block_least(s, ordered_bits(x))));
}

// A token's mass, which sums exactly.
__device__ __forceinline__ int64_t mass_of(float distance) {
    return int64_t(floorf(multiply(expf(-distance), MASS_ONE)));
}

// The smallest bits of a distance, low .. high, within which the weights add up to `target`. within(bits): the sum over
// the block.
template <class Within>
__device__ __forceinline__ uint32_t reach(int64_t target, uint32_t low, uint32_t high, Within within) {
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (within(middle) >= target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// ---- decide

// What the last block knows of its row: of every sub-block its nearest distance and its note.
template <class T>
struct Decision {
    const SampleRow<T>& r;
    SampleShared* s;
    const float *highest, *notes;
    int num_subs;
    float best;
    float bound = 0;      // candidates are as near as this
    float most_cost = 0;  // or, of rows that nothing cuts, their sub-blocks' costs are as low as this
    bool is_by_cost = false, is_kept = false;  // kept: candidates lie in shared memory

    __device__ __forceinline__ float nearest(int sub) const {
        return distance_of(best, load(highest + sub), r.temperature);
    }
    __device__ __forceinline__ bool is_near(int sub) const {
        float distance = nearest(sub);
        if (!(distance < infinity())) return false;
        return is_by_cost ? add(distance, logf(load(notes + sub))) <= most_cost : distance <= bound;
    }
    // visit(is_candidate, distance, token) for the tokens of near sub-blocks, by whole warps.
    template <class Visit>
    __device__ __forceinline__ void look_up(Visit visit) const {
        for (int base = warp_index(); base < num_subs; base += 32 * SAMPLE_WARPS) {
            int mine = base + lane_index() * SAMPLE_WARPS;
            for (uint32_t near = ballot(mine < num_subs && is_near(mine)); near != 0; near &= near - 1) {
                int first = (base + lowest_bit(near) * SAMPLE_WARPS) * SUB + lane_index() * 8;
                float x[8];
                final_logits(r, first, x);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float distance = distance_of(best, x[i], r.temperature);
                    bool is_candidate =
                        first + i < r.vocab_size && distance < infinity() && (is_by_cost || distance <= bound);
                    visit(is_candidate, distance, first + i);
                }
            }
        }
    }
    // The lower, the better; of equal costs the lower token.
    __device__ __forceinline__ uint64_t cost_of(float distance, int token) const {
        return uint64_t(ordered_bits(add(distance, log_exponential(r.key, token)))) << 32 | uint32_t(token);
    }
};

// ---- histograms

// Distances by their bits, low .. high: those from `first` on by 2^shift, what is nearer in the first bucket, what is
// farther than all buckets in the last.
struct Buckets {
    uint32_t low, high, first;
    int shift;
    __device__ __forceinline__ int of(uint32_t bits) const {
        return bits <= first ? 0 : minimum(int((bits - first) >> shift), BUCKETS - 1);
    }
};

// Of all candidates: buckets fine enough at the distances that are usual. Every sub-block has a token as
// near as `far`, so few tokens are as near as a quarter of it; what top_k and top_p cut is rarely 4 times as far.
__device__ __forceinline__ Buckets first_buckets(uint32_t high, float far) {
    constexpr uint32_t WIDTH = uint32_t(BUCKETS) << FIRST_SHIFT;
    uint32_t top = minimum(high, bits_of_float(far) + TWO_OCTAVES);
    return {0, high, top < WIDTH ? 0 : top - WIDTH + 1, FIRST_SHIFT};
}
__device__ __forceinline__ Buckets buckets_between(uint32_t low, uint32_t high) {
    Buckets b{low, high, low, 0};
    while ((high - low) >> b.shift >= uint32_t(BUCKETS)) b.shift++;
    return b;
}

__device__ __forceinline__ void clear(SampleShared* s) {
    block_sync();
    if (threadIdx.x == 0) s->count = 0;
    for (int i = threadIdx.x; i < BUCKETS; i += SAMPLE_THREADS) s->counts[i] = s->mass_low[i] = s->mass_high[i] = 0;
    block_sync();
}
// Exact in whatever order: each wrap of the low word is carried once.
__device__ __forceinline__ void tally(SampleShared* s, const Buckets& b, float distance, bool has_mass) {
    uint32_t bits = bits_of_float(distance);
    if (bits < b.low || bits > b.high) return;
    int bucket = b.of(bits);
    atomic_add(&s->counts[bucket], 1u);
    if (!has_mass) return;
    int64_t mass = mass_of(distance);
    uint32_t low = uint32_t(mass), before = atomic_add(&s->mass_low[bucket], low);
    uint32_t high = uint32_t(mass >> 32) + (before + low < before);
    if (high != 0) atomic_add(&s->mass_high[bucket], high);
}
// What the threads before this one have, in all.
__device__ __forceinline__ int64_t block_before(SampleShared* s, int64_t x) {
    int64_t sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        int64_t other = shuffle_up(sum, by);
        if (lane_index() >= by) sum += other;
    }
    block_sync();
    if (lane_index() == 31) s->sums[warp_index()] = sum;
    block_sync();
    int64_t before = sum - x;
    for (int i = 0; i < warp_index(); i++) before += s->sums[i];
    return before;
}
__device__ __forceinline__ int64_t mass_in(const SampleShared* s, int bucket) {
    return int64_t(s->mass_high[bucket]) << 32 | s->mass_low[bucket];
}
// The bucket in which count or mass reaches `target`, which is from 1 to the sum of all. nearer: what lies before all
// buckets.
__device__ __forceinline__ Crossing cross(SampleShared* s, const Buckets& b, int64_t target, bool is_by_mass,
                                          int64_t nearer = 0, int64_t nearer_mass = 0) {
    int first = int(threadIdx.x) * BUCKETS_EACH;
    int64_t count = 0, mass = 0;
    for (int i = first; i < first + BUCKETS_EACH; i++) count += s->counts[i], mass += mass_in(s, i);
    count = nearer + block_before(s, count), mass = nearer_mass + block_before(s, mass);
    for (int i = first; i < first + BUCKETS_EACH; i++) {
        int64_t inside = s->counts[i], inside_mass = mass_in(s, i);
        int64_t before = is_by_mass ? mass : count;
        if (before < target && target <= before + (is_by_mass ? inside_mass : inside)) {
            uint32_t low = b.first + (uint32_t(i) << b.shift);
            s->crossing = {i == 0 ? b.low : low, i == BUCKETS - 1 ? b.high : minimum(b.high, low + (1u << b.shift) - 1),
                           count, mass, inside, inside_mass};
        }
        count += inside, mass += inside_mass;
    }
    block_sync();
    return s->crossing;
}

// Takes a token into shared memory if there is room. Their order there does not matter.
__device__ __forceinline__ void keep(SampleShared* s, bool is_kept, float distance, int token) {
    uint32_t who = ballot(is_kept);
    if (who == 0) return;
    int first = 0;
    if (lane_index() == 0) first = atomic_add(&s->count, count_bits(who));
    int place = shuffle(first, 0) + count_bits(who & ((1u << lane_index()) - 1));
    if (is_kept && place < MAX_CANDIDATES) s->distances[place] = distance, s->ids[place] = token;
}

// A distance that surely holds `top_p` of the mass `total`; NO_MASS if only all tokens with a mass surely do.
template <class T>
__device__ __forceinline__ float top_p_bound(const Decision<T>& d, double total) {
    float needed = float(total * d.r.top_p) * 1.00001f;  // sums are in fp32
    float low = 0, high = NO_MASS;
    for (int i = 0; i < 12; i++) {
        float middle = 0.5f * (low + high);
        double surely = 0;
        for (int sub = threadIdx.x; sub < d.num_subs; sub += SAMPLE_THREADS) {
            float nearest = d.nearest(sub);
            if (nearest <= middle) {
                float all = expf(-nearest) * load(d.notes + sub);
                surely += maximum(expf(-nearest), all - (SUB - 1) * expf(-middle));
            }
        }
        bool is_enough = block_total_of(d.s, surely) >= needed;
        is_enough ? high = middle : low = middle;
    }
    return high;
}

// How near the candidates of a row with filters surely are; and the row's mass, where that is not the candidates' (or
// 0).
template <class T>
__device__ __forceinline__ double find_bound(Decision<T>& d) {
    const SampleRow<T>& r = d.r;
    d.bound = infinity();
    if (r.min_p > 0.0) d.bound = float(fabs(log(r.min_p)));
    if (r.has_top_k()) {  // if so many sub-blocks have a token each
        auto within = [&](uint32_t limit) {
            int64_t count = 0;
            for (int sub = threadIdx.x; sub < d.num_subs; sub += SAMPLE_THREADS)
                count += bits_of_float(d.nearest(sub)) <= limit;
            return block_total_of(d.s, count);
        };
        constexpr uint32_t INFINITE = 0x7F800000u;
        if (r.top_k <= within(INFINITE - 1))
            d.bound = minimum(d.bound, float_of_bits(reach(r.top_k, 0, INFINITE, within)));
    }
    if (!(r.top_p < 1.0)) return 0.0;
    d.bound = minimum(d.bound, NO_MASS);
    if (r.is_cut()) return 0.0;
    double mass = 0;
    for (int sub = threadIdx.x; sub < d.num_subs; sub += SAMPLE_THREADS) {
        float nearest = d.nearest(sub);
        if (nearest < infinity()) mass += double(expf(-nearest)) * double(load(d.notes + sub));
    }
    double total = block_total_of(d.s, mass);
    d.bound = top_p_bound(d, total);
    return d.bound < NO_MASS ? total : 0.0;
}

// What is known of the farthest distance that top_k and top_p keep, and how far a look has come.
struct Cut {
    Crossing by_count{.low = ~0u}, by_mass{.low = ~0u};  // ~0: no cut
    double whole = 0;  // the row's mass, 0 if it is that of the candidates
    int64_t mass = 0;  // of all candidates
    int64_t top_k = 0;
    double top_p = 1;
    __device__ __forceinline__ bool has_count() const { return by_count.low != ~0u; }
    __device__ __forceinline__ bool has_mass() const { return by_mass.low != ~0u; }
    // Mass that is to be reached if the candidates' is `mass`.
    __device__ __forceinline__ int64_t target(int64_t mass) const {
        double total = ceil((whole > 0.0 ? whole * double(MASS_ONE) : double(mass)) * top_p);
        return minimum(total < 1.0 ? int64_t(1) : int64_t(total), mass);
    }
    // What is nearer is surely kept.
    __device__ __forceinline__ uint32_t sure() const { return minimum(by_count.low, by_mass.low); }
    __device__ __forceinline__ bool is_open(uint32_t bits) const {
        return (bits >= by_count.low && bits <= by_count.high) || (bits >= by_mass.low && bits <= by_mass.high);
    }
};

// From a histogram of all candidates.
template <class T>
__device__ __forceinline__ Cut find_cut(const Decision<T>& d, const Buckets& b, double whole) {
    SampleShared* s = d.s;
    Cut cut{.whole = whole, .top_k = d.r.top_k, .top_p = d.r.top_p};
    if (d.r.has_top_k() && s->count > d.r.top_k) cut.by_count = cross(s, b, d.r.top_k, false);
    if (!(d.r.top_p < 1.0)) return cut;
    int64_t mass = 0;
    for (int i = threadIdx.x; i < BUCKETS; i += SAMPLE_THREADS) mass += mass_in(s, i);
    cut.mass = block_total_of(s, mass);
    int64_t least = cut.has_count() ? cut.by_count.mass : cut.mass;  // mass that top_k leaves
    int64_t most = cut.has_count() ? least + cut.by_count.inside_mass : cut.mass;
    Crossing far = cross(s, b, cut.target(most), true);
    cut.by_mass = cross(s, b, maximum(cut.target(least), int64_t(1)), true);
    cut.by_mass.inside = far.count + far.inside - cut.by_mass.count;
    cut.by_mass.high = far.high;
    return cut;
}

// Histograms of ever narrower ranges, until one distance is left.
template <class T>
__device__ __forceinline__ Crossing pin_down(const Decision<T>& d, Crossing c, int64_t target, bool is_by_mass) {
    while (c.low < c.high) {
        Buckets b = buckets_between(c.low, c.high);
        clear(d.s);
        d.look_up([&](bool is_candidate, float distance, int) {
            if (is_candidate) tally(d.s, b, distance, true);
        });
        block_sync();
        c = cross(d.s, b, target, is_by_mass, c.count, c.mass);
    }
    return c;
}

// Counts and masses of kept tokens from `low` to `high`.
__device__ __forceinline__ int64_t kept_weight(SampleShared* s, int count, uint32_t low, uint32_t high, bool is_mass) {
    int64_t sum = 0;
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
        uint32_t bits = bits_of_float(s->distances[i]);
        if (bits >= low && bits <= high) sum += is_mass ? mass_of(s->distances[i]) : 1;
    }
    return block_total_of(s, sum);
}

// The token with the lowest distance + log(E) of what the filters keep, of equal ones the lowest id.
template <class T>
__device__ __forceinline__ int64_t draw(Decision<T>& d) {
    const SampleRow<T>& r = d.r;
    SampleShared* s = d.s;
    bool is_ranked = r.has_top_k() || r.top_p < 1.0;
    double whole = 0;
    if (r.is_cut() || r.top_p < 1.0) {
        whole = find_bound(d);
    } else {
        float least = infinity();
        for (int sub = threadIdx.x; sub < d.num_subs; sub += SAMPLE_THREADS) {
            float nearest = d.nearest(sub);
            if (nearest < infinity()) least = minimum(least, add(nearest, logf(load(d.notes + sub))));
        }
        d.is_by_cost = true;
        d.most_cost = block_min_of(s, least) + COST_MARGIN;
    }
    float far = 0;
    for (int sub = threadIdx.x; sub < d.num_subs && is_ranked; sub += SAMPLE_THREADS) {
        float nearest = d.nearest(sub);
        if (nearest < infinity()) far = maximum(far, nearest);
    }
    far = -block_min_of(s, -far);
    Buckets all = first_buckets(minimum(bits_of_float(d.bound), LARGEST_BITS), far);
    clear(s);
    d.look_up([&](bool is_candidate, float distance, int token) {
        keep(s, is_candidate, distance, token);
        if (is_candidate && is_ranked) tally(s, all, distance, r.top_p < 1.0);
    });
    block_sync();
    Cut cut;
    if (is_ranked) cut = find_cut(d, all, whole);
    bool is_kept = s->count <= MAX_CANDIDATES, fits = is_kept;
    uint64_t least = ~uint64_t(0);
    if (!is_kept) {
        int64_t open = (cut.has_count() ? cut.by_count.inside : 0) + (cut.has_mass() ? cut.by_mass.inside : 0);
        fits = open <= MAX_CANDIDATES;
        if (!fits) {
            if (cut.has_count()) {
                cut.by_count = pin_down(d, cut.by_count, cut.top_k, false);
                cut.mass = cut.by_count.mass + cut.by_count.inside_mass;
                if (cut.has_mass()) cut.by_mass = {.low = 0, .high = cut.by_count.high};
            }
            if (cut.has_mass()) cut.by_mass = pin_down(d, cut.by_mass, cut.target(cut.mass), true);
        }
        uint32_t limit = cut.has_mass() ? cut.by_mass.high : cut.by_count.high;
        clear(s);
        d.look_up([&](bool is_candidate, float distance, int token) {
            uint32_t bits = bits_of_float(distance);
            if (fits) keep(s, is_candidate && cut.is_open(bits), distance, token);
            if (is_candidate && (fits ? bits < cut.sure() : bits <= limit))
                least = minimum(least, d.cost_of(distance, token));
        });
        block_sync();
    }
    if (fits) {
        int count = s->count;
        uint32_t limit = LARGEST_BITS;
        if (cut.has_count()) {
            const Crossing& c = cut.by_count;
            limit = reach(cut.top_k - c.count, c.low, c.high,
                          [&](uint32_t bits) { return kept_weight(s, count, c.low, bits, false); });
            cut.mass = c.mass + kept_weight(s, count, c.low, limit, true);
        }
        if (cut.has_mass()) {
            const Crossing& c = cut.by_mass;
            limit = reach(cut.target(cut.mass) - c.mass, c.low, c.high,
                          [&](uint32_t bits) { return kept_weight(s, count, c.low, bits, true); });
        }
        for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS)
            if (bits_of_float(s->distances[i]) <= limit) least = minimum(least, d.cost_of(s->distances[i], s->ids[i]));
    }
    return int64_t(block_least(s, least) & 0xFFFFFFFFu);
}

// The lowest id of the highest logit.
template <class T>
__device__ __forceinline__ int64_t likeliest(const Decision<T>& d) {
    uint64_t first = ~uint64_t(0);
    for (int sub = threadIdx.x; sub < d.num_subs; sub += SAMPLE_THREADS)
        if (load(d.highest + sub) == d.best) first = minimum(first, uint64_t(sub));
    int sub = int(block_least(d.s, first));
    uint64_t token = ~uint64_t(0);
    if (warp_index() == 0) {
        float x[8];
        int at = sub * SUB + lane_index() * 8;
        final_logits(d.r, at, x);
#pragma unroll
        for (int i = 7; i >= 0; i--)
            if (x[i] == d.best && at + i < d.r.vocab_size) token = uint64_t(at + i);
    }
    return int64_t(block_least(d.s, token));
}

template <class T>
__device__ __forceinline__ void decide(const SampleInputs& in, const SampleRow<T>& r, SampleShared* s, int row,
                                       int num_subs) {
    const float* highest = in.best + int64_t(row) * num_subs;
    Decision<T> d{.r = r, .s = s, .highest = highest, .notes = in.note + int64_t(row) * num_subs, .num_subs = num_subs,
                  .best = 0};
    float most = -infinity();
    for (int sub = threadIdx.x; sub < num_subs; sub += SAMPLE_THREADS) most = maximum(most, load(highest + sub));
    d.best = -block_min_of(s, -most);
    int64_t token = NOT_FINITE;
    if (d.best == -infinity()) {
        token = ALL_MASKED;
    } else if (d.best < infinity()) {
        token = r.is_drawn() ? draw(d) : likeliest(d);
    }
    if (threadIdx.x != 0) return;
    store(in.tokens + row, token);
    if (token >= 0 && r.has_penalties) store(r.counts + token, load(r.counts + token) + 1);
    store(in.counters + row, 0);
}

template <class T>
__global__ void __launch_bounds__(SAMPLE_THREADS, 2) sample_kernel(const SampleInputs in, int num_subs) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    auto* s = shared_memory<SampleShared>();
    int row = blockIdx.y;
    SampleRow<T> r = read_row<T>(in, row);
    for (int i = warp_index(); i < PIECE_SUBS; i += SAMPLE_WARPS) {
        int sub = blockIdx.x * PIECE_SUBS + i;
        if (sub < num_subs) survey_sub(in, r, row, sub, num_subs);
    }
    block_sync();
    if (threadIdx.x == 0) s->is_last = atomic_add_ordered(in.counters + row, 1) == int(gridDim.x) - 1;
    block_sync();
    if (s->is_last) decide(in, r, s, row, num_subs);
}

}  // namespace nemo
