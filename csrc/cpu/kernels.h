// The kernels for CPUs. T is float or Bf16; statistics, rotations, scores and sums are in fp32. Pointers need no alignment.
#pragma once

#include <cstdint>

namespace nemo {

struct Bf16 {
  uint16_t bits;
};

constexpr int MAX_HEAD_DIM = 256;

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
  const T *q, *k, *v;  // (tokens, heads, dim), rows a stride apart
  T* rotated;          // (tokens, q_heads, dim), dense
  const float* table;  // (positions, 2, dim / 2)
  const int64_t *positions, *slots;
  T *k_cache, *v_cache;  // (pages, kv_heads, page_size, dim)
  int64_t tokens, q_heads, kv_heads, dim, page_size, q_stride, k_stride, v_stride;
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

template <class T> void rms_norm(const Norm<T>&);
template <class T> void silu_mul(const Activation<T>&);
template <class T> void rope_and_append_kv(const Rope<T>&);
template <class T> void query_attention(const Attention<T>&);

}  // namespace nemo
