// Selection by weight: the largest keys, until they hold a mass.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace oxjax {

// What numbers weigh: what is given; one each; or their share of e^x, of which `wanted` is a share as well.
enum class Mass { kGiven, kOnes, kShares };

// out = x where a key is among the largest, lower places first among equals, as long as the mass of all before it is
// below `wanted`; elsewhere -inf, as where a key is -inf. Masses are not negative; `mass` is read where they are given.
void keep_largest(const float* x, const float* keys, const float* mass, Mass kind, size_t n, double wanted, float* out,
                  const ParallelFor& parallel_for);

}  // namespace oxjax
