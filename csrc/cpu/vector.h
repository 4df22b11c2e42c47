// Vectors of floats as wide as the instruction set that a file is compiled for, by the
// compiler's own vector types. Included inside an anonymous namespace of that file.

#ifndef KVC_LANES
#error "KVC_LANES: floats in a vector of this instruction set"
#endif

constexpr int64_t LANES = KVC_LANES;

typedef float Vec __attribute__((vector_size(4 * KVC_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * KVC_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * KVC_LANES)));
typedef _Float16 HalfFloats __attribute__((vector_size(2 * KVC_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(KVC_LANES)));

#define KVC_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  _Float16 value;
};
struct Float8 {  // e4m3fn
  uint8_t bits;
};

KVC_INLINE Vec all(float x) { return Vec{} + x; }

KVC_INLINE void add_product(Vec& to, Vec factor, Vec column) { to += factor * column; }

KVC_INLINE Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

KVC_INLINE Vec load(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return (Vec)(__builtin_convertvector(x, IntVec) << 16);
}

KVC_INLINE Vec load(const Float16* from) {
  HalfFloats x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Vec);
}

// Sign, exponent and mantissa move to where float32 has them; the exponent's bias
// differs by 120, which a factor mends, for subnormals too. NaN has all bits set.
KVC_INLINE Vec load(const Float8* from) {
  Bytes x;
  std::memcpy(&x, from, sizeof(x));
  const IntVec wide = __builtin_convertvector(x, IntVec), low = wide & 0x7f;
  const Vec found = (Vec)(low << 20) * 0x1p120f;
  const IntVec sign = (wide & 0x80) << 24, nan = (low == 0x7f) & 0x7fc00000;
  return (Vec)((IntVec)found | sign | nan);
}

template <typename T, typename V>
KVC_INLINE void store(T* to, V x) {
  static_assert(sizeof(x) == LANES * sizeof(T), "one vector");
  std::memcpy(to, &x, sizeof(x));
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline float widen(Float16 x) { return float(x.value); }
inline float widen(Float8 x) {
  const int32_t low = (x.bits & 0x7f) << 20, sign = int32_t(x.bits >> 7) << 31;
  float wide;
  std::memcpy(&wide, &low, sizeof(wide));
  wide *= 0x1p120f;
  if ((x.bits & 0x7f) == 0x7f) wide = std::numeric_limits<float>::quiet_NaN();
  return sign ? -wide : wide;
}

KVC_INLINE IntVec load_bits(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, IntVec);
}

// Every 8-bit float is one of 16 bits, too.
KVC_INLINE IntVec load_bits(const Float8* from) {
  return ((IntVec)load(from) >> 16) & 0xffff;
}

inline int32_t bits_of(BFloat16 x) { return x.bits; }
inline int32_t bits_of(Float8 x) {
  const float wide = widen(x);
  int32_t bits;
  std::memcpy(&bits, &wide, sizeof(bits));
  return (bits >> 16) & 0xffff;
}

// Two neighbouring elements of a vector, which one instruction multiplies by two others.
struct Pair {
  int32_t bits;
};

KVC_INLINE IntVec all(Pair x) { return IntVec{} + x.bits; }

KVC_INLINE IntVec load(const Pair* from) {
  IntVec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

#ifdef KVC_PAIRS
KVC_INLINE void add_product(Vec& to, IntVec factor, IntVec column) {
  to = (Vec)_mm512_dpbf16_ps((__m512)to, (__m512bh)factor, (__m512bh)column);
}
#endif

KVC_INLINE Vec choose(IntVec where, Vec yes, Vec no) {
  return (Vec)((where & (IntVec)yes) | (~where & (IntVec)no));
}

KVC_INLINE Vec larger(Vec a, Vec b) { return choose(a > b, a, b); }

// exp(x) for x <= 0 to about one unit in the last place; 0 below -87. The polynomial
// is that of Cephes' expf.
KVC_INLINE Vec exp_of_negative(Vec x) {
  const IntVec alive = x > -87.f;
  x = choose(alive, x, all(0.f));
  const Vec magic = all(0x1.8p23f);  // adding it rounds to a whole number
  const Vec whole = (x * 1.44269504088896341f + magic) - magic;
  const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec y = all(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.f;
  const IntVec power = __builtin_convertvector(whole, IntVec) << 23;
  return choose(alive, (Vec)((IntVec)y + power), all(0.f));
}

KVC_INLINE Vec tanh(Vec x) {
  const IntVec sign = (IntVec)x & INT32_MIN;
  const Vec small = exp_of_negative(-2.f * (Vec)((IntVec)x & INT32_MAX));
  return (Vec)((IntVec)((1.f - small) / (1.f + small)) | sign);
}

KVC_INLINE float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

KVC_INLINE float largest(Vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
