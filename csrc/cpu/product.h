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

constexpr int AHEAD = 2048;  // numbers of a weight: 4 KiB, farther than the machine itself looks ahead

// Vector v of outputs, from a pair of a row on at `weight`.
template <bool IS_LAST>
NEMO_INLINE Words load_vector(const Bf16* weight, int64_t width, int v, int n) {
  const Bf16* pairs = weight + v * LANES / BLOCK * (BLOCK * width) + 2 * (v * LANES % BLOCK);
  if (v * LANES % BLOCK == 0) __builtin_prefetch(pairs + AHEAD);
  return load_pairs(pairs, IS_LAST ? std::max(0, n - v * LANES) : LANES);
}

// M rows of x (fp32, `width` apart) times V vectors of outputs, of whole blocks; or, if it is the last, of a block of n outputs.
template <int M, int V, bool IS_LAST>
NEMO_INLINE void multiply(const float* x, int64_t width, const Bf16* weight, Bf16* y, int64_t outputs, int n) {
  const int64_t stride = IS_LAST ? n : BLOCK;
  Floats sums[M][V];
  NEMO_UNROLL for (int m = 0; m < M; ++m)
    NEMO_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = Floats{};
  for (int64_t i = 0; i < width; i += 2, weight += 2 * stride) {
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
  }
  NEMO_UNROLL for (int m = 0; m < M; ++m)
    NEMO_UNROLL for (int v = 0; v < V; ++v)
      if (!IS_LAST || n > v * LANES) store(y + m * outputs + v * LANES, sums[m][v], IS_LAST ? n - v * LANES : LANES);
}

// `rows` rows times V vectors, which stay in the core's second cache while all rows pass.
template <int V, bool IS_LAST>
NEMO_INLINE void multiply_rows(const float* x, int64_t rows, int64_t width, const Bf16* weight, Bf16* y, int64_t outputs, int n) {
  for (; rows >= 4; rows -= 4, x += 4 * width, y += 4 * outputs) multiply<4, V, IS_LAST>(x, width, weight, y, outputs, n);
  if (rows == 3) multiply<3, V, IS_LAST>(x, width, weight, y, outputs, n);
  if (rows == 2) multiply<2, V, IS_LAST>(x, width, weight, y, outputs, n);
  if (rows == 1) multiply<1, V, IS_LAST>(x, width, weight, y, outputs, n);
}

// One or two rows by many vectors, so that many sums are under way; more rows by few, so that sums stay in registers.
NEMO_INLINE void multiply_span(const float* x, int64_t rows, int64_t width, const Bf16* weight, Bf16* y, int64_t outputs, int n) {
  constexpr int MANY = std::min(SPAN / LANES, 8), SOME = std::min(SPAN / LANES, 4), LAST = BLOCK / LANES, FEW = std::max(2, LAST);
  int i = 0;
  if (rows == 1)
    for (; n - i >= MANY * LANES; i += MANY * LANES) multiply<1, MANY, false>(x, width, weight + i * width, y + i, outputs, 0);
  if (rows == 2)
    for (; n - i >= SOME * LANES; i += SOME * LANES) multiply<2, SOME, false>(x, width, weight + i * width, y + i, outputs, 0);
  for (; n - i >= FEW * LANES; i += FEW * LANES) multiply_rows<FEW, false>(x, rows, width, weight + i * width, y + i, outputs, 0);
  for (; n - i >= BLOCK; i += BLOCK) multiply_rows<LAST, false>(x, rows, width, weight + i * width, y + i, outputs, 0);
  if (i < n) multiply_rows<LAST, true>(x, rows, width, weight + i * width, y + i, outputs, n - i);
}

// Rows `first` to `first + count - 1` of what is multiplied, in fp32, into `x`. spare: room for two rows of Bf16.
NEMO_INLINE void prepare(const Product& a, int64_t first, int64_t count, float* x, Bf16* spare, bool writes_sum) {
  for (int64_t row = first; row < first + count; ++row, x += a.width) {
    const Bf16* from = a.x + row * a.width;
    if (a.norm) {
      const Bf16* residual = a.residual ? a.residual + row * a.width : nullptr;
      norm_row(Norm<Bf16>{from, residual, a.norm, spare, writes_sum ? a.sum + row * a.width : spare + a.width, 1, a.width, a.eps}, 0);
      from = spare;
    } else if (a.is_activated) {
      activate_row(Activation<Bf16>{from + row * a.width, spare, 1, a.width}, 0);
      from = spare;
    }
    for (int64_t i = 0; i < a.width; i += LANES) {
      const int n = left(a.width, i);
      store(x + i, load(from + i, n), n);
    }
  }
}

// What thread `thread` of `threads` does of a product: it prepares all rows for itself, some at a time, and multiplies them by its outputs.
NEMO_TARGET inline void share(const Product& a, int thread, int threads) {
  const int64_t units = (a.outputs + SPAN - 1) / SPAN, begin = units * thread / threads, end = units * (thread + 1) / threads;
  const bool writes_sum = thread == 0 && a.residual;
  if (begin == end && !writes_sum) return;
  const int64_t chunk = std::clamp<int64_t>(PREPARED / a.width / 4 * 4, 4, 96), held = std::min(chunk, a.rows);
  float* x = scratch((held + 1) * a.width);
  for (int64_t first = 0; first < a.rows; first += chunk) {
    const int64_t count = std::min(chunk, a.rows - first);
    prepare(a, first, count, x, reinterpret_cast<Bf16*>(x + held * a.width), writes_sum);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit * SPAN;
      const int n = static_cast<int>(std::min<int64_t>(SPAN, a.outputs - start));
      multiply_span(x, count, a.width, a.weight + start * a.width, a.y + first * a.outputs + start, a.outputs, n);
    }
  }
}
