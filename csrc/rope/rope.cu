// Launches of the rotary embedding.
#include "rope/rope.cuh"

#include <bit>

#include "common/launch.h"

namespace nemo {

namespace {

// Heads of a team. Two share the angles, which are half of what is loaded then instead of two thirds, and have their
// four loads under way together. With few tokens one, for twice the blocks and the shortest way.
int heads_of_team(int64_t tokens, int all_heads, int num_sms) {
    return tokens * all_heads / ROPE_TEAMS < 4 * int64_t(num_sms) ? 1 : 2;
}

void check(const RopeInputs& in) {
    CHECK_RANGE(in.tokens, 1, 0x7FFFFFFF / 1024);
    CHECK_RANGE(in.num_heads, 1, 256);
    CHECK_RANGE(in.num_kv_heads, 1, 256);
    CHECK(in.page_size > 0 && std::has_single_bit(unsigned(in.page_size)), "page_size must be a power of two, got ",
          in.page_size);
    CHECK_POINTER(in.q_out);
    CHECK_POINTER(in.q);
    CHECK_POINTER(in.k);
    CHECK_POINTER(in.v);
    CHECK_POINTER(in.table);
    CHECK_ALIGNED(in.positions, 8);
    CHECK_ALIGNED(in.slot_mapping, 8);
    CHECK_STRIDE(in.q_stride, VECTOR);
    CHECK_STRIDE(in.k_stride, VECTOR);
    CHECK_STRIDE(in.v_stride, VECTOR);
}

template <class Cached>
void launch_rope(Cached* k_cache, Cached* v_cache, const float* k_scale, const float* v_scale, const RopeInputs& in,
                 Stream stream) {
    if (in.tokens == 0) return;
    check(in);
    CHECK_POINTER(k_cache);
    CHECK_POINTER(v_cache);
    CHECK_OPTIONAL(k_scale, 4);
    CHECK_OPTIONAL(v_scale, 4);
    int all_heads = in.num_heads + 2 * in.num_kv_heads;
    int heads = heads_of_team(in.tokens, all_heads, num_sms());
    Rope<Cached> p{.in = in,
                   .k_cache = k_cache,
                   .v_cache = v_cache,
                   .k_scale = k_scale,
                   .v_scale = v_scale,
                   .page_shift = std::countr_zero(unsigned(in.page_size)),
                   .teams_of_token = ceil_div(all_heads, heads)};
    int64_t blocks = ceil_div(in.tokens * p.teams_of_token, int64_t(ROPE_TEAMS));
    Launch how{.name = "rope_and_append_kv", .grid = dim3(unsigned(blocks)), .threads = ROPE_THREADS, .stream = stream};
    launch(how, heads == 1 ? rope_kernel<1, Cached> : rope_kernel<2, Cached>, p);
}

}  // namespace

void rope_and_append_kv(bf16* k_cache, bf16* v_cache, const RopeInputs& in, Stream stream) {
    launch_rope<bf16>(k_cache, v_cache, nullptr, nullptr, in, stream);
}

void rope_and_append_kv_fp8(fp8* k_cache, fp8* v_cache, const float* k_scale, const float* v_scale,
                            const RopeInputs& in, Stream stream) {
    launch_rope<fp8>(k_cache, v_cache, k_scale, v_scale, in, stream);
}

}  // namespace nemo
