// Rotations of pairs of numbers: what a rotary position embedding does to every head. The bits of a row are its own.
#pragma once

#include "parallel.h"

namespace oxjax {

// Pair i of a head, (x[i], x[i + half]) or, where `adjacent`, (x[2i], x[2i + 1]), turns by the angle i of its row; what
// lies past the pairs stays. x and out are [rows, heads, d], cos and sin [rows, half].
void rotate(const float* x, size_t rows, size_t heads, size_t d, const float* cos, const float* sin, size_t half,
            bool adjacent, float* out, const ParallelFor& parallel_for);

}  // namespace oxjax
