// The float product with quantised weights: a part of the matrix at a time becomes floats, and stays in the cache.
#include <algorithm>
#include <vector>

#include "padding.h"
#include "panel.h"
#include "tile.h"

namespace oxjax {
namespace {

constexpr size_t kWidth = 128, kDepth = kSuperBlock;  // of the part; a task is so many outputs of all rows

// 32 inputs of 16 outputs as floats, to rows of `to`; every product is exact, and only minima round.
template <int kBits>
void dequantize_chunk(const uint8_t* packed, float offset, const f32x16 scales[2], const f32x16 minima[2], float* to) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const u32x16 codes = (u32x16)unpacked<kBits>(packed, i);
    for (int j = 0; j < 4; ++j) {
      const f32x16 code = __builtin_convertvector((i32x16)(codes >> 8 * j & 255), f32x16);
      store(to + (4 * i + j) * kWidth, scales[i / 4] * (code - offset) + minima[i / 4]);
    }
  }
}

// Inputs k .. k + depth of one panel's outputs.
void dequantize_panel(const Format& f, const uint8_t* panel, size_t d_in, size_t k, size_t depth, float* to) {
  const Float16* scales = reinterpret_cast<const Float16*>(panel + d_in / kChunk * 64 * f.bits);
  const Float16* minima = scales + f.scales(d_in) * kPanel;
  const int8_t* sub_scales = reinterpret_cast<const int8_t*>(minima + (f.minima ? f.scales(d_in) * kPanel : 0));
  const int8_t* sub_minima = sub_scales + f.sub_scales(d_in) * kPanel;
  for (size_t c = k / kChunk; c < (k + depth) / kChunk; ++c, to += kChunk * kWidth) {
    f32x16 scale[2], minimum[2];
    for (size_t half = 0; half < 2; ++half) {
      const size_t at = c * kChunk + half * kChunk / 2, group = at / f.group, outer = f.two_level ? at / kSuperBlock : group;
      scale[half] = load(scales + outer * kPanel);
      minimum[half] = f.minima ? load(minima + outer * kPanel) : broadcast(-0.0f);  // which changes nothing
      if (f.two_level) scale[half] *= load(sub_scales + group * kPanel);
      if (f.two_level && f.minima) minimum[half] *= load(sub_minima + group * kPanel);
    }
    const uint8_t* packed = panel + c * 64 * f.bits;
    switch (f.bits) {
      case 4: dequantize_chunk<4>(packed, f.offset, scale, minimum, to); break;
      case 5: dequantize_chunk<5>(packed, f.offset, scale, minimum, to); break;
      case 6: dequantize_chunk<6>(packed, f.offset, scale, minimum, to); break;
      case 8: dequantize_chunk<8>(packed, f.offset, scale, minimum, to); break;
    }
  }
}

}  // namespace

void dequantized_matmul(const float* x, size_t n_rows, size_t d_in, const Weights* weights, size_t n_weights,
                        const ParallelFor& parallel_for) {
  const Distinct distinct(x, n_rows, d_in);
  const size_t rows = distinct.rows;
  std::vector<size_t> ends;  // of each matrix: one past its last task
  for (size_t i = 0; i < n_weights; ++i)
    ends.push_back((weights[i].d_out + kWidth - 1) / kWidth + (i ? ends.back() : 0));
  parallel_for(n_weights ? ends.back() : 0, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Weights& w = weights[i];
    const size_t first = (task - (i ? ends[i - 1] : 0)) * kWidth, width = std::min(kWidth, w.d_out - first);
    const uint8_t* panels = w.panels + first / kPanel * w.format.panel_bytes(d_in);
    static thread_local std::vector<float> part;
    part.resize(kDepth * kWidth);
    for (size_t r = 0; r < rows; ++r) std::fill_n(w.out + r * w.d_out + first, width, 0.0f);
    for (size_t k = 0; k < d_in; k += kDepth) {
      const size_t depth = std::min(kDepth, d_in - k);
      for (size_t j = 0; j < width; j += kPanel)
        dequantize_panel(w.format, panels + j / kPanel * w.format.panel_bytes(d_in), d_in, k, depth, part.data() + j);
      for (size_t j = 0; j < width; j += kTileWidth)
        tiles(x + k, d_in, rows, part.data() + j, kWidth, depth, w.out + first + j, w.d_out,
              std::min(kTileWidth, width - j), true);
    }
    distinct.fill(w.out, n_rows, w.d_out, first, width);
  });
}

}  // namespace oxjax
