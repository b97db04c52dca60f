#include "quantized_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace oxjax {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

namespace generic {
#define TARGET
constexpr int kTallest = 1;
constexpr bool kSigned = false;

INLINE f32x16 from_halves(const uint8_t* from) {
  f32x16 y;
  for (int i = 0; i < 16; ++i) {
    uint16_t h;
    std::memcpy(&h, from + 2 * i, 2);
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
      bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent != 0) {
      bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // a multiple of 2^-24
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      std::memcpy(&bits, &magnitude, 4);
      bits |= sign;
    }
    std::memcpy(reinterpret_cast<char*>(&y) + 4 * i, &bits, 4);
  }
  return y;
}

INLINE f32x16 from_bytes(const uint8_t* from) {
  f32x16 y;
  for (int i = 0; i < 16; ++i) y[i] = static_cast<int8_t>(from[i]);
  return y;
}

template <int kBits>
INLINE i32x16 dot(i32x16 sum, u8x64 codes, int32_t four) {
  int8_t inputs[4];
  std::memcpy(inputs, &four, 4);
  for (int j = 0; j < 4; ++j) sum += (i32x16)((u32x16)codes >> 8 * j & 255) * inputs[j];
  return sum;
}

#include "panel.h"
#undef TARGET
}  // namespace generic

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,f16c")))
constexpr int kTallest = 2;
constexpr bool kSigned = true;

INLINE TARGET f32x16 from_halves(const uint8_t* from) {
  __m256 both[2];
  for (int i = 0; i < 2; ++i) both[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
  f32x16 y;
  std::memcpy(&y, both, sizeof y);
  return y;
}

INLINE TARGET f32x16 from_bytes(const uint8_t* from) {
  __m256 both[2];
  for (int i = 0; i < 2; ++i)
    both[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i))));
  f32x16 y;
  std::memcpy(&y, both, sizeof y);
  return y;
}

// Sums of two products must fit 16 bits: 63 * 127 * 2 does, and so does 128 * 127 * 2 when codes are magnitudes
// whose signs the inputs take over.
template <int kBits>
INLINE TARGET i32x16 dot(i32x16 sum, u8x64 codes, int32_t four) {
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
}

#include "panel.h"
#undef TARGET
}  // namespace avx2

namespace avx512vnni {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
constexpr int kTallest = 8;
constexpr bool kSigned = false;

INLINE TARGET f32x16 from_halves(const uint8_t* from) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

INLINE TARGET f32x16 from_bytes(const uint8_t* from) {
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

template <int kBits>
INLINE TARGET i32x16 dot(i32x16 sum, u8x64 codes, int32_t four) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}

#include "panel.h"
#undef TARGET
}  // namespace avx512vnni
#endif

// A group that holds an infinity or NaN gets the scale NaN, one smaller than floats can divide by counts as zero.
Chunk quantized(const float* x) {
  constexpr uint32_t kInfinity = 0x7f800000;
  Chunk y{};
  uint32_t bits[kChunk], largest = 0;
  std::memcpy(bits, x, sizeof bits);
  for (uint32_t b : bits) largest = std::max(largest, b & 0x7fffffffu);
  float amax;
  std::memcpy(&amax, &largest, sizeof amax);
  if (largest >= kInfinity) y.scale = std::numeric_limits<float>::quiet_NaN();
  if (largest >= kInfinity || amax < 0x1p-100f) return y;
  y.scale = amax / 127.0f;
  const float inverse = 127.0f / amax;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits for a fraction: rounds to nearest, ties to even
  for (size_t i = 0; i < kChunk; ++i) {
    const int32_t code = static_cast<int32_t>(x[i] * inverse + kRound - kRound);
    y.codes[i] = static_cast<int8_t>(code);
    y.negated_halves[i / (kChunk / 2)] -= code;
  }
  y.negated_sum = y.negated_halves[0] + y.negated_halves[1];
  return y;
}

}  // namespace

bool Format::valid() const {
  return offset == (minima ? 0 : 1 << (bits - 1)) && generic::panel_product_for(*this) != nullptr;
}

size_t Format::panel_bytes(size_t d_in) const {
  const size_t levels = minima ? 2 : 1;
  const size_t bytes = d_in * kPanel * bits / 8 + levels * kPanel * (2 * scales(d_in) + sub_scales(d_in));
  return (bytes + 63) / 64 * 64;
}

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, vnni = false;
#endif
  return isa == Isa::kAvx512Vnni ? vnni : isa == Isa::kAvx2 ? avx2 : true;
}

const char* best_isa() {
  return supported(Isa::kAvx512Vnni) ? "AVX-512 VNNI" : supported(Isa::kAvx2) ? "AVX2" : "generic";
}

PanelProduct panel_product_for(const Format& format, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Vnni || (isa == Isa::kBest && supported(Isa::kAvx512Vnni)))
    return avx512vnni::panel_product_for(format);
  if (isa == Isa::kAvx2 || (isa == Isa::kBest && supported(Isa::kAvx2))) return avx2::panel_product_for(format);
#endif
  (void)isa;
  return generic::panel_product_for(format);
}

void quantize(const float* x, size_t chunks, Chunk* to) {
  for (size_t c = 0; c < chunks; ++c) to[c] = quantized(x + c * kChunk);
}

void quantized_matmul(const float* x, size_t rows, size_t d_in, const Weights* weights, size_t n_weights,
                      const ParallelFor& parallel_for, Isa isa) {
  const size_t chunks = d_in / kChunk;
  const std::unique_ptr<Chunk[]> inputs(new Chunk[rows * chunks]);
  constexpr size_t kRowsAtOnce = 16;
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    const size_t first = part * kRowsAtOnce, n = std::min(rows - first, kRowsAtOnce);
    quantize(x + first * d_in, n * chunks, &inputs[first * chunks]);
  });

  // A task is some panels of one matrix, by rows that stay in the second cache.
  constexpr size_t kTaskBytes = 128 << 10, kBlockBytes = 512 << 10;
  const size_t block = std::max<size_t>(kBlockBytes / d_in / 8, 1) * 8;
  struct Part {
    size_t tasks, panels_at_once, panels, bytes;
    PanelProduct product;
  };
  const std::unique_ptr<Part[]> parts(new Part[n_weights]);
  size_t tasks = 0;
  for (size_t i = 0; i < n_weights; ++i) {
    Part& p = parts[i];
    p.bytes = weights[i].format.panel_bytes(d_in);
    p.panels = (weights[i].d_out + kPanel - 1) / kPanel;
    p.panels_at_once = std::max<size_t>(kTaskBytes / p.bytes, 1);
    p.product = panel_product_for(weights[i].format, isa);
    p.tasks = (p.panels + p.panels_at_once - 1) / p.panels_at_once;
    tasks += p.tasks;
  }
  parallel_for(tasks, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    size_t i = 0;
    for (; task >= parts[i].tasks; ++i) task -= parts[i].tasks;
    const Part& p = parts[i];
    const Weights& w = weights[i];
    const size_t last_panel = std::min(p.panels, (task + 1) * p.panels_at_once);
    for (size_t first = 0; first < rows; first += block) {
      for (size_t panel = task * p.panels_at_once; panel < last_panel; ++panel) {
        const size_t width = std::min(kPanel, w.d_out - panel * kPanel);
        p.product(w.format, inputs.get() + first * chunks, std::min(block, rows - first), chunks,
                  w.panels + panel * p.bytes, w.out + first * w.d_out + panel * kPanel, w.d_out, width);
      }
    }
  });
}

}  // namespace oxjax
