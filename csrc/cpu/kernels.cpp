#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#define NEMO_X86
#endif
#define NEMO_INLINE inline __attribute__((always_inline))

namespace nemo {
namespace {

constexpr int64_t SERIAL = 1 << 15;  // elements for which waking other threads costs more than they save

#ifdef NEMO_X86
namespace of_16 {
constexpr int LANES = 16;
#define NEMO_TARGET __attribute__((target("arch=x86-64-v4")))
#include "vector.h"
#include "rows.h"
#undef NEMO_TARGET
}  // namespace of_16

namespace of_8 {
constexpr int LANES = 8;
#define NEMO_TARGET __attribute__((target("arch=x86-64-v3")))
#include "vector.h"
#include "rows.h"
#undef NEMO_TARGET
}  // namespace of_8
#endif

namespace of_4 {  // SSE, NEON and the like
constexpr int LANES = 4;
#define NEMO_TARGET
#include "vector.h"
#include "rows.h"
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

const int LANES = lanes();

template <class Args>
void one(const Args& args, int64_t i) {
#ifdef NEMO_X86
  if (LANES == 16) return of_16::one(args, i);
  if (LANES == 8) return of_8::one(args, i);
#endif
  of_4::one(args, i);
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
  each(a, a.tokens, a.tokens * (a.q_heads + 2 * a.kv_heads) * a.dim);
}
template <class T> void query_attention(const Attention<T>& a) {
  int64_t keys = 0;
  for (int64_t row = 0; row < a.rows; ++row) keys += a.seq_lens[row];
  each(a, a.rows * a.kv_heads, keys * a.heads * a.dim);
}

template void rms_norm(const Norm<float>&);
template void rms_norm(const Norm<Bf16>&);
template void silu_mul(const Activation<float>&);
template void silu_mul(const Activation<Bf16>&);
template void rope_and_append_kv(const Rope<float>&);
template void rope_and_append_kv(const Rope<Bf16>&);
template void query_attention(const Attention<float>&);
template void query_attention(const Attention<Bf16>&);

}  // namespace nemo
