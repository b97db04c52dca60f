#include "row_best.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "padding.h"
#include "simd.h"

namespace oxjax {
namespace {

constexpr size_t kPart = 1 << 13;  // numbers of a row whose sum is a number; a task
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Best {
  float value = -kInfinity, lowest = kInfinity;
  int32_t at = 0;
};

// The largest of some numbers, and where it comes first.
Best best_of(const float* x, size_t n) {
  f32x16 values = broadcast(-kInfinity), lowest = broadcast(kInfinity);
  i32x16 places{}, lane;
  for (size_t l = 0; l < kLanes; ++l) lane[l] = l;
  for (size_t i = 0; i < n; i += kLanes) {
    f32x16 v = load_first(x + i, n - i);
    const i32x16 at = lane + static_cast<int32_t>(i), exists = at < static_cast<int32_t>(n);
    lowest = (v < lowest) & exists ? v : lowest;
    const i32x16 more = (v > values) & exists;
    values = more ? v : values;
    places = more ? at : places;
  }
  Best best;
  for (size_t l = 0; l < kLanes; ++l) {
    best.lowest = std::min(best.lowest, lowest[l]);
    if (values[l] > best.value || (values[l] == best.value && places[l] < best.at))
      best.value = values[l], best.at = places[l];
  }
  return best;
}

float sum_of_exponentials(const float* x, size_t n, float largest) {
  f32x16 sum{};
  for (size_t i = 0; i < n; i += kLanes) {
    f32x16 e = exp_of_negative(load_first(x + i, n - i) - largest);
    for (size_t l = n - i; l < kLanes; ++l) e[l] = 0.0f;
    sum += e;
  }
  return sum_of(sum);
}

}  // namespace

void row_best(const float* x, size_t n_rows, size_t d, int32_t* best, float* largest, float* log_sum,
              const ParallelFor& parallel_for) {
  const UniqueRows unique(x, n_rows, d);
  const size_t rows = std::min(unique.rows + unique.zeros, n_rows), parts = (d + kPart - 1) / kPart;
  std::vector<Best> bests(rows * parts);
  std::vector<float> sums(rows * parts);
  parallel_for(rows * parts, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t first = task % parts * kPart;
    bests[task] = best_of(x + task / parts * d + first, std::min(kPart, d - first));
    bests[task].at += first;
  });
  for (size_t r = 0; r < rows; ++r) {
    Best all = bests[r * parts];
    for (size_t p = 1; p < parts; ++p) {
      const Best& part = bests[r * parts + p];
      if (part.value > all.value) all.value = part.value, all.at = part.at;
      all.lowest = std::min(all.lowest, part.lowest);
    }
    best[r] = all.at;
    largest[r] = all.value;
    log_sum[r] = all.lowest > -kInfinity ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  parallel_for(rows * parts, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t r = task / parts, first = task % parts * kPart;
    sums[task] = sum_of_exponentials(x + r * d + first, std::min(kPart, d - first), largest[r]);
  });
  for (size_t r = 0; r < n_rows; ++r) {
    const size_t from = std::min(r, rows - 1);
    if (r == from) {
      double sum = log_sum[r];
      for (size_t p = 0; p < parts; ++p) sum += sums[r * parts + p];
      log_sum[r] = static_cast<float>(std::log(sum));
    } else {
      best[r] = best[from], largest[r] = largest[from], log_sum[r] = log_sum[from];
    }
  }
}

}  // namespace oxjax
