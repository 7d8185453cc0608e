// The work on one row, on vectors of LANES numbers. Included once for each width, inside a namespace of its own.

constexpr int KEYS = 64;  // whose scores are held at once
constexpr int HEADS = 4;  // query heads that share a pass over their keys, at most

inline int left(int64_t width, int64_t i) { return static_cast<int>(std::min<int64_t>(LANES, width - i)); }

template <class T>
NEMO_INLINE void norm_row(const Norm<T>& a, int64_t row) {
  const T* x = a.x + row * a.width;
  Floats squares{};
  if (a.residual) {
    const T* residual = a.residual + row * a.width;
    T* sum = a.sum + row * a.width;
    for (int64_t i = 0; i < a.width; i += LANES) {
      const int n = left(a.width, i);
      Floats total = as_stored(load(x + i, n) + load(residual + i, n), x);
      store(sum + i, total, n);
      squares += total * total;
    }
    x = sum;
  } else {
    for (int64_t i = 0; i < a.width; i += LANES) {
      Floats one = load(x + i, left(a.width, i));
      squares += one * one;
    }
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(a.width) + a.eps);
  for (int64_t i = 0; i < a.width; i += LANES) {
    const int n = left(a.width, i);
    store(a.y + row * a.width + i, load(a.weight + i, n) * as_stored(load(x + i, n) * factor, x), n);
  }
}

template <class T>
NEMO_INLINE void activate_row(const Activation<T>& a, int64_t row) {
  const T *gate = a.gate_up + 2 * row * a.width, *up = gate + a.width;
  for (int64_t i = 0; i < a.width; i += LANES) {
    const int n = left(a.width, i);
    Floats x = load(gate + i, n);
    store(a.y + row * a.width + i, as_stored(x / (1.0f + exponential(-x)), gate) * load(up + i, n), n);
  }
}

template <class T>
NEMO_INLINE void rotate(const T* x, const float* angles, T* to, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int n = left(half, i);
    Floats cos = load(angles + i, n), sin = load(angles + half + i, n);
    Floats first = load(x + i, n), second = load(x + half + i, n);
    store(to + i, first * cos - second * sin, n);
    store(to + half + i, second * cos + first * sin, n);
  }
}

template <class T>
NEMO_INLINE void rope_token(const Rope<T>& a, int64_t token) {
  const float* angles = a.table + a.positions[token] * a.dim;
  const int64_t page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
  for (int64_t head = 0; head < a.q_heads; ++head)
    rotate(a.q + token * a.q_stride + head * a.dim, angles, a.rotated + (token * a.q_heads + head) * a.dim, a.dim / 2);
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    const int64_t place = ((page * a.kv_heads + head) * a.page_size + offset) * a.dim;
    rotate(a.k + token * a.k_stride + head * a.dim, angles, a.k_cache + place, a.dim / 2);
    std::memcpy(a.v_cache + place, a.v + token * a.v_stride + head * a.dim, a.dim * sizeof(T));
  }
}

