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

KVC_INLINE Vec larger(Vec a, Vec b) {
#if KVC_LANES == 16
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return choose(a > b, a, b);
#endif
}

constexpr float LOG2_E = 1.44269504088896341f;

// 2^x for x <= 0 to about one unit in the last place; 0 for those that underflow. The
// polynomial is that of Cephes' exp2f.
KVC_INLINE Vec power_of_2(Vec x) {
#if KVC_LANES == 16
  x = (Vec)_mm512_max_ps((__m512)x, (__m512)all(-200.f));
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, 8);  // to the nearest
#else
  const IntVec alive = x > -126.f;
  x = choose(alive, x, all(0.f));
  const Vec magic = all(0x1.8p23f);  // adding it rounds to a whole number
  const Vec whole = (x + magic) - magic;
#endif
  const Vec rest = x - whole;
  Vec y = all(1.535336188319500e-4f);
  y = y * rest + 1.339887440266574e-3f;
  y = y * rest + 9.618437357674640e-3f;
  y = y * rest + 5.550332471162809e-2f;
  y = y * rest + 2.402264791363012e-1f;
  y = y * rest + 6.931472028550421e-1f;
  y = y * rest + 1.f;
#if KVC_LANES == 16
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  const IntVec power = __builtin_convertvector(whole, IntVec) << 23;
  return choose(alive, (Vec)((IntVec)y + power), all(0.f));
#endif
}

KVC_INLINE Vec exp_of_negative(Vec x) { return power_of_2(x * LOG2_E); }

// Whether an element of a is larger than that of b.
KVC_INLINE bool any_larger(Vec a, Vec b) {
#if KVC_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  const IntVec found = a > b;
  int32_t some = 0;
  for (int i = 0; i < LANES; ++i) some |= found[i];
  return some != 0;
#endif
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
