#include "kernels.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#define NEMO_X86
#include <immintrin.h>
#endif
#define NEMO_INLINE inline __attribute__((always_inline)) NEMO_TARGET  // what is not of the target would be taken apart before
#ifdef __clang__
#define NEMO_UNROLL _Pragma("unroll")
#else
#define NEMO_UNROLL _Pragma("GCC unroll 16")  // arrays that are read at known places alone stay in registers
#endif

namespace nemo {
namespace {

constexpr int64_t SERIAL = 1 << 15;  // elements for which waking other threads costs more than they save
constexpr int SPAN = 64;             // outputs that a thread multiplies at once
constexpr int64_t PREPARED = 1 << 20;  // numbers of rows that a thread holds as it multiplies them
static_assert(SPAN % BLOCK == 0);

// Room of the calling thread, which stays its own.
float* scratch(size_t count) {
  thread_local std::vector<float> room;
  if (room.size() < count) room.resize(count);
  return room.data();
}

#ifdef NEMO_X86
namespace of_16 {
constexpr int LANES = 16;
#define NEMO_TARGET __attribute__((target("arch=x86-64-v4")))
#define NEMO_WIDEN(x) (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)(x))
#define NEMO_NARROW(x) (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(x))
#include "vector.h"
#include "rows.h"
#include "draw.h"
#include "product.h"
#undef NEMO_TARGET
}  // namespace of_16

namespace of_16_dots {
constexpr int LANES = 16;
#define NEMO_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define NEMO_DOTS
#include "vector.h"
#include "rows.h"
#include "product.h"
#undef NEMO_DOTS
#undef NEMO_TARGET
#undef NEMO_WIDEN
#undef NEMO_NARROW
}  // namespace of_16_dots

namespace of_8 {
constexpr int LANES = 8;
#define NEMO_TARGET __attribute__((target("arch=x86-64-v3")))
#define NEMO_WIDEN(x) (Words)_mm256_cvtepu16_epi32((__m128i)(x))
#define NEMO_NARROW(x) __builtin_convertvector(x, Halves)
#include "vector.h"
#include "rows.h"
#include "draw.h"
#include "product.h"
#undef NEMO_TARGET
#undef NEMO_WIDEN
}  // namespace of_8
#endif

namespace of_4 {  // SSE, NEON and the like
constexpr int LANES = 4;
#define NEMO_TARGET
#define NEMO_WIDEN(x) __builtin_convertvector(x, Words)
#undef NEMO_NARROW
#define NEMO_NARROW(x) __builtin_convertvector(x, Halves)
#include "vector.h"
#include "rows.h"
#include "draw.h"
#include "product.h"
#undef NEMO_TARGET
}  // namespace of_4

// The widest vectors that this machine has.
int lanes() {
#ifdef NEMO_X86
  if (__builtin_cpu_supports("x86-64-v4")) return 16;
  if (__builtin_cpu_supports("x86-64-v3")) return 8;
#endif
  return 4;
}

int LANES = lanes();
#ifdef NEMO_X86
const bool HAS_DOTS = __builtin_cpu_supports("avx512bf16");
#endif

template <class Args>
void one(const Args& args, int64_t i) {
#ifdef NEMO_X86
  if constexpr (std::is_same_v<Args, Attention<Bf16>>)
    if (LANES == 16 && HAS_DOTS) return of_16_dots::one(args, i);
  if (LANES == 16) return of_16::one(args, i);
  if (LANES == 8) return of_8::one(args, i);
#endif
  of_4::one(args, i);
}

void share(const Product& args, int thread, int threads) {
#ifdef NEMO_X86
  if (LANES == 16 && HAS_DOTS) return of_16_dots::share(args, thread, threads);
  if (LANES == 16) return of_16::share(args, thread, threads);
  if (LANES == 8) return of_8::share(args, thread, threads);
#endif
  of_4::share(args, thread, threads);
}

template <class T>
void one(const Embed<T>& a, int64_t i) {
  std::memcpy(a.y + i * a.width, a.table + a.ids[i] * a.width, a.width * sizeof(T));
}

// All rows at once: a later row's place follows from those before.
void one(const Batch& a, int64_t) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t slot = a.slots[row], start = a.starts[row], count = a.starts[row + 1] - start;
    const int64_t ahead = row < a.num_ahead ? a.ahead[row] : 0, first = a.num_computed[slot] + ahead;
    const bool repeats = row > 0 && row < a.num_ahead && slot == a.slots[row - 1] && ahead == a.ahead[row - 1];
    int64_t* pages = a.page_table + slot * a.table_stride;
    if (a.new_page[row] >= 0) pages[a.new_index[row]] = a.new_page[row];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = first + i;
      a.ids[start + i] = a.token_ids[slot * a.ids_stride + position];
      a.positions[start + i] = position;
      a.places[start + i] = repeats ? 0 : pages[position / a.page_size] * a.page_size + position % a.page_size;
    }
    a.lengths[row] = first + count;
  }
}

// All rows at once here too.
void one(const Advance& a, int64_t) {
  for (int64_t row = 0; row < a.rows; ++row) a.num_computed[a.slots[row]] = a.slots[row] > 0 ? a.lengths[row] : 0;
  for (int64_t i = 0; i < a.num_sampled; ++i) {
    const int64_t row = a.sampled[i], slot = a.slots[row];
    int32_t* ids = a.token_ids + slot * a.ids_stride;
    if (slot > 0)
      ids[a.lengths[row]] = static_cast<int32_t>(std::max<int64_t>(0, a.tokens[i]));
    else
      ids[0] = 0;
  }
}

