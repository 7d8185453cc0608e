// Products with a packed weight, on vectors of LANES numbers. Included once for each width, inside a namespace of its own.
//
// Sums run over the pairs of a row in order, whatever the number of rows and threads: a row has the same bits alone and among others.

// The first n of LANES pairs at p, as the bits of both.
NEMO_INLINE Words load_pairs(const Bf16* p, int n) {
  Words x{};
  if (n >= LANES)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, n * sizeof(uint32_t));
  return x;
}

#ifdef NEMO_DOTS
typedef Bf16 Number;  // of x as it is multiplied
constexpr int MOST = 6, AT_ONCE = 12;  // rows

NEMO_INLINE Words load_pair(const Bf16* x) {
  uint32_t both;
  std::memcpy(&both, x, sizeof both);
  return both - Words{};
}
#else
typedef float Number;
constexpr int MOST = 4, AT_ONCE = 4;
#endif
constexpr int64_t PART = 4096 / sizeof(Number);  // numbers of a row
constexpr int AHEAD = 2048;  // numbers of a weight: 4 KiB, farther than the machine itself looks ahead

// Vector v of outputs, from a pair of a row on at `weight`.
template <bool IS_LAST>
NEMO_INLINE Words load_vector(const Bf16* weight, int64_t width, int v, int n) {
  const Bf16* pairs = weight + v * LANES / BLOCK * (BLOCK * width) + 2 * (v * LANES % BLOCK);
  if (v * LANES % BLOCK == 0) __builtin_prefetch(pairs + AHEAD);
  return load_pairs(pairs, IS_LAST ? std::max(0, n - v * LANES) : LANES);
}

// What a thread multiplies at a time: pairs `begin` to `end` of rows by some outputs, the sums of which are kept between two such.
struct Tile {
  const Number* x;  // rows, `width` apart
  const Bf16* weight;
  float* sums;  // of a row's SPAN outputs, a row after the other
  Bf16* y;      // rows, `outputs` apart
  int64_t width, outputs, begin, end;

  NEMO_INLINE Tile of(int64_t row, int output) const {
    return {x + row * width, weight + output * width, sums + row * SPAN + output, y + row * outputs + output, width, outputs, begin, end};
  }
};

// M rows by V vectors of outputs, of whole blocks; or, if it is the last, by a block of n outputs.
template <int M, int V, bool IS_LAST>
NEMO_INLINE void multiply(const Tile& t, int n) {
  const int64_t stride = 2 * (IS_LAST ? n : BLOCK), width = t.width;
  const Number* x = t.x;
  Floats sums[M][V]{};
  if (t.begin)
    NEMO_UNROLL for (int m = 0; m < M; ++m)
      NEMO_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = load(t.sums + m * SPAN + v * LANES);
  const Bf16* weight = t.weight + t.begin / 2 * stride;
  for (int64_t i = t.begin; i < t.end; i += 2, weight += stride) {
#ifdef NEMO_DOTS
    Words both[V];
    NEMO_UNROLL for (int v = 0; v < V; ++v) both[v] = load_vector<IS_LAST>(weight, width, v, n);
    NEMO_UNROLL for (int m = 0; m < M; ++m) {
      const Words pair = load_pair(x + m * width + i);
      NEMO_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = add_products(sums[m][v], both[v], pair);
    }
#else
    // The fewer of both are held in registers, the other ones pass.
    if constexpr (M < V) {
      Floats first[M], second[M];
      NEMO_UNROLL for (int m = 0; m < M; ++m) first[m] = all(x[m * width + i]), second[m] = all(x[m * width + i + 1]);
      NEMO_UNROLL for (int v = 0; v < V; ++v) {
        const Words both = load_vector<IS_LAST>(weight, width, v, n);
        const Floats low = (Floats)(both << 16), high = (Floats)(both & 0xffff0000u);
        NEMO_UNROLL for (int m = 0; m < M; ++m) sums[m][v] += low * first[m];
        NEMO_UNROLL for (int m = 0; m < M; ++m) sums[m][v] += high * second[m];
      }
    } else {
      Floats low[V], high[V];
      NEMO_UNROLL for (int v = 0; v < V; ++v) {
        const Words both = load_vector<IS_LAST>(weight, width, v, n);
        low[v] = (Floats)(both << 16), high[v] = (Floats)(both & 0xffff0000u);
      }
      NEMO_UNROLL for (int m = 0; m < M; ++m) {
        const Floats first = all(x[m * width + i]), second = all(x[m * width + i + 1]);
        NEMO_UNROLL for (int v = 0; v < V; ++v) sums[m][v] += low[v] * first;
        NEMO_UNROLL for (int v = 0; v < V; ++v) sums[m][v] += high[v] * second;
      }
    }
#endif
  }
  NEMO_UNROLL for (int m = 0; m < M; ++m)
    NEMO_UNROLL for (int v = 0; v < V; ++v) {
      if (t.end < width)
        store(t.sums + m * SPAN + v * LANES, sums[m][v]);
      else if (!IS_LAST || n > v * LANES)
        store(t.y + m * t.outputs + v * LANES, sums[m][v], IS_LAST ? n - v * LANES : LANES);
    }
}

