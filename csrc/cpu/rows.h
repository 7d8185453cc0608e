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

// out = out * keep + scores v, of C vectors of a head; the last of them has `last` numbers.
template <int C, int N, class T>
NEMO_INLINE void add_values(const T* v, const float (&scores)[N][KEYS], const float (&keep)[N], int n, int dim, int last, Floats (*out)[N]) {
  Floats total[C][N] = {};  // summed for itself: rounding errors of short sums are small
  for (int t = 0; t < n; ++t)
    for (int c = 0; c < C; ++c) {
      Floats value = load(v + t * dim + c * LANES, c == C - 1 ? last : LANES);
      for (int h = 0; h < N; ++h) total[c][h] += value * scores[h][t];
    }
  for (int c = 0; c < C; ++c)
    for (int h = 0; h < N; ++h) out[c][h] = out[c][h] * keep[h] + total[c][h];
}

// Query heads `head` to `head + N - 1` of a row, which share a KV head, over all its keys: a running softmax over blocks of keys.
// CHUNKS: vectors of a head, where it is whole ones and their number is known to the compiler; 0 for any other head.
template <class T, int N, int CHUNKS>
NEMO_INLINE void attend(const Attention<T>& a, int64_t row, int64_t head) {
  constexpr int SPACE = CHUNKS ? CHUNKS : MAX_HEAD_DIM / LANES;
  const int dim = CHUNKS ? CHUNKS * LANES : static_cast<int>(a.dim), chunks = CHUNKS ? CHUNKS : (dim + LANES - 1) / LANES;
  const auto part = [&](int c) { return CHUNKS ? LANES : left(dim, c * LANES); };
  const int64_t length = a.seq_lens[row], kv_head = head / (a.heads / a.kv_heads);
  const int64_t* pages = a.page_table + a.slot_ids[row] * a.table_stride;
  Floats q[SPACE][N], out[SPACE][N];
  alignas(64) float scores[N][KEYS];
  float top[N], mass[N];
  for (int h = 0; h < N; ++h) {
    for (int c = 0; c < chunks; ++c) {
      q[c][h] = load(a.q + (row * a.heads + head + h) * dim + c * LANES, part(c)) * a.scale;
      out[c][h] = Floats{};
    }
    top[h] = -INFINITY;
    mass[h] = 0;
  }
  for (int64_t start = 0; start < length;) {
    const int64_t offset = start % a.page_size;
    const int n = static_cast<int>(std::min({int64_t(KEYS), a.page_size - offset, length - start}));
    const int64_t place = ((pages[start / a.page_size] * a.kv_heads + kv_head) * a.page_size + offset) * dim;
    const T *k = a.k_cache + place, *v = a.v_cache + place;
    // While keys are multiplied their values come, and the next block's keys while values are added: pages lie anywhere.
    const int64_t next = start + n;
    const T* coming = next < length ? a.k_cache + ((pages[next / a.page_size] * a.kv_heads + kv_head) * a.page_size + next % a.page_size) * dim : k;
    for (int t = 0; t < n; ++t) {
      fetch(v + t * dim, dim);
      Floats dot[N] = {};
      for (int c = 0; c < chunks; ++c) {
        Floats key = load(k + t * dim + c * LANES, part(c));
        for (int h = 0; h < N; ++h) dot[h] += key * q[c][h];
      }
      float sums[N];
      sum_each(dot, sums);
      for (int h = 0; h < N; ++h) scores[h][t] = sums[h];
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
    fetch(coming, KEYS * dim);
    int c = 0;
    for (; c + 2 <= chunks; c += 2) add_values<2, N>(v + c * LANES, scores, keep, n, dim, part(c + 1), out + c);
    if (c < chunks) add_values<1, N>(v + c * LANES, scores, keep, n, dim, part(c), out + c);
    start += n;
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
