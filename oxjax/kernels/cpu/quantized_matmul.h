// Products of float32 rows with quantised weights. The layout is that of oxjax/kernels/quantized.py.
//
// Activations are quantised in groups of 32 to int8 with a float scale. Integer dot products are exact, and floats
// add up group by group in one order: the bits of an output depend on its row and its weights alone, not on the
// number of rows, on threads, or on which instructions the processor has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"

namespace oxjax {

constexpr size_t kPanel = 16;        // outputs that lie together
constexpr size_t kChunk = 32;        // inputs that share a scale among activations
constexpr size_t kSuperBlock = 256;  // inputs that share the first of two levels of scales

// `PlaneFormat` of oxjax/gguf/planes.py. Codes are centred, or groups have minima.
struct Format {
  int bits, offset, group;
  bool two_level, minima;

  bool valid() const;
  size_t scales(size_t d_in) const { return d_in / (two_level ? kSuperBlock : group); }
  size_t sub_scales(size_t d_in) const { return two_level ? d_in / group : 0; }
  size_t panel_bytes(size_t d_in) const;
};

struct Weights {
  Format format;
  const uint8_t* panels;
  size_t d_out;
  float* out;  // [rows, d_out]

  size_t n_panels() const { return (d_out + kPanel - 1) / kPanel; }
};

// out = x @ w for each of the weights. `d_in` is a multiple of 32, and of 256 where a format has two levels.
void quantized_matmul(const float* x, size_t rows, size_t d_in, const Weights* weights, size_t n_weights,
                      const ParallelFor& parallel_for);

// The same with x as it is: the bits of float_matmul() with the dequantised weights.
void dequantized_matmul(const float* x, size_t rows, size_t d_in, const Weights* weights, size_t n_weights,
                        const ParallelFor& parallel_for);

}  // namespace oxjax
