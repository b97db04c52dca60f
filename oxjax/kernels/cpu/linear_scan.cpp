#include "linear_scan.h"

#include <algorithm>
#include <vector>

namespace oxjax {
namespace {

// Values do not meet each other: a task is one head of one sequence, and so many values, which fit the registers.
constexpr size_t kVectors = 4, kWidth = kVectors * kLanes;

enum class Kind { kPlain, kBonus, kDelta, kReplace };

// The rows of one task; `h` is [key_dim, kWidth], the last values perhaps beyond the end.
template <Kind kKind>
void rows(const LinearScan& s, size_t start, size_t end, size_t head, size_t first, float* h) {
  const size_t key_head = head / (s.heads / s.key_heads), width = std::min(kWidth, s.value_dim - first);
  const size_t every = s.decays == 1 ? 0 : 1;
  for (size_t t = start; t < end; ++t) {
    const size_t keys = (t * s.key_heads + key_head) * s.key_dim;
    const float *query = s.query + keys, *key = s.key + keys, *decay = s.decay + (t * s.heads + head) * s.decays;
    const size_t values = (t * s.heads + head) * s.value_dim + first;
    f32x16 value[kVectors] = {}, stored[kVectors] = {}, y[kVectors] = {};
#pragma GCC unroll 4
    for (size_t j = 0; j < kVectors; ++j)
      if (j * kLanes < width) value[j] = load_first(s.value + values + j * kLanes, width - j * kLanes);
    if constexpr (kKind == Kind::kDelta || kKind == Kind::kReplace) {
      const float* read = s.read + keys;
      for (size_t i = 0; i < s.key_dim; ++i) {
        const f32x16 x = broadcast(read[i]);
#pragma GCC unroll 4
        for (size_t j = 0; j < kVectors; ++j) stored[j] = fma(x, load(h + i * kWidth + j * kLanes), stored[j]);
      }
    }
    if constexpr (kKind == Kind::kDelta)
#pragma GCC unroll 4
      for (size_t j = 0; j < kVectors; ++j) value[j] -= stored[j];
    float own = 0.0f;
    for (size_t i = 0; i < s.key_dim; ++i) {
      const f32x16 x = broadcast(key[i]), fade = broadcast(decay[i * every]), seen = broadcast(query[i]);
      if constexpr (kKind == Kind::kBonus) own = std::fma(s.bonus[key_head * s.key_dim + i] * key[i], query[i], own);
#pragma GCC unroll 4
      for (size_t j = 0; j < kVectors; ++j) {
        float* at = h + i * kWidth + j * kLanes;
        const f32x16 old = load(at);
        f32x16 now = fma(x, value[j], fade * old);
        if constexpr (kKind == Kind::kReplace) now = fma(broadcast(-s.write[keys + i]), stored[j], now);
        store(at, now);
        y[j] = fma(seen, kKind == Kind::kBonus ? old : now, y[j]);
      }
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < kVectors; ++j) {
      if constexpr (kKind == Kind::kBonus) y[j] = fma(broadcast(own), value[j], y[j]);
      if (j * kLanes < width) store_first(s.y + values + j * kLanes, y[j], width - j * kLanes);
    }
  }
}

}  // namespace

void linear_scan(const LinearScan& s, const Sequences& sequences, const ParallelFor& parallel_for) {
  size_t done = 0;
  const auto clear_to = [&](size_t row) {
    const size_t n = s.heads * s.value_dim;
    std::fill(s.y + done * n, s.y + row * n, 0.0f);
  };
  for (size_t i = 0; i < sequences.count; ++i) {
    clear_to(sequences.starts[i]);
    done = sequences.ends[i];
  }
  clear_to(sequences.rows);

  const auto of_kind = s.bonus   ? rows<Kind::kBonus>
                       : s.write ? rows<Kind::kReplace>
                       : s.read  ? rows<Kind::kDelta>
                                 : rows<Kind::kPlain>;
  const size_t parts = (s.value_dim + kWidth - 1) / kWidth;
  parallel_for(sequences.count * s.heads * parts, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t first = task % parts * kWidth, head = task / parts % s.heads, sequence = task / parts / s.heads;
    const size_t width = std::min(kWidth, s.value_dim - first);
    const size_t state = (sequence * s.heads + head) * s.key_dim * s.value_dim + first;
    static thread_local std::vector<float> h;
    h.assign(s.key_dim * kWidth, 0.0f);
    for (size_t i = 0; i < s.key_dim; ++i) std::copy_n(s.initial + state + i * s.value_dim, width, &h[i * kWidth]);
    of_kind(s, sequences.starts[sequence], sequences.ends[sequence], head, first, h.data());
    for (size_t i = 0; i < s.key_dim; ++i) std::copy_n(&h[i * kWidth], width, s.states + state + i * s.value_dim);
  });
}

}  // namespace oxjax
