// Products of float32 rows with float32, bfloat16 or float16 matrices, in float32.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace oxjax {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// [d_in, d_out], or transposed in memory.
struct Matrix {
  const void* data;
  Element element;
  bool transposed;
  size_t d_out;
  float* out;  // [rows, d_out]
};

// out = x @ matrix for each. The bits of a row depend on that row and the matrix alone.
void float_matmul(const float* x, size_t rows, size_t d_in, const Matrix* matrices, size_t n_matrices,
                  const ParallelFor& parallel_for);

}  // namespace oxjax