// `rows` rows, at most M.
template <int M, int V, bool IS_LAST>
NEMO_INLINE void multiply_at_once(const Tile& t, int64_t rows, int n) {
  if (rows == M)
    multiply<M, V, IS_LAST>(t, n);
  else if constexpr (M > 1)
    multiply_at_once<M - 1, V, IS_LAST>(t, rows, n);
}

// `rows` rows by V vectors, which stay in the core's second cache while all rows pass.
template <int M, int V, bool IS_LAST>
NEMO_INLINE void multiply_rows(const Tile& t, int64_t rows, int n) {
  for (int64_t row = 0, rest = rows; rest;) {
    const int64_t count = rest <= M ? rest : rest < 2 * M ? (rest + 1) / 2 : M;
    multiply_at_once<M, V, IS_LAST>(t.of(row, 0), count, n);
    row += count, rest -= count;
  }
}

// One or two rows by many vectors, so that many sums are under way; more rows by few, so that sums stay in registers. Some more rows than
// MOST meet a weight at once, so that they are multiplied while it comes from memory.
NEMO_INLINE void multiply_span(const Tile& t, int64_t rows, int n) {
  constexpr int MANY = std::min(SPAN / LANES, 8), SOME = std::min(SPAN / LANES, 4), LAST = BLOCK / LANES, FEW = std::max(LANES / 4, LAST);
  int i = 0;
  if (rows == 1)
    for (; n - i >= MANY * LANES; i += MANY * LANES) multiply<1, MANY, false>(t.of(0, i), 0);
  if (rows == 2)
    for (; n - i >= SOME * LANES; i += SOME * LANES) multiply<2, SOME, false>(t.of(0, i), 0);
  if (MOST < rows && rows <= AT_ONCE)
    for (; n - i >= 2 * LANES; i += 2 * LANES) multiply_at_once<AT_ONCE, 2, false>(t.of(0, i), rows, 0);
  for (; n - i >= FEW * LANES; i += FEW * LANES) multiply_rows<MOST, FEW, false>(t.of(0, i), rows, 0);
  for (; n - i >= BLOCK; i += BLOCK) multiply_rows<MOST, LAST, false>(t.of(0, i), rows, 0);
  if (i < n) multiply_rows<MOST, LAST, true>(t.of(0, i), rows, n - i);
}

// Rows `first` to `first + count - 1` of what is multiplied, where they are or in `room`. spare: room for two rows.
NEMO_INLINE const Number* prepare(const Product& a, int64_t first, int64_t count, Number* room, Bf16* spare, bool writes_sum) {
  constexpr bool IS_READY = std::is_same_v<Number, Bf16>;
  if (IS_READY && !a.norm && !a.is_activated) return reinterpret_cast<const Number*>(a.x + first * a.width);
  Number* x = room;
  for (int64_t row = first; row < first + count; ++row, x += a.width) {
    const Bf16* from = a.x + row * a.width;
    Bf16* to = IS_READY ? reinterpret_cast<Bf16*>(x) : spare;
    if (a.norm) {
      const Bf16* residual = a.residual ? a.residual + row * a.width : nullptr;
      norm_row(Norm<Bf16>{from, residual, a.norm, to, writes_sum ? a.sum + row * a.width : spare + a.width, 1, a.width, a.eps}, 0);
      from = to;
    } else if (a.is_activated) {
      activate_row(Activation<Bf16>{from + row * a.width, to, 1, a.width}, 0);
      from = to;
    }
    if constexpr (!IS_READY)
      for (int64_t i = 0; i < a.width; i += LANES) {
        const int n = left(a.width, i);
        store(x + i, load(from + i, n), n);
      }
  }
  return room;
}

// What thread `thread` of `threads` does of a product: it prepares all rows for itself, some at a time, and multiplies them by its outputs,
// a part of their width at a time if they are many, so that what passes again and again stays in the core's second cache.
NEMO_TARGET inline void share(const Product& a, int thread, int threads) {
  const int64_t units = (a.outputs + SPAN - 1) / SPAN, begin = units * thread / threads, end = units * (thread + 1) / threads;
  const bool writes_sum = thread == 0 && a.residual;
  if (begin == end && !writes_sum) return;
  const int64_t chunk = std::clamp<int64_t>(PREPARED / a.width / 12 * 12, 12, 96), held = std::min(chunk, a.rows);
  float* sums = scratch(held * SPAN + (held + 1) * a.width);
  Number* room = reinterpret_cast<Number*>(sums + held * SPAN);
  for (int64_t first = 0; first < a.rows; first += chunk) {
    const int64_t count = std::min(chunk, a.rows - first), part = count > AT_ONCE ? PART : a.width;
    const Number* x = prepare(a, first, count, room, reinterpret_cast<Bf16*>(room + held * a.width), writes_sum);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit * SPAN;
      const int n = static_cast<int>(std::min<int64_t>(SPAN, a.outputs - start));
      for (int64_t i = 0; i < a.width; i += part)
        multiply_span({x, a.weight + start * a.width, sums, a.y + first * a.outputs + start, a.width, a.outputs, i,
                       std::min(a.width, i + part)}, count, n);
    }
  }
}
