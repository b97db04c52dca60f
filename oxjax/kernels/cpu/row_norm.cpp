#include "row_norm.h"

#include <algorithm>

#include "simd.h"

namespace oxjax {
namespace {

constexpr size_t kSums = 4;  // that a row adds up to side by side

// Sum of the numbers minus `minus`, or of the squares of that.
template <bool kSquares>
float sum(const float* x, size_t d, float minus) {
  f32x16 sums[kSums] = {};
  for (size_t i = 0; i < d; i += kSums * kLanes) {
    for (size_t j = 0; j < kSums && i + j * kLanes < d; ++j) {
      const size_t at = i + j * kLanes;
      f32x16 v = load_first(x + at, d - at) - minus;
      if (d - at < kLanes)
        for (size_t l = d - at; l < kLanes; ++l) v[l] = 0.0f;
      sums[j] = kSquares ? fma(v, v, sums[j]) : sums[j] + v;
    }
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls what(r) for every row, some of them at once.
template <typename What>
void for_rows(size_t rows, size_t d, const ParallelFor& parallel_for, What what) {
  constexpr size_t kNumbers = 1 << 13;  // of a task, about
  const size_t at_once = std::max<size_t>(kNumbers / d, 1);
  parallel_for((rows + at_once - 1) / at_once, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    for (size_t r = task * at_once; r < std::min(rows, (task + 1) * at_once); ++r) what(r);
  });
}

}  // namespace

void row_sum(const float* x, size_t rows, size_t d, float* out, const ParallelFor& parallel_for) {
  for_rows(rows, d, parallel_for, [&](size_t r) { out[r] = sum<false>(x + r * d, d, 0.0f); });
}

void row_norm(const float* x, size_t rows, size_t d, const float* weight, size_t n_weights, const float* bias,
              float eps, bool centred, float* out, const ParallelFor& parallel_for) {
  for_rows(rows, d, parallel_for, [&](size_t r) {
    const float* from = x + r * d;
    float* to = out + r * d;
    const float mean = centred ? sum<false>(from, d, 0.0f) / d : 0.0f;
    const float scale = 1.0f / std::sqrt(sum<true>(from, d, mean) / d + eps);
    for (size_t i = 0; i < d; i += kLanes) {
      f32x16 y = (load_first(from + i, d - i) - mean) * scale;
      if (weight) y *= load_first(weight + r % n_weights * d + i, d - i);
      if (bias) y += load_first(bias + i, d - i);
      store_first(to + i, y, d - i);
    }
  });
}

}  // namespace oxjax
