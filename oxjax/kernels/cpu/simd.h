// Sixteen floats at a time, with the same bits on every processor: multiplications and additions are fused where
// fma() says so and nowhere else (-ffp-contract=off).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define OXJAX_INLINE inline __attribute__((always_inline))

namespace oxjax {

constexpr size_t kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

OXJAX_INLINE f32x16 broadcast(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

OXJAX_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#else
  for (size_t i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

template <typename V>
OXJAX_INLINE V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

OXJAX_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }

OXJAX_INLINE f32x16 load(const BFloat16* from) {
  return (f32x16)(__builtin_convertvector(load_as<u16x16>(from), u32x16) << 16);
}

OXJAX_INLINE f32x16 load(const Float16* from) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__)
  __m256 both[2];
  for (int i = 0; i < 2; ++i) both[i] = _mm256_cvtph_ps(load_as<__m128i>(from + 8 * i));
  return load_as<f32x16>(both);
#else
  const u32x16 halves = __builtin_convertvector(load_as<u16x16>(from), u32x16);
  f32x16 y;
  for (size_t i = 0; i < kLanes; ++i) {
    const uint32_t sign = (halves[i] & 0x8000) << 16, exponent = halves[i] >> 10 & 31, mantissa = halves[i] & 1023;
    const float small = static_cast<float>(mantissa) * 0x1p-24f;  // a multiple of 2^-24
    uint32_t bits = exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 0) std::memcpy(&bits, &small, sizeof bits);
    bits |= sign;
    std::memcpy(reinterpret_cast<char*>(&y) + 4 * i, &bits, sizeof bits);
  }
  return y;
#endif
}

OXJAX_INLINE f32x16 load(const int8_t* from) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
#else
  return __builtin_convertvector(load_as<i8x16>(from), f32x16);
#endif
}

// Whether dot_bytes() takes the offset of the codes off itself.
template <int kBits>
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
constexpr bool kCentresCodes = false;
#else
constexpr bool kCentresCodes = kBits == 8;
#endif

// sum += four codes of each of 16 outputs times four int8 inputs above -128. All is exact.
template <int kBits>
OXJAX_INLINE i32x16 dot_bytes(i32x16 sum, u8x64 codes, int32_t four) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  // Sums of two products must fit 16 bits: 63 * 127 * 2 does, and so does 128 * 127 * 2 when codes are magnitudes
  // whose signs the inputs take over.
  if (kBits == 8) codes ^= 128;
  __m256i sums[2], halves[2];
  std::memcpy(sums, &sum, sizeof sum);
  std::memcpy(halves, &codes, sizeof codes);
  const __m256i inputs = _mm256_set1_epi32(four);
  for (int i = 0; i < 2; ++i) {
    const __m256i pairs = kBits == 8
                              ? _mm256_maddubs_epi16(_mm256_abs_epi8(halves[i]), _mm256_sign_epi8(inputs, halves[i]))
                              : _mm256_maddubs_epi16(halves[i], inputs);
    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  std::memcpy(&sum, sums, sizeof sum);
  return sum;
#else
  int8_t inputs[4];
  std::memcpy(inputs, &four, 4);
  for (int j = 0; j < 4; ++j) sum += (i32x16)((u32x16)codes >> 8 * j & 255) * inputs[j];
  return sum;
#endif
}

OXJAX_INLINE void store(float* to, f32x16 v) { std::memcpy(to, &v, sizeof v); }

// The first n of 16 numbers, the rest zeros.
template <typename T>
OXJAX_INLINE f32x16 load_first(const T* from, size_t n) {
  if (n >= kLanes) return load(from);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (f32x16)_mm512_maskz_loadu_ps((1u << n) - 1, from);
#endif
  T all[kLanes] = {};
  std::memcpy(all, from, n * sizeof(T));
  return load(all);
}

OXJAX_INLINE void store_first(float* to, f32x16 v, size_t n) {
  if (n >= kLanes) return store(to, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (1u << n) - 1, (__m512)v);
#else
  std::memcpy(to, &v, n * sizeof(float));
#endif
}