// Asks for n numbers from p on to be brought into the core's second cache.
template <class T>
NEMO_INLINE void fetch(const T* p, int n) {
  for (int i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

// Where the keys of a block from `start` on lie in the cache, and their values too: pages lie anywhere. Returns how many they are.
template <class T>
NEMO_INLINE int find_keys(const Attention<T>& a, const int64_t* pages, int64_t kv_head, int64_t start, int64_t length, int64_t* places) {
  const int n = static_cast<int>(std::min<int64_t>(KEYS, length - start));
  int64_t page = start / a.page_size, offset = start % a.page_size;
  for (int t = 0; t < n; ++t, ++offset) {
    if (offset == a.page_size) ++page, offset = 0;
    places[t] = ((pages[page] * a.kv_heads + kv_head) * a.page_size + offset) * a.dim;
  }
  return n;
}

// out = out * keep + scores values, of C vectors of a head from `v` on; the last of them has `last` numbers.
template <int C, int N, class T>
NEMO_INLINE void add_values(const T* v, const int64_t* places, const float (&scores)[N][KEYS], const float (&keep)[N], int n, int last, Floats (*out)[N]) {
  Floats total[C][N] = {};  // summed for itself: rounding errors of short sums are small
  for (int t = 0; t < n; ++t)
    NEMO_UNROLL for (int c = 0; c < C; ++c) {
      Floats value = load(v + places[t] + c * LANES, c == C - 1 ? last : LANES);
      NEMO_UNROLL for (int h = 0; h < N; ++h) total[c][h] += value * scores[h][t];
    }
  NEMO_UNROLL for (int c = 0; c < C; ++c)
    NEMO_UNROLL for (int h = 0; h < N; ++h) out[c][h] = out[c][h] * keep[h] + total[c][h];
}

// Query heads `head` to `head + N - 1` of a row, which share a KV head, over all its keys: a running softmax over blocks of keys.
// CHUNKS: vectors of a head, where it is whole ones and their number is known to the compiler; 0 for any other head.
template <class T, int N, int CHUNKS>
NEMO_INLINE void attend(const Attention<T>& a, int64_t row, int64_t head) {
  typedef Factors<T> F;
  constexpr int SPACE = CHUNKS ? CHUNKS : MAX_HEAD_DIM / LANES, TOGETHER = LANES / 4;  // sums of values that stay in registers
  const int dim = CHUNKS ? CHUNKS * LANES : static_cast<int>(a.dim), chunks = CHUNKS ? CHUNKS : (dim + LANES - 1) / LANES;
  const int factors = CHUNKS ? CHUNKS * LANES / F::COUNT : (dim + F::COUNT - 1) / F::COUNT;
  const auto part = [&](int c) { return CHUNKS ? LANES : left(dim, c * LANES); };
  const auto factors_of = [&](int c) { return CHUNKS ? F::COUNT : std::min(F::COUNT, dim - c * F::COUNT); };
  const int64_t length = a.seq_lens[row], kv_head = head / (a.heads / a.kv_heads);
  const int64_t* pages = a.page_table + a.slot_ids[row] * a.table_stride;
  typename F::Vector q[SPACE][N];
  Floats out[SPACE][N];
  alignas(64) float scores[N][KEYS];
  int64_t places[2][KEYS];
  float top[N], mass[N];
  for (int h = 0; h < N; ++h) {
    for (int c = 0; c < factors; ++c) load_factors(a.q + (row * a.heads + head + h) * dim + c * F::COUNT, factors_of(c), q[c][h]);
    for (int c = 0; c < chunks; ++c) out[c][h] = Floats{};
    top[h] = -INFINITY;
    mass[h] = 0;
  }
  int n = find_keys(a, pages, kv_head, 0, length, places[0]);
  for (int64_t start = 0; start < length; start += KEYS) {
    const int64_t *here = places[start / KEYS % 2];
    int64_t* coming = places[(start / KEYS + 1) % 2];
    for (int t = 0; t < n; ++t) {
      fetch(a.v_cache + here[t], dim);  // while keys are multiplied their values come, and the next block's keys while values are added
      Floats dot[N] = {};
      for (int c = 0; c < factors; ++c) {
        typename F::Vector key;
        load_factors(a.k_cache + here[t] + c * F::COUNT, factors_of(c), key);
        for (int h = 0; h < N; ++h) dot[h] = add_products(dot[h], key, q[c][h]);
      }
      float sums[N];
      sum_each(dot, sums);
      for (int h = 0; h < N; ++h) scores[h][t] = sums[h] * a.scale;
    }
    float keep[N];
    for (int h = 0; h < N; ++h) {
      for (int t = n; t % LANES; ++t) scores[h][t] = -INFINITY;
      float most = top[h];
      for (int t = 0; t < n; t += LANES) most = std::max(most, largest(load(scores[h] + t)));
      keep[h] = top[h] == most ? 1.0f : std::exp(top[h] - most);
      // Only NaN, or infinities, leave no score above -infinity: nothing is subtracted then, and they stay what they are.
      const float less = most == -INFINITY ? 0.0f : most;
      Floats total{};
      for (int t = 0; t < n; t += LANES) {
        Floats weight = exponential(load(scores[h] + t) - less);
        store(scores[h] + t, weight);
        total += weight;
      }
      mass[h] = mass[h] * keep[h] + sum(total);
      top[h] = most;
    }
    const int num_coming = start + KEYS < length ? find_keys(a, pages, kv_head, start + KEYS, length, coming) : 0;
    for (int t = 0; t < num_coming; ++t) fetch(a.k_cache + coming[t], dim);
    int c = 0;
    for (; c + TOGETHER <= chunks; c += TOGETHER)
      add_values<TOGETHER, N>(a.v_cache + c * LANES, here, scores, keep, n, part(c + TOGETHER - 1), out + c);
    for (; c < chunks; ++c) add_values<1, N>(a.v_cache + c * LANES, here, scores, keep, n, part(c), out + c);
    n = num_coming;
  }
  for (int h = 0; h < N; ++h)
    for (int c = 0; c < chunks; ++c)
      store(a.out + (row * a.heads + head + h) * dim + c * LANES, out[c][h] / mass[h], part(c));
}

template <class T, int CHUNKS>
NEMO_INLINE void attend_group(const Attention<T>& a, int64_t row, int64_t kv_head) {
  const int64_t group = a.heads / a.kv_heads, end = (kv_head + 1) * group;
  for (int64_t head = kv_head * group; head < end;) {
    const int64_t count = end - head;
    if (count >= HEADS) {
      attend<T, HEADS, CHUNKS>(a, row, head);
      head += HEADS;
    } else if (count >= 2) {
      attend<T, 2, CHUNKS>(a, row, head);
      head += 2;
    } else {
      attend<T, 1, CHUNKS>(a, row, head);
      head += 1;
    }
  }
}

template <class T>
NEMO_INLINE void attend_unit(const Attention<T>& a, int64_t i) {
  if (a.seq_lens[i / a.kv_heads] == 0) {
    const int64_t count = a.heads / a.kv_heads * a.dim;
    std::fill_n(a.out + i * count, count, T{});
  } else if (a.dim == 128)
    attend_group<T, 128 / LANES>(a, i / a.kv_heads, i % a.kv_heads);
  else
    attend_group<T, 0>(a, i / a.kv_heads, i % a.kv_heads);
}

NEMO_TARGET inline void one(const Norm<float>& a, int64_t i) { norm_row(a, i); }
NEMO_TARGET inline void one(const Norm<Bf16>& a, int64_t i) { norm_row(a, i); }
NEMO_TARGET inline void one(const Activation<float>& a, int64_t i) { activate_row(a, i); }
NEMO_TARGET inline void one(const Activation<Bf16>& a, int64_t i) { activate_row(a, i); }
NEMO_TARGET inline void one(const Rope<float>& a, int64_t i) { rope_token(a, i); }
NEMO_TARGET inline void one(const Rope<Bf16>& a, int64_t i) { rope_token(a, i); }
NEMO_TARGET inline void one(const Attention<float>& a, int64_t i) { attend_unit(a, i); }
NEMO_TARGET inline void one(const Attention<Bf16>& a, int64_t i) { attend_unit(a, i); }
