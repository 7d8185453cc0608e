// Choosing a token of a row, on vectors of LANES numbers: sample_ of nemo_engine/ops/sample.py without penalties. Included once for each
// width, inside a namespace of its own.

constexpr float MASS = 0x1p40f;    // of the likeliest token
constexpr float SURELY_MORE = 23;  // no noise is below -ln 2^33
// ln x within 1 unit of the last place, for finite x from 2^-126 on: x = 2^n (1 + f), and the series of Cephes' logf for ln(1 + f).
NEMO_INLINE Floats logarithm(Floats x) {
  Ints bits = (Ints)x;
  Ints n = ((bits - 0x3f3504f3) >> 23);  // so that 1 + f is from sqrt(1/2) to sqrt(2)
  Floats f = (Floats)(bits - (n << 23)) - 1.0f, power = __builtin_convertvector(n, Floats), square = f * f;
  Floats y = all(7.0376836292e-2f);
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square + power * -2.12194440e-4f - 0.5f * square;
  return f + y + power * 0.693359375f;
}

NEMO_INLINE Words mixed(Words x) {
  x ^= x >> 16, x *= 0x21f0aaadu;
  x ^= x >> 15, x *= 0xd35a2d97u;
  return x ^ x >> 15;
}

// log(E(k, t)) of sampling.py, for tokens t.
NEMO_INLINE Floats log_exponential(Words tokens, uint64_t key) {
  Words x = mixed(mixed(tokens ^ static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
  Floats u = (__builtin_convertvector(x, Floats) + 0.5f) * -0x1p-32f;
  u = pick(u > 0x1p-24f - 1.0f, u, all(0x1p-24f - 1.0f));
  // ln(1 + u) = ln(w) u / (w - 1) where w is 1 + u as rounded: what was lost in w comes in again.
  Floats w = 1.0f + u, lost = w - 1.0f;
  Floats e = pick(lost == 0.0f, -u, logarithm(w) * -u / pick(lost == 0.0f, all(1.0f), lost));
  return logarithm(e);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The smallest of `width` distances within which the weights add up to `target`, by radix selection: bits of numbers that are not negative
// sort as they do. Of 31 bits it looks at 11, 11 and 9; after the first it goes on with what falls into the place that was reached.
template <class Weight>
inline float reach(const float* distance, int64_t width, int64_t target, Weight weight) {
  thread_local std::vector<int64_t> sums(1 << 11);
  thread_local std::vector<std::pair<uint32_t, int64_t>> rest;
  const auto place = [&target]() {
    uint32_t at = 0;
    while (at + 1 < sums.size() && sums[at] < target) target -= sums[at++];
    return at;
  };
  std::fill(sums.begin(), sums.end(), 0);
  for (int64_t i = 0; i < width; ++i) sums[bits_of(distance[i]) >> 20] += weight(i);
  uint32_t prefix = place();
  rest.clear();
  for (int64_t i = 0; i < width; ++i)
    if (bits_of(distance[i]) >> 20 == prefix) rest.emplace_back(bits_of(distance[i]), weight(i));
  for (int shift : {9, 0}) {
    const int bits = shift ? 11 : 9;
    std::fill(sums.begin(), sums.end(), 0);
    for (const auto& [key, mass] : rest)
      if (key >> (shift + bits) == prefix) sums[key >> shift & ((1u << bits) - 1)] += mass;
    prefix = prefix << bits | place();
  }
  float reached;
  std::memcpy(&reached, &prefix, sizeof reached);
  return reached;
}

// The farthest distance from the likeliest token that min_p, top_k and top_p leave; see draw of sampling.py. `distance` and `mass` end with
// whole vectors, where distances are infinite.
NEMO_INLINE float farthest(const float* distance, float* mass, int64_t width, double min_p, int64_t top_k, double top_p) {
  float limit = min_p > 0 ? static_cast<float>(-std::log(min_p)) : INFINITY;
  if (top_k < width) limit = std::min(limit, reach(distance, width, top_k, [](int64_t) { return 1; }));
  if (top_p >= 1) return limit;
  int64_t total = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats far = load(distance + i);
    store(mass + i, pick(far <= limit, exponential(-far) * MASS, Floats{}));
    for (int n = 0; n < LANES; ++n) total += static_cast<int64_t>(mass[i + n]);
  }
  const auto target = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(static_cast<double>(total) * top_p)));
  const auto weight = [mass](int64_t i) { return static_cast<int64_t>(mass[i]); };
  return std::min(limit, reach(distance, width, std::min(target, total), weight));
}

