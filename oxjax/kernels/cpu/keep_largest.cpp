#include "keep_largest.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"

namespace oxjax {
namespace {

constexpr size_t kChunk = 64;           // numbers whose largest is known
constexpr size_t kFew = 256;            // chunks that are looked at first
constexpr size_t kMost = 4096;          // numbers that are sorted
constexpr size_t kPart = 1 << 14;       // numbers of a task
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

struct Row {
  const float* x;
  const float* keys;
  const float* mass;
  Mass kind;
  size_t n;
  std::vector<float> largest;  // key of each chunk

  size_t end_of(size_t chunk) const { return std::min(n, (chunk + 1) * kChunk); }

  // Masses of the 16 numbers at a place, zeros where there are none. `most` is the largest number.
  f32x16 masses(size_t at, float most) const {
    if (kind == Mass::kGiven) return load_first(mass + at, n - at);
    f32x16 y = broadcast(1.0f);
    if (kind == Mass::kShares) y = exp_of_negative(load_first(x + at, n - at) - most);
    for (size_t l = n - at; l < kLanes; ++l) y[l] = 0.0f;
    return y;
  }
};

// The largest key of each chunk.
std::vector<float> largest_of_chunks(const float* keys, size_t n) {
  std::vector<float> largest((n + kChunk - 1) / kChunk);
  for (size_t c = 0; c < largest.size(); ++c) {
    f32x16 most = broadcast(kOut);
    const size_t end = std::min(n, (c + 1) * kChunk);
    for (size_t i = c * kChunk; i < end; i += kLanes) {
      f32x16 v = load_first(keys + i, end - i);
      for (size_t l = end - i; l < kLanes; ++l) v[l] = kOut;
      most = larger(most, v);
    }
    largest[c] = largest_of(most);
  }
  return largest;
}

// Those from a bound on, in order.
std::vector<Candidate> candidates(const Row& row, float bound, float most) {
  std::vector<Candidate> found;
  for (size_t c = 0; c < row.largest.size() && found.size() <= kMost; ++c) {
    if (row.largest[c] < bound || row.largest[c] == kOut) continue;
    for (size_t i = c * kChunk; i < row.end_of(c); i += kLanes) {
      const f32x16 mass = row.masses(i, most);
      for (size_t l = 0; l < std::min(kLanes, row.end_of(c) - i); ++l)
        if (row.keys[i + l] >= bound && row.keys[i + l] > kOut)
          found.push_back({sortable(row.keys[i + l]), static_cast<uint32_t>(i + l), mass[l]});
    }
  }
  return found;
}

// Whether a few of the largest hold enough; if so, it is done.
bool keep_few(const Row& row, double wanted, float most, float* out) {
  float bound = kOut;
  if (row.largest.size() > kFew) {
    std::vector<float> largest = row.largest;
    std::nth_element(largest.begin(), largest.begin() + kFew - 1, largest.end(), std::greater<float>());
    bound = largest[kFew - 1];
  }
  std::vector<Candidate> found = candidates(row, bound, most);
  if (found.size() > kMost) return false;
  double sum = 0.0;
  for (const Candidate& c : found) sum += c.mass;
  if (sum < wanted && bound > kOut) return false;
  std::sort(found.begin(), found.end(),
            [](const Candidate& a, const Candidate& b) { return a.key > b.key || (a.key == b.key && a.at < b.at); });
  std::fill_n(out, row.n, kOut);
  double before = 0.0;
  for (const Candidate& c : found) {
    if (before >= wanted) break;
    out[c.at] = row.x[c.at];
    before += c.mass;
  }
  return true;
}

// The bucket that `wanted` falls into, from the largest on; what all above hold is added to `above`.
uint32_t bucket_of(const Buckets& buckets, double wanted, double& above) {
  uint32_t bucket = buckets.size() - 1;
  while (bucket > 0 && above + buckets[bucket] < wanted) above += buckets[bucket--];
  return bucket;
}

// By the mass of groups of keys, then of groups within the one where it ends.
void keep_many(const Row& row, double wanted, float most, float* out, const ParallelFor& parallel_for) {
  const size_t parts = (row.n + kPart - 1) / kPart;
  std::vector<Buckets> sums(parts);
  parallel_for(parts, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    sums[part].fill(0.0);
    const size_t end = std::min(row.n, (part + 1) * kPart);
    for (size_t i = part * kPart; i < end; i += kLanes) {
      const f32x16 mass = row.masses(i, most);
      for (size_t l = 0; l < std::min(kLanes, end - i); ++l)
        if (row.keys[i + l] > kOut) sums[part][group_of(sortable(row.keys[i + l]), kShifts[0])] += mass[l];
    }
  });
  for (size_t part = 1; part < parts; ++part)
    for (size_t b = 0; b < sums[0].size(); ++b) sums[0][b] += sums[part][b];
  double above = 0.0;
  const uint32_t first = bucket_of(sums[0], wanted, above);

  std::vector<std::vector<Candidate>> found(parts);  // those of the bucket, in order
  parallel_for(parts, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    const size_t end = std::min(row.n, (part + 1) * kPart);
    for (size_t i = part * kPart; i < end; i += kLanes) {
      const f32x16 mass = row.masses(i, most);
      for (size_t l = 0; l < std::min(kLanes, end - i); ++l) {
        const size_t at = i + l;
        const uint32_t key = sortable(row.keys[at]), group = group_of(key, kShifts[0]);
        const bool exists = row.keys[at] > kOut;
        out[at] = exists && group > first ? row.x[at] : kOut;
        if (exists && group == first) found[part].push_back({key, static_cast<uint32_t>(at), mass[l]});
      }
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
      if (group > bucket) out[c.at] = row.x[c.at];
      if (group == bucket) left[n_left++] = c;
    }
    left.resize(n_left);
  }
  for (const Candidate& c : left) {  // equals
    if (above < wanted) out[c.at] = row.x[c.at];
    above += c.mass;
  }
}

}  // namespace

void keep_largest(const float* x, const float* keys, const float* mass, Mass kind, size_t n, double wanted, float* out,
                  const ParallelFor& parallel_for) {
  const DefaultArithmetic arithmetic;
  const Row row{x, keys, mass, kind, n, largest_of_chunks(keys, n)};
  const float most = *std::max_element(row.largest.begin(), row.largest.end());
  if (kind == Mass::kShares) {
    double all = 0.0;
    for (size_t c = 0; c < row.largest.size(); ++c) {
      if (row.largest[c] == kOut) continue;
      f32x16 sum{};
      for (size_t i = c * kChunk; i < row.end_of(c); i += kLanes) sum += row.masses(i, most);
      all += sum_of(sum);
    }
    wanted *= all;
  }
  if (!keep_few(row, wanted, most, out)) keep_many(row, wanted, most, out, parallel_for);
}

}  // namespace oxjax
