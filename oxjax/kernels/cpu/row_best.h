// The largest number of each row, and what a log-softmax needs of the rest.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace oxjax {

// For each row: where its largest number comes first, that number, and log(sum of e^(x - largest)), NaN where a
// number is not finite. The bits of a row depend on that row alone.
void row_best(const float* x, size_t n_rows, size_t d, int32_t* best, float* largest, float* log_sum,
              const ParallelFor& parallel_for);

}  // namespace oxjax
