// A vector of as many fp32 lanes as a register of the instruction set holds, by the vector extensions of GCC and Clang.
//
// Included inside the namespace of an instruction set, see isa.h.
#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(lanes * 2)));

template <class V, class T>
inline V load_as(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V, class T>
inline void store_as(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

struct Vec {
  Floats v;

  Vec() = default;
  Vec(Floats v) : v(v) {}
  Vec(float x) : v(x - Floats{}) {}
  static Vec load(const float* from) { return load_as<Floats>(from); }
  void store(float* to) const { store_as(to, v); }

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend Ints operator<(Vec a, Vec b) { return a.v < b.v; }  // all bits of a lane, or none
};
// Returns a where the bits of a lane are set, else b.
inline Vec choose(Ints where, Vec a, Vec b) { return (Floats)((where & (Ints)a.v) | (~where & (Ints)b.v)); }
// Return b where either is NaN. This is one instruction; of a > b ? a : b the compiler makes two, which is what NEON takes: both of its
// maxima treat NaN otherwise.
#if defined(__AVX512F__)
inline Vec maximum(Vec a, Vec b) { return (Floats)_mm512_max_ps((__m512)a.v, (__m512)b.v); }
inline Vec minimum(Vec a, Vec b) { return (Floats)_mm512_min_ps((__m512)a.v, (__m512)b.v); }
#elif defined(__AVX2__)
inline Vec maximum(Vec a, Vec b) { return (Floats)_mm256_max_ps((__m256)a.v, (__m256)b.v); }
inline Vec minimum(Vec a, Vec b) { return (Floats)_mm256_min_ps((__m256)a.v, (__m256)b.v); }
#else
inline Vec maximum(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec minimum(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
#endif

// Returns whether any lane of a is below that of b.
inline bool any_below(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, _CMP_LT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.v, (__m256)b.v, _CMP_LT_OQ)) != 0;
#elif defined(BUPO_NEON)
  return vmaxvq_u32((uint32x4_t)(a < b)) != 0;
#else
  const Ints below = a < b;
  std::int32_t bits = 0;
  for (int i = 0; i < lanes; i++) bits |= below[i];
  return bits != 0;
#endif
}

// Returns e^x for x ≤ 0 within 1 ulp, and 0 below −87, where e^x would be subnormal, and slow. x = n ln 2 + r with |r| ≤ ln 2 / 2,
// and ln 2 is in two parts, the first with so few digits that n times it is exact, with FMA and without (constants of Cephes'
// expf).
inline Vec exponential(Vec x) {
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to the nearest integer, which then fills the low bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec(1.9875691500e-4f) * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec e = (p * (r * r) + r) + 1.0f;
  return choose(x < -87.0f, 0.0f, (Floats)((Words)e.v + ((Words)shifted.v << 23)));
}

// Returns p with ln(1 + x) = x − x²/2 + x³ p, for 1 + x from √½ to √2 (constants of Cephes' logf).
inline Vec logarithm_cubic(Vec x) {
  Vec p = Vec(7.0376836292e-2f) * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  return p * x + 3.3333331174e-1f;
}

// Returns ln x within 2 ulp of the larger of ln x and 1, for x > 0 that is not subnormal: of x = 2^n y with y near 1.
inline Vec logarithm(Vec x) {
  const Words bits = (Words)x.v, above = bits - 0x3f3504f3u;  // the bits of √½
  const Ints exponent = (Ints)above >> 23;
  const Vec n = __builtin_convertvector(exponent, Floats), f = Vec((Floats)(bits - ((Words)exponent << 23))) - 1.0f, square = f * f;
  const Vec rest = (f * square * logarithm_cubic(f) - n * 2.12194440e-4f) - square * 0.5f;
  return (f + rest) + n * 0.693359375f;
}

// Returns tanh x within 2 ulp: an odd polynomial near 0, where (1 − e^−2x) / (1 + e^−2x) would cancel (constants of Cephes' tanhf).
inline Vec hyperbolic_tangent(Vec x) {
  const Vec square = x * x, size = maximum(x, 0.0f - x);
  Vec p = Vec(-5.70498872745e-3f) * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec e = exponential(size * -2.0f), far = (Vec(1.0f) - e) / (Vec(1.0f) + e);
  return choose(size < 0.625f, p * square * x + x, choose(x < 0.0f, 0.0f - far, far));
}

// Returns ln((1 + x) / 2) for x in [0, 1] within 2^-22, and 0 for 1.
inline Vec log_of_mean_with_one(Vec x) {
  const Ints low = x < 0.41421356f;
  const Vec z = choose(low, x, (x - 1.0f) * 0.5f);
  const Vec square = z * z;
  return (logarithm_cubic(z) * z - 0.5f) * square + z - choose(low, 0.69314718056f, 0.0f);
}

// Returns the bits of bf16(x), rounded to nearest even, in the upper half of each word; the lower half is undefined.
inline Words rounded_to_bf16(Vec x) {
  const Words bits = (Words)x.v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline Halves bf16(Vec x) { return __builtin_convertvector(rounded_to_bf16(x) >> 16, Halves); }
inline Vec from_bf16(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

// Return fp16 as fp32, which is exact, and fp32 as fp16, rounded to nearest even and from 65,520 on to infinity.
#if defined(__AVX512F__)
inline Vec from_fp16(Halves bits) { return (Floats)_mm512_cvtph_ps((__m256i)bits); }
inline Halves fp16(Vec x) { return (Halves)_mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__F16C__)
inline Vec from_fp16(Halves bits) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
inline Halves fp16(Vec x) { return (Halves)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
// An exponent of fp32 is 112 above that of fp16; that of infinity and NaN twice that. A subnormal x of fp16 is (2^-14 + x) - 2^-14,
// of numbers that are not subnormal in fp32: so it stays where the thread takes subnormals for 0.
inline Vec from_fp16(Halves bits) {
  const Words wide = __builtin_convertvector(bits, Words), size = (wide & 0x7fffu) << 13, sign = (wide & 0x8000u) << 16;
  const Ints small = size < (0x0400u << 13), special = size >= (0x7c00u << 13);
  const Words above = size + (112u << 23) + ((Words)special & (112u << 23));
  const Vec below = Vec((Floats)(size + (113u << 23))) - 0x1p-14f;
  return (Floats)((Words)choose(small, below, (Floats)above).v | sign);
}
// A step of fp16's subnormals is one of fp32 from ½ on.
inline Halves fp16(Vec x) {
  const Words bits = (Words)x.v, size = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const Words rounded = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  const Words below = (Words)(Vec((Floats)size) + 0.5f).v - 0x3f000000u;
  Words found = (Words)choose(size < (113u << 23), (Floats)below, (Floats)rounded).v;
  found = (Words)choose(size >= (143u << 23) - 0x1000u, (Floats)(0x7c00u + Words{}), (Floats)found).v;
  found = (Words)choose(size > 0x7f800000u, (Floats)(0x7e00u + Words{}), (Floats)found).v;
  return __builtin_convertvector(found | sign, Halves);
}
#endif