// What an operation divides its work into.
template <template <class> class Args, class T>
int64_t units(const Args<T>& a) {
  return a.rows;
}
template <class T>
int64_t units(const Attention<T>& a) {
  return a.rows * a.kv_heads;
}
int64_t units(const Batch&) { return 1; }
int64_t units(const Advance&) { return 1; }

template <class Args>
void share(const Args& a, int thread, int threads) {
  const int64_t count = units(a), end = count * (thread + 1) / threads;
  for (int64_t i = count * thread / threads; i < end; ++i) one(a, i);
}

template <class Args>
void each(const Args& args, int64_t count, int64_t elements) {
#pragma omp parallel for schedule(dynamic) if (count > 1 && elements > SERIAL)
  for (int64_t i = 0; i < count; ++i) one(args, i);
}

}  // namespace

template <class T> void rms_norm(const Norm<T>& a) { each(a, a.rows, a.rows * a.width); }
template <class T> void silu_mul(const Activation<T>& a) { each(a, a.rows, a.rows * a.width); }
template <class T> void rope_and_append_kv(const Rope<T>& a) {
  each(a, a.rows, a.rows * (a.q_heads + 2 * a.kv_heads) * a.dim);
}
template <class T> void query_attention(const Attention<T>& a) {
  int64_t keys = 0;
  for (int64_t row = 0; row < a.rows; ++row) keys += a.seq_lens[row];
  each(a, a.rows * a.kv_heads, keys * a.heads * a.dim);
}

template <class T> void embed(const Embed<T>& a) { each(a, a.rows, a.rows * a.width); }
template <class T> void sample(const Sample<T>& a) { each(a, a.rows, 16 * a.rows * a.width); }
void build_batch(const Batch& a) { one(a, 0); }

void advance(const Advance& a) { one(a, 0); }

// Where the latest earlier place of the longest suffix ends, negative for none. ids: up to `last`, which is the last.
int64_t latest_match(const int32_t* ids, int64_t last, int64_t longest, int64_t shortest) {
  int64_t best = -1, best_length = shortest - 1;
  for (int64_t end = last - 1; end >= best_length; --end) {  // a suffix must begin in the text
    if (ids[end] != ids[last]) continue;
    int64_t length = 1;
    while (length < longest && length <= end && ids[end - length] == ids[last - length]) ++length;
    if (length <= best_length) continue;
    best = end, best_length = length;
    if (length == longest) break;
  }
  return best;
}

void draft(const Draft& a) {
  for (int64_t run = 0; run < a.rows; ++run) {
    const int64_t slot = a.slots[run * a.width], last = a.num_computed[slot];
    int32_t* ids = a.token_ids + slot * a.ids_stride;
    int64_t count = std::min(a.max_drafts, a.draft_until[slot] - 2 - last);
    const int64_t end = count > 0 ? latest_match(ids, last, a.longest, a.shortest) : -1;
    if (end < 0) count = 0;
    for (int64_t i = 0; i < count; ++i) ids[last + 1 + i] = ids[end + 1 + i];  // a short period goes on by itself
    for (int64_t place = 0; place < a.width; ++place) a.ahead[run * a.width + place] = std::min(place, count);
  }
}

void accept(const Accept& a) {
  for (int64_t run = 0; run < a.rows; ++run) {
    const int64_t slot = a.slots[run * a.width], last = a.num_computed[slot];
    const int64_t count = std::max<int64_t>(0, a.lengths[(run + 1) * a.width - 1] - 1 - last);
    int32_t* ids = a.token_ids + slot * a.ids_stride;
    int64_t *tokens = a.tokens + run * a.width, taken = 1;
    while (taken <= count && ids[last + taken] == tokens[taken - 1]) ++taken;
    if (slot > 0) {
      ids[last + taken] = static_cast<int32_t>(std::max<int64_t>(0, tokens[taken - 1]));
      a.num_computed[slot] = last + taken;
    }
    for (int64_t place = taken; place < a.width; ++place) tokens[place] = place <= count ? a.not_taken : a.not_drafted;
  }
}

void product(const Product& a) {
#pragma omp parallel if (a.rows * a.width * a.outputs > 8 * SERIAL)
  share(a, omp_get_thread_num(), omp_get_num_threads());
}

void replay(const std::vector<const std::vector<Call>*>& programs, int64_t rows) {
#pragma omp parallel
  for (const auto* calls : programs)
    for (const Call& call : *calls) {
      std::visit([&](auto args) {
        args.rows = rows;
        if constexpr (std::is_same_v<decltype(args), Advance>) args.num_sampled = rows;
        share(args, omp_get_thread_num(), omp_get_num_threads());
      }, call);
#pragma omp barrier
    }
}

bool set_lanes(int wanted) {
  if (wanted > lanes() || (wanted != 16 && wanted != 8 && wanted != 4)) return false;
  LANES = wanted;
  return true;
}

template void embed(const Embed<float>&);
template void embed(const Embed<Bf16>&);
template void sample(const Sample<float>&);
template void sample(const Sample<Bf16>&);
template void rms_norm(const Norm<float>&);
template void rms_norm(const Norm<Bf16>&);
template void silu_mul(const Activation<float>&);
template void silu_mul(const Activation<Bf16>&);
template void rope_and_append_kv(const Rope<float>&);
template void rope_and_append_kv(const Rope<Bf16>&);
template void query_attention(const Attention<float>&);
template void query_attention(const Attention<Bf16>&);

}  // namespace nemo
