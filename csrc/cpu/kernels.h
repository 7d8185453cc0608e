// The kernels for CPUs. T is float or Bf16; statistics, rotations, scores and sums are in fp32. Pointers need no alignment.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

namespace nemo {

struct Bf16 {
  uint16_t bits;
};

constexpr int MAX_HEAD_DIM = 256;
constexpr int BLOCK = 16;  // outputs of a packed weight that lie together

template <class T>
struct Norm {
  const T *x, *residual, *weight;  // residual may be null
  T *y, *sum;                      // sum: of x and residual; not written without one
  int64_t rows, width;
  float eps;
};

template <class T>
struct Activation {
  const T* gate_up;  // (rows, 2 width)
  T* y;              // (rows, width)
  int64_t rows, width;
};

template <class T>
struct Rope {
  const T *q, *k, *v;  // (rows, heads, dim), rows a stride apart
  T* rotated;          // (rows, q_heads, dim), dense
  const float* table;  // (positions, 2, dim / 2)
  const int64_t *positions, *slots;
  T *k_cache, *v_cache;  // (pages, kv_heads, page_size, dim)
  int64_t rows, q_heads, kv_heads, dim, page_size, q_stride, k_stride, v_stride;
};

// A row is one query, which sees the first seq_lens[row] keys of its request; one that sees none is passed over.
template <class T>
struct Attention {
  const T* q;  // (rows, heads, dim), dense
  T* out;      // the same
  const T *k_cache, *v_cache;
  const int64_t *page_table, *slot_ids, *seq_lens;
  int64_t rows, heads, kv_heads, dim, page_size, table_stride;
  float scale;
};

// y = x weight^T, of bf16 numbers and summed in fp32. x is normed before if there is `norm` (with residual and sum as in Norm), or is
// gate_up, which is activated. weight: blocks of BLOCK outputs one after the other, the last may have fewer; in a block, by pairs of a row:
// the numbers 2 i and 2 i + 1 of the first output, of the second, ... `width` is even.
struct Product {
  const Bf16 *x, *residual, *norm, *weight;
  Bf16 *y, *sum;
  int64_t rows, width, outputs;
  bool is_activated;
  float eps;
};

// Rows of a table.
template <class T>
struct Embed {
  const T* table;  // (ids, width)
  const int64_t* ids;
  T* y;  // (rows, width)
  int64_t rows, width;
};

// See build_batch_ of nemo_engine/ops/batch.py.
struct Batch {
  const int32_t* token_ids;
  const int64_t* num_computed;
  int64_t* page_table;
  const int64_t *slots, *starts, *new_index, *new_page;
  const int64_t* ahead;  // of the first num_ahead rows
  int64_t *ids, *positions, *places, *lengths;
  int64_t rows, ids_stride, table_stride, page_size, num_ahead;
};

// See advance_ of nemo_engine/ops/batch.py.
struct Advance {
  int32_t* token_ids;
  int64_t* num_computed;
  const int64_t *slots, *lengths, *sampled, *tokens;
  int64_t rows, num_sampled, ids_stride;
};

// See draft_ of nemo_engine/ops/draft.py. `rows` are runs here, the first of each in `slots`.
struct Draft {
  int32_t* token_ids;
  const int64_t *num_computed, *draft_until, *slots;
  int64_t* ahead;  // (rows, width)
  int64_t rows, width, max_drafts, ids_stride, longest, shortest;
};

// See accept_ of nemo_engine/ops/draft.py. `rows` are runs here.
struct Accept {
  int32_t* token_ids;
  int64_t* num_computed;
  const int64_t *slots, *lengths;
  int64_t* tokens;
  int64_t rows, width, ids_stride, not_taken, not_drafted;
};

// The token that each row chooses: the likeliest, the first of equal ones, where its slot has a temperature of 0, or else what is drawn (see
// draw of nemo_engine/ops/sampling.py); or what TOKEN_NOT_FINITE and TOKEN_ALL_MASKED say of the row.
template <class T>
struct Sample {
  const T* logits;  // (rows, width)
  const int64_t *slots, *positions;
  const double *temperature, *min_p, *top_p;  // by slot, as the next two are
  const int64_t *top_k, *seed_keys;
  int64_t* tokens;
  int64_t rows, width, not_finite, all_masked;
};

template <class T> void rms_norm(const Norm<T>&);
template <class T> void silu_mul(const Activation<T>&);
template <class T> void rope_and_append_kv(const Rope<T>&);
template <class T> void query_attention(const Attention<T>&);
void product(const Product&);
template <class T> void embed(const Embed<T>&);
void build_batch(const Batch&);
void advance(const Advance&);
void draft(const Draft&);
void accept(const Accept&);
template <class T> void sample(const Sample<T>&);

// Calls to be done again, with other numbers of rows, in one go.
using Call = std::variant<Norm<float>, Norm<Bf16>, Activation<float>, Activation<Bf16>, Rope<float>, Rope<Bf16>, Attention<float>,
                          Attention<Bf16>, Product, Embed<float>, Embed<Bf16>, Batch, Sample<float>, Sample<Bf16>, Advance>;
void replay(const std::vector<const std::vector<Call>*>& programs, int64_t rows);

// Take vectors of so many numbers from now on, 16, 8 or 4; false, and nothing changes, if this machine has no such. For tests.
bool set_lanes(int);

}  // namespace nemo
