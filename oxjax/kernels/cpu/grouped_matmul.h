// Products of rows with the matrices of the experts that each row chose.
//
// Pairs of row and expert are sorted by expert, so that a matrix is read once for all rows that chose it, and experts
// that nobody chose are not read. The bits of an output depend on its row and its expert's matrix alone.
#pragma once

#include <vector>

#include "float_matmul.h"
#include "quantized_matmul.h"

namespace oxjax {

// Pairs by expert, within one in their order; expert e's are pairs[bounds[e]] ... pairs[bounds[e + 1] - 1].
struct Groups {
  std::vector<int32_t> pairs, bounds;
};

// Of each pair's expert, 0 ... n_experts - 1, or n_experts for none. Whoever calls has checked that.
Groups grouped(const int32_t* chosen, size_t n_pairs, size_t n_experts);

// What rows are multiplied with: matrices [n_experts, d_in, d_out] one after another.
struct FloatExperts {
  const void* data;
  Element element;
  size_t d_out;
  float* out;  // [n_pairs, d_out]
};

// The same as panels; `panels` of the weights are those of the first expert, `out` is [n_pairs, d_out].
using QuantizedExperts = Weights;

// out[pair] = x[pair / pairs_per_row] @ the matrix of the pair's expert, and zeros for none, for all of the maps.
// `d_in` is as `quantized_matmul` takes it.
void grouped_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups, const FloatExperts* maps,
                    size_t n_maps, const ParallelFor& parallel_for);
void grouped_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups,
                    const QuantizedExperts* maps, size_t n_maps, const ParallelFor& parallel_for);

// The same with x as it is.
void grouped_dequantized_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups,
                                const QuantizedExperts* maps, size_t n_maps, const ParallelFor& parallel_for);

}  // namespace oxjax
