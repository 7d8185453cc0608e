// LANES fp32 numbers at a time, in the compiler's own vectors. Included once for each width, inside a namespace of its own: vectors wider
// than the machine's are taken apart by the compiler, through memory, and several times slower.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

NEMO_INLINE Floats all(float x) { return x - Floats{}; }  // of -0 too

NEMO_INLINE Floats pick(Ints mask, Floats yes, Floats no) {
  return mask ? yes : no;
}

// The first n of LANES numbers at p, the rest zero.
NEMO_INLINE Floats load(const float* p, int n = LANES) {
  Floats x{};
  if (n >= LANES)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, n * sizeof(float));
  return x;
}

NEMO_INLINE Floats load(const Bf16* p, int n = LANES) {
  Halves x{};
  if (n >= LANES)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, n * sizeof(Bf16));
  return (Floats)(NEMO_WIDEN(x) << 16);
}

// What `add_products` multiplies of a row of T: numbers, or pairs of bf16 numbers where one instruction adds both products.
template <class T>
struct Factors {
  typedef Floats Vector;
  static constexpr int COUNT = LANES;
};
NEMO_INLINE void load_factors(const float* p, int n, Floats& x) { x = load(p, n); }
NEMO_INLINE void load_factors(const Bf16* p, int n, Floats& x) { x = load(p, n); }
NEMO_INLINE Floats add_products(Floats sum, Floats x, Floats y) { return sum + x * y; }
#ifdef NEMO_DOTS
template <>
struct Factors<Bf16> {
  typedef Words Vector;
  static constexpr int COUNT = 2 * LANES;
};
NEMO_INLINE void load_factors(const Bf16* p, int n, Words& x) {
  x = Words{};
  if (n >= 2 * LANES)
    std::memcpy(&x, p, sizeof x);
  else
    std::memcpy(&x, p, n * sizeof(Bf16));
}
NEMO_INLINE Floats add_products(Floats sum, Words x, Words y) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#endif

NEMO_INLINE void store(float* p, Floats x, int n = LANES) {
  if (n >= LANES)
    std::memcpy(p, &x, sizeof x);
  else
    std::memcpy(p, &x, n * sizeof(float));
}

// To the nearest, ties to even; every NaN becomes the quiet one.
NEMO_INLINE Words rounded(Floats x) {
  Words bits = (Words)x;
  bits += 0x7fff + ((bits >> 16) & 1);
  Words is_nan = (Words)(x != x);
  return ((bits >> 16) & ~is_nan) | (is_nan & 0x7fc0);
}

NEMO_INLINE void store(Bf16* p, Floats x, int n = LANES) {
  Halves halves = NEMO_NARROW(rounded(x));
  if (n >= LANES)
    std::memcpy(p, &halves, sizeof halves);
  else
    std::memcpy(p, &halves, n * sizeof(Bf16));
}

// As if stored and loaded again.
NEMO_INLINE Floats as_stored(Floats x, const float*) { return x; }
NEMO_INLINE Floats as_stored(Floats x, const Bf16*) { return (Floats)(rounded(x) << 16); }

typedef float Four __attribute__((vector_size(16)));

NEMO_INLINE Four quarters(Floats x) {
  Four parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int n = LANES / 8; n; n /= 2)
    for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
  return parts[0];
}

NEMO_INLINE float sum(Floats x) {
  Four y = quarters(x);
  return (y[0] + y[1]) + (y[2] + y[3]);
}

// The sum of each.
template <int N>
NEMO_INLINE void sum_each(const Floats (&x)[N], float (&sums)[N]) {
  if constexpr (N == 4) {
    Four a = quarters(x[0]), b = quarters(x[1]), c = quarters(x[2]), d = quarters(x[3]);
    Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    Four all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    std::memcpy(sums, &all, sizeof all);
  } else {
    for (int i = 0; i < N; ++i) sums[i] = sum(x[i]);
  }
}

// NaN is passed over.
NEMO_INLINE float largest(Floats x) {
  x = pick(x == x, x, all(-std::numeric_limits<float>::infinity()));
  typedef decltype(Four{} > Four{}) Mask;
  Four parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int n = LANES / 8; n; n /= 2)
    for (int i = 0; i < n; ++i) {
      const Mask is_more = parts[i + n] > parts[i];
      parts[i] = (Four)(((Mask)parts[i + n] & is_more) | ((Mask)parts[i] & ~is_more));
    }
  const Four y = parts[0];
  return std::max(std::max(y[0], y[1]), std::max(y[2], y[3]));
}

// e^x within 2 units of the last place; 0 below -87.3, infinity above 88.7. x = n ln 2 + r, and e^r by its series to r^7.
NEMO_INLINE Floats exponential(Floats x) {
  Floats limited = pick(x < 89.0f, x, all(89.0f));
  limited = pick(limited > -88.0f, limited, all(-88.0f));
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  Floats n = limited * 1.44269504f + magic - magic;
  Floats r = limited - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Ints half = __builtin_convertvector(n, Ints) >> 1;  // 2^n in two factors, for n may be 128
  Ints rest = __builtin_convertvector(n, Ints) - half;
  y = y * (Floats)((half + 127) << 23) * (Floats)((rest + 127) << 23);
  y = pick(x < -87.3f, Floats{}, y);
  y = pick(x > 88.72284f, all(std::numeric_limits<float>::infinity()), y);
  return pick(x != x, x, y);
}
