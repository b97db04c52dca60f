#include "gumbel_max.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace oxjax {
namespace {

constexpr size_t kPart = 1 << 13;  // numbers of a row in a task
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMostNoise = 46.0f;  // a little more than -log(2^-65), which there can be at the most

struct Words {
  u32x16 high, low;
};

// Threefry-2x32 of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of counters (0, at).
OXJAX_INLINE Words random_words(const uint32_t* key, u32x16 at) {
  const uint32_t keys[3] = {key[0], key[1], 0x1BD11BDAu ^ key[0] ^ key[1]};
  constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  u32x16 high = at - at + keys[0], low = at + keys[1];
#pragma GCC unroll 5
  for (uint32_t group = 0; group < 5; ++group) {
#pragma GCC unroll 4
    for (int turn : kTurns[group % 2]) {
      high += low;
      low = (low << turn | low >> (32 - turn)) ^ high;
    }
    high += keys[(group + 1) % 3];
    low += keys[(group + 2) % 3] + group + 1;
  }
  return {high, low};
}

// -log(-log(1 - v)) for v uniform between 0 and 1, with 64 bits where it is small.
OXJAX_INLINE f32x16 gumbel(Words words) {
  const f32x16 high = __builtin_convertvector(words.high, f32x16), low = __builtin_convertvector(words.low, f32x16);
  const f32x16 v = fma(low + 0.5f, broadcast(0x1p-64f), high * 0x1p-32f), most = broadcast(0x1.fffffep-1f);
  return -log_of_positive(-log1p_of_negative(v < most ? -v : -most));
}

struct Best {
  float value = -kInfinity;
  size_t at = 0;
};

Best best_of(const float* logits, size_t first, size_t n, const uint32_t* key) {
  f32x16 values = broadcast(-kInfinity);
  i32x16 places{}, lane;
  for (size_t l = 0; l < kLanes; ++l) lane[l] = l;
  float least = -kInfinity;  // logits below cannot win
  for (size_t i = 0; i < n; i += kLanes) {
    f32x16 v = load_first(logits + first + i, n - i);
    const i32x16 at = lane + static_cast<int32_t>(first + i), exists = at < static_cast<int32_t>(first + n);
    v = exists ? v : broadcast(-kInfinity);
    if (!any(v > least)) continue;
    v += gumbel(random_words(key, (u32x16)at));
    const i32x16 more = v > values;
    values = more ? v : values;
    places = more ? at : places;
    least = std::max(least, largest_of(values) - kMostNoise);
  }
  Best best;
  for (size_t l = 0; l < kLanes; ++l) {
    const size_t at = places[l];
    if (values[l] > best.value || (values[l] == best.value && at < best.at)) best.value = values[l], best.at = at;
  }
  return best;
}

}  // namespace

void gumbel_max(const float* logits, size_t n_rows, size_t d, const uint32_t* keys, int32_t* chosen,
                const ParallelFor& parallel_for) {
  const size_t parts = (d + kPart - 1) / kPart;
  std::vector<Best> bests(n_rows * parts);
  parallel_for(n_rows * parts, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t r = task / parts, first = task % parts * kPart;
    bests[task] = best_of(logits + r * d, first, std::min(kPart, d - first), keys + 2 * r);
  });
  for (size_t r = 0; r < n_rows; ++r) {
    const auto parts_of_row = bests.begin() + r * parts;  // the first of the largest
    chosen[r] = std::max_element(parts_of_row, parts_of_row + parts, [](const Best& a, const Best& b) {
                  return a.value < b.value;
                })->at;
  }
}

}  // namespace oxjax
