// A draw from each row's distribution: its largest logit after noise that depends on the row's key and the column
// alone.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace oxjax {

// Where logit + noise is largest in each of these rows, the first place among equals. Keys are two words a row.
void gumbel_max(const float* logits, size_t n_rows, size_t d, const uint32_t* keys, int32_t* chosen,
                const ParallelFor& parallel_for);

}  // namespace oxjax