OXJAX_INLINE f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Sum and largest of the lanes: halves of the vector, then quarters, and so on.
OXJAX_INLINE float sum_of(f32x16 v) {
  for (size_t half = kLanes / 2; half; half /= 2)
    for (size_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

OXJAX_INLINE float largest_of(f32x16 v) {
  for (size_t half = kLanes / 2; half; half /= 2)
    for (size_t i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

// e^x for x <= 0, to 1.2 units in the last place; 0 below the normal numbers, NaN for NaN.
// x = n ln 2 + r, and e^r by its Taylor polynomial, whose remainder is below 2^-26 for |r| <= ln 2 / 2.
OXJAX_INLINE f32x16 exp_of_negative(f32x16 x) {
  constexpr float kRound = 0x1.8p23f;
  const f32x16 lowest = broadcast(-87.0f), clamped = x < lowest ? lowest : x;
  const f32x16 shifted = fma(clamped, broadcast(0x1.715476p0f), broadcast(kRound)), n = shifted - kRound;
  f32x16 r = fma(n, broadcast(-0x1.62e4p-1f), clamped);  // ln 2 in two parts; n times the first is exact
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  f32x16 y = broadcast(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, broadcast(c));
  y = (f32x16)((i32x16)y + (((i32x16)shifted - (i32x16)broadcast(kRound)) << 23));
  return x < lowest ? f32x16{} : x == x ? y : x;
}

// log x for normal x > 0, to 1.1 units in the last place: the exponent, and the rational part of Cephes' logf.
OXJAX_INLINE f32x16 log_of_positive(f32x16 x) {
  // x = m 2^e with m from sqrt(1/2) to sqrt(2).
  const i32x16 bits = (i32x16)x - (i32x16)broadcast(0x1.6a09e6p-1f);
  const f32x16 e = __builtin_convertvector(bits >> 23, f32x16);
  const f32x16 r = (f32x16)((i32x16)x - (bits & ~0x7fffff)) - 1.0f, square = r * r;
  f32x16 y = broadcast(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    y = fma(y, r, broadcast(c));
  y = fma(e, broadcast(-2.12194440e-4f), y * square * r);  // ln 2 in two parts, as there
  y = fma(square, broadcast(-0.5f), y) + r;
  return fma(e, broadcast(0.693359375f), y);
}

// log(1 + x) for -1 < x <= 0: what rounding 1 + x has lost is made up for by its share of the result.
OXJAX_INLINE f32x16 log1p_of_negative(f32x16 x) {
  const f32x16 one = 1.0f + x;
  return log_of_positive(one) + (x - (one - 1.0f)) / one;
}

// Whether any lane of a comparison is true.
OXJAX_INLINE bool any(i32x16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t all = 0;
  for (size_t i = 0; i < kLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// tanh: an odd polynomial near 0 (Cephes), else by e^(-2|x|).
OXJAX_INLINE f32x16 tanh_of(f32x16 x) {
  const f32x16 size = x < 0.0f ? -x : x, e = exp_of_negative(-2.0f * size), square = x * x;
  f32x16 near = broadcast(-5.70498872745e-3f);
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    near = fma(near, square, broadcast(c));
  near = fma(near * square, x, x);
  const f32x16 far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// Blocks of `s` columns of row i change places with those of row i + s.
template <size_t s>
OXJAX_INLINE void exchange(f32x16 v[kLanes]) {
#define OXJAX_KEPT(j) ((j) & s ? kLanes + (j) - s : (j))
#define OXJAX_SENT(j) ((j) & s ? kLanes + (j) : (j) + s)
#define OXJAX_ALL(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes; ++i) {
    if (i & s) continue;
    const f32x16 a = v[i], b = v[i + s];
    v[i] = __builtin_shufflevector(a, b, OXJAX_ALL(OXJAX_KEPT));
    v[i + s] = __builtin_shufflevector(a, b, OXJAX_ALL(OXJAX_SENT));
  }
#undef OXJAX_KEPT
#undef OXJAX_SENT
#undef OXJAX_ALL
}

// Rows become columns.
OXJAX_INLINE void transpose(f32x16 v[kLanes]) {
  exchange<8>(v);
  exchange<4>(v);
  exchange<2>(v);
  exchange<1>(v);
}

#if defined(__AVX512VNNI__)
constexpr const char* kInstructions = "AVX-512 VNNI";
#elif defined(__AVX512F__)
constexpr const char* kInstructions = "AVX-512";
#elif defined(__AVX2__)
constexpr const char* kInstructions = "AVX2";
#else
constexpr const char* kInstructions = "generic";
#endif

}  // namespace oxjax
