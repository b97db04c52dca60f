#include "keep_largest.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

namespace oxjax {
namespace {

constexpr size_t kPart = 1 << 14;  // numbers of a task
constexpr int kShifts[] = {21, 10, 0};  // of a key's bits, in three groups
constexpr float kOut = -std::numeric_limits<float>::infinity();

using Buckets = std::array<double, 1 << 11>;

// Larger for larger floats, with one zero.
uint32_t sortable(float key) {
  uint32_t bits;
  key += 0.0f;
  std::memcpy(&bits, &key, sizeof bits);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

uint32_t group_of(uint32_t key, int shift) { return key >> shift & (shift ? 2047 : 1023); }

struct Candidate {
  uint32_t key;
  uint32_t at;
  float mass;
};

// The bucket that `wanted` falls into, from the largest on; what all above hold is added to `above`.
uint32_t bucket_of(const Buckets& buckets, double wanted, double& above) {
  uint32_t bucket = buckets.size() - 1;
  while (bucket > 0 && above + buckets[bucket] < wanted) above += buckets[bucket--];
  return bucket;
}

}  // namespace

void keep_largest(const float* x, const float* keys, const float* mass, size_t n, double wanted, float* out,
                  const ParallelFor& parallel_for) {
  const size_t parts = (n + kPart - 1) / kPart;
  std::vector<Buckets> sums(parts);
  parallel_for(parts, [&](size_t part) {
    sums[part].fill(0.0);
    for (size_t i = part * kPart; i < std::min(n, (part + 1) * kPart); ++i)
      if (keys[i] > kOut) sums[part][group_of(sortable(keys[i]), kShifts[0])] += mass[i];
  });
  for (size_t part = 1; part < parts; ++part)
    for (size_t b = 0; b < sums[0].size(); ++b) sums[0][b] += sums[part][b];
  double above = 0.0;
  const uint32_t first = bucket_of(sums[0], wanted, above);

  std::vector<std::vector<Candidate>> found(parts);  // those of the bucket, in order
  parallel_for(parts, [&](size_t part) {
    for (size_t i = part * kPart; i < std::min(n, (part + 1) * kPart); ++i) {
      const uint32_t key = sortable(keys[i]), group = group_of(key, kShifts[0]);
      const bool exists = keys[i] > kOut;
      out[i] = exists && group > first ? x[i] : kOut;
      if (exists && group == first) found[part].push_back({key, static_cast<uint32_t>(i), mass[i]});
    }
  });
  std::vector<Candidate> left;
  for (const auto& part : found) left.insert(left.end(), part.begin(), part.end());
  for (int shift : {kShifts[1], kShifts[2]}) {
    Buckets buckets{};
    for (const Candidate& c : left) buckets[group_of(c.key, shift)] += c.mass;
    const uint32_t bucket = bucket_of(buckets, wanted, above);
    size_t n_left = 0;
    for (const Candidate& c : left) {
      const uint32_t group = group_of(c.key, shift);
      if (group > bucket) out[c.at] = x[c.at];
      if (group == bucket) left[n_left++] = c;
    }
    left.resize(n_left);
  }
  for (const Candidate& c : left) {  // equals
    if (above < wanted) out[c.at] = x[c.at];
    above += c.mass;
  }
}

}  // namespace oxjax
