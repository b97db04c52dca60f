// Selection by weight: the largest keys, until they hold a share.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace oxjax {

// out = x where a key is among the largest, lower places first among equals, as long as the mass of all before it is
// below `wanted`; elsewhere -inf, as where a key is -inf. Masses are not negative.
void keep_largest(const float* x, const float* keys, const float* mass, size_t n, double wanted, float* out,
                  const ParallelFor& parallel_for);

}  // namespace oxjax