// The token of noise and distances that is nearest, of those within `limit`.
NEMO_INLINE int64_t nearest(const float* distance, int64_t width, float limit, uint64_t key) {
  Words tokens;
  for (int n = 0; n < LANES; ++n) tokens[n] = n;
  Floats best = all(INFINITY);
  Words at{};
  float bound = limit;
  for (int64_t i = 0; i < width; i += LANES, tokens += LANES) {
    const Floats far = load(distance + i);
    Ints is_near = far <= bound;
    bool any = false;
    for (int n = 0; n < LANES; ++n) any |= is_near[n] != 0;
    if (!any) continue;
    Floats cost = log_exponential(tokens, key) + far;
    Ints is_better = (cost < best) & is_near;
    at = (Words)(((Ints)tokens & is_better) | ((Ints)at & ~is_better));
    best = pick(is_better, cost, best);
    if (i % (16 * LANES) == 0) bound = std::min(limit, -largest(-best) + SURELY_MORE);
  }
  const float least = -largest(-best);
  int64_t token = width;
  for (int n = 0; n < LANES; ++n)
    if (best[n] == least) token = std::min<int64_t>(token, at[n]);
  return token;
}

inline uint64_t row_key(int64_t seed_key, int64_t position) {
  uint64_t z = static_cast<uint64_t>(seed_key) + static_cast<uint64_t>(position) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

template <class T>
NEMO_INLINE void sample_row(const Sample<T>& a, int64_t row) {
  const T* x = a.logits + row * a.width;
  Floats top = all(-INFINITY);
  Ints is_nan{};
  for (int64_t i = 0; i < a.width; i += LANES) {
    const int n = left(a.width, i);
    Floats some = load(x + i, n);
    for (int lane = n; lane < LANES; ++lane) some[lane] = -INFINITY;
    top = pick(some > top, some, top);
    is_nan |= some != some;
  }
  const float best = largest(top);
  bool has_nan = false;
  for (int n = 0; n < LANES; ++n) has_nan |= is_nan[n] != 0;
  if (has_nan || best == INFINITY) {
    a.tokens[row] = a.not_finite;
    return;
  }
  if (best == -INFINITY) {
    a.tokens[row] = a.all_masked;
    return;
  }
  const int64_t slot = a.slots[row];
  const float temperature = static_cast<float>(a.temperature[slot]);
  if (a.temperature[slot] == 0) {
    int64_t at = 0;
    for (; at + LANES <= a.width; at += LANES)
      if (largest(load(x + at)) == best) break;
    while (load(x + at, 1)[0] != best) ++at;
    a.tokens[row] = at;
    return;
  }
  const int64_t room = a.width + LANES;
  float* distance = scratch(2 * room);
  for (int64_t i = 0; i < a.width; i += LANES) {
    const int n = left(a.width, i);
    Floats far = (best - load(x + i, n)) / temperature;
    for (int lane = n; lane < LANES; ++lane) far[lane] = INFINITY;
    store(distance + i, (Floats)((Ints)far & 0x7fffffff));  // never negative, but for -0
  }
  const float limit = farthest(distance, distance + room, a.width, a.min_p[slot], a.top_k[slot], a.top_p[slot]);
  a.tokens[row] = nearest(distance, a.width, limit, row_key(a.seed_keys[slot], a.positions[row]));
}

NEMO_TARGET inline void one(const Sample<float>& a, int64_t i) { sample_row(a, i); }
NEMO_TARGET inline void one(const Sample<Bf16>& a, int64_t i) { sample_row(a, i); }
