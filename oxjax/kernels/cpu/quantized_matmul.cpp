#include "quantized_matmul.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "activations.h"
#include "padding.h"

namespace oxjax {
namespace {

template <int kBits, int kGroup, bool kTwoLevel, bool kMinima>
Tile tile_with_rows(size_t rows) {
  switch (rows) {
    case 1: return tile<kBits, kGroup, kTwoLevel, kMinima, 1>;
    case 2: return tile<kBits, kGroup, kTwoLevel, kMinima, 2>;
#if defined(__AVX512F__)
    case 4: return tile<kBits, kGroup, kTwoLevel, kMinima, 4>;
    case 8: return tile<kBits, kGroup, kTwoLevel, kMinima, 8>;
#endif
    default: return nullptr;
  }
}

// What the quantisation of 32 inputs leaves to know.
struct Quantized {
  float scale;
  int32_t halves[2];  // sums of codes
};

Quantized quantized(const float* x, int8_t* codes) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits for a fraction: rounds to nearest, ties to even
  const f32x16 from[2] = {load(x), load(x + kLanes)};
  u32x16 largest{};
  for (const f32x16& v : from) {
    const u32x16 size = (u32x16)v & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  uint32_t most = 0;
  for (size_t i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  float amax;
  std::memcpy(&amax, &most, sizeof amax);
  Quantized y{};
  if (most >= kInfinity) y.scale = std::numeric_limits<float>::quiet_NaN();
  if (most >= kInfinity || amax < 0x1p-100f) {
    std::memset(codes, 0, kChunk);
    return y;
  }
  y.scale = amax / 127.0f;
  const float inverse = 127.0f / amax;
  for (size_t h = 0; h < 2; ++h) {
    const i32x16 whole = __builtin_convertvector(from[h] * inverse + kRound - kRound, i32x16);
    const i8x16 bytes = __builtin_convertvector(whole, i8x16);
    std::memcpy(codes + h * kLanes, &bytes, sizeof bytes);
    i32x16 sum = whole;
    for (size_t half = kLanes / 2; half; half /= 2)
      for (size_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    y.halves[h] = sum[0];
  }
  return y;
}

}  // namespace

// One number for a format, whatever its offset: the corrections hold that.
constexpr int key(int bits, int group, bool two_level, bool minima) {
  return bits << 16 | group << 8 | two_level << 1 | int{minima};
}

Tile tile_for(const Format& f, size_t rows) {
  switch (key(f.bits, f.group, f.two_level, f.minima)) {
    case key(4, 16, true, false): return tile_with_rows<4, 16, true, false>(rows);
    case key(4, 16, true, true): return tile_with_rows<4, 16, true, true>(rows);
    case key(4, 32, false, false): return tile_with_rows<4, 32, false, false>(rows);
    case key(4, 32, false, true): return tile_with_rows<4, 32, false, true>(rows);
    case key(4, 32, true, true): return tile_with_rows<4, 32, true, true>(rows);
    case key(5, 32, false, false): return tile_with_rows<5, 32, false, false>(rows);
    case key(5, 32, false, true): return tile_with_rows<5, 32, false, true>(rows);
    case key(5, 32, true, true): return tile_with_rows<5, 32, true, true>(rows);
    case key(6, 16, true, false): return tile_with_rows<6, 16, true, false>(rows);
    case key(8, 16, true, false): return tile_with_rows<8, 16, true, false>(rows);
    case key(8, 32, false, false): return tile_with_rows<8, 32, false, false>(rows);
    case key(8, 32, true, false): return tile_with_rows<8, 32, true, false>(rows);
    default: return nullptr;
  }
}

Activations::Activations(size_t rows, size_t d_in, const Weights* weights, size_t n_weights)
    : chunks_(d_in / kChunk), codes_(rows * d_in), scales_(rows * chunks_) {
  for (size_t w = 0; w < n_weights; ++w) {
    formats_.push_back(weights[w].format);
    corrections_.emplace_back(rows * chunks_ * groups(w));
  }
}

void Activations::quantize(const float* x, const Place& to) {
  int8_t* codes = codes_.data() + to.first * chunks_ * kChunk;
  float* scales = scales_.data() + to.first * chunks_;
  for (size_t c = 0; c < chunks_; ++c) {
    const size_t at = c * to.tile_rows + to.row;
    const Quantized y = quantized(x + c * kChunk, codes + at * kChunk);
    scales[at] = y.scale;
    for (size_t w = 0; w < formats_.size(); ++w) {
      int32_t* corrections = corrections_[w].data() + to.first * chunks_ * groups(w);
      for (size_t g = 0; g < groups(w); ++g) {
        const int32_t sum = groups(w) == 2 ? y.halves[g] : y.halves[0] + y.halves[1];
        const float inputs = y.scale * static_cast<float>(sum);
        int32_t correction = -formats_[w].offset * sum;
        if (formats_[w].minima) std::memcpy(&correction, &inputs, sizeof inputs);
        corrections[(c * groups(w) + g) * to.tile_rows + to.row] = correction;
      }
    }
  }
}

void Activations::copy(const Place& from, const Place& to) {
  const size_t here = from.first * chunks_, there = to.first * chunks_;
  for (size_t c = 0; c < chunks_; ++c) {
    const size_t source = here + c * from.tile_rows + from.row, target = there + c * to.tile_rows + to.row;
    std::memcpy(&codes_[target * kChunk], &codes_[source * kChunk], kChunk);
    scales_[target] = scales_[source];
  }
  for (size_t w = 0; w < formats_.size(); ++w)
    for (size_t g = 0; g < chunks_ * groups(w); ++g)
      corrections_[w][there * groups(w) + g * to.tile_rows + to.row] =
          corrections_[w][here * groups(w) + g * from.tile_rows + from.row];
}

bool Format::valid() const { return offset == (minima ? 0 : 1 << (bits - 1)) && tile_for(*this, 1) != nullptr; }

size_t Format::panel_bytes(size_t d_in) const {
  const size_t levels = minima ? 2 : 1;
  const size_t bytes = d_in * kPanel * bits / 8 + levels * kPanel * (2 * scales(d_in) + sub_scales(d_in));
  return (bytes + 63) / 64 * 64;
}

void quantized_matmul(const float* x, size_t n_rows, size_t d_in, const Weights* weights, size_t n_weights,
                      const ParallelFor& parallel_for) {
  const UniqueRows unique(x, n_rows, d_in);
  const size_t rows = unique.rows;
  Activations inputs(rows, d_in, weights, n_weights);
  parallel_for((rows + kTallestTile - 1) / kTallestTile, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    for (size_t r = part * kTallestTile, end = std::min(rows, r + kTallestTile); r < end;) {
      const size_t tile_rows = tile_rows_at(r, rows);
      for (size_t i = 0; i < tile_rows; ++i) inputs.quantize(x + (r + i) * d_in, {r, tile_rows, i});
      r += tile_rows;
    }
  });

  // A task is some panels of one matrix: enough for memory to come at its full speed, and for some threads to share.
  constexpr size_t kMostBytes = 256 << 10, kTasks = 8;
  struct Task {
    size_t matrix, from, to;
  };
  std::vector<size_t> panel_bytes;
  size_t total = 0;
  for (size_t i = 0; i < n_weights; ++i) {
    panel_bytes.push_back(weights[i].format.panel_bytes(d_in));
    total += weights[i].n_panels() * panel_bytes[i];
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < n_weights; ++i) {
    const size_t at_once = std::max<size_t>(std::min(kMostBytes, total / kTasks) / panel_bytes[i], 1);
    for (size_t panel = 0; panel < weights[i].n_panels(); panel += at_once)
      tasks.push_back({i, panel, std::min(weights[i].n_panels(), panel + at_once)});
  }
  // Its rows go through these in blocks that stay in the second cache.
  constexpr size_t kBlockBytes = 512 << 10;
  const size_t block = std::max<size_t>(kBlockBytes / d_in / kTallestTile, 1) * kTallestTile;
  parallel_for(tasks.size(), [&](size_t i) {
    const DefaultArithmetic arithmetic;
    const auto [matrix, from, to] = tasks[i];
    const Weights& w = weights[matrix];
    const size_t bytes = panel_bytes[matrix];
    for (size_t first = 0; first < rows; first += block) {
      const size_t last = std::min(rows, first + block);
      for (size_t panel = from; panel < to; ++panel) {
        const size_t width = std::min(kPanel, w.d_out - panel * kPanel);
        const uint8_t* codes = w.panels + panel * bytes;
        const uint8_t* next = panel + 1 < to ? codes + bytes : codes;
        for (size_t r = first, tile_rows; r < last; r += tile_rows) {
          tile_rows = tile_rows_at(r, rows);
          tile_for(w.format, tile_rows)(inputs.at(r, matrix), d_in / kChunk, codes, next,
                                        w.out + r * w.d_out + panel * kPanel, w.d_out, width);
        }
      }
    }
    unique.fill(w.out, n_rows, w.d_out, from * kPanel, std::min(to * kPanel, w.d_out) - from * kPanel);
  });
}

}  // namespace oxjax
