#include "rotate.h"

#include <algorithm>
#include <cmath>

namespace oxjax {
namespace {

template <bool kAdjacent>
void rotate_head(const float* x, const float* cos, const float* sin, size_t half, float* __restrict out) {
  const size_t step = kAdjacent ? 2 : 1, gap = kAdjacent ? 1 : half;
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + gap];
    out[i * step] = std::fma(a, cos[i], -(b * sin[i]));
    out[i * step + gap] = std::fma(a, sin[i], b * cos[i]);
  }
}

}  // namespace

void rotate(const float* x, size_t rows, size_t heads, size_t d, const float* cos, const float* sin, size_t half,
            bool adjacent, float* out, const ParallelFor& parallel_for) {
  constexpr size_t kNumbers = 1 << 14;  // of a task, about
  const size_t at_once = std::max<size_t>(kNumbers / (heads * d), 1);
  parallel_for((rows + at_once - 1) / at_once, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    for (size_t r = task * at_once; r < std::min(rows, (task + 1) * at_once); ++r) {
      for (size_t h = 0; h < heads; ++h) {
        const float* from = x + (r * heads + h) * d;
        float* to = out + (r * heads + h) * d;
        (adjacent ? rotate_head<true> : rotate_head<false>)(from, cos + r * half, sin + r * half, half, to);
        std::copy(from + 2 * half, from + d, to + 2 * half);
      }
    }
  });
}

}  // namespace oxjax
