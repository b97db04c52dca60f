// Sums, RMS norms and layer norms of rows. The bits of a row depend on that row alone.
#pragma once

#include "parallel.h"

namespace oxjax {

// out[r] = (x[r] - m) / sqrt(mean((x[r] - m)^2) + eps) * weight[r % n_weights] + bias, where m is the row's mean, or 0
// without `centred`. Weight [n_weights, d] and bias [d] may be null.
void row_norm(const float* x, size_t rows, size_t d, const float* weight, size_t n_weights, const float* bias,
              float eps, bool centred, float* out, const ParallelFor& parallel_for);

// out[r] = the sum of x[r]
void row_sum(const float* x, size_t rows, size_t d, float* out, const ParallelFor& parallel_for);

}  // namespace oxjax
