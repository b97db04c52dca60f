// Products of float32 rows with float32, bfloat16 or float16 matrices, in float32.
#pragma once

#include "parallel.h"
#include "quantized_matmul.h"
#include "simd.h"

namespace oxjax {

enum class Element { kFloat32, kBFloat16, kFloat16 };

constexpr size_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Row i begins at data + i * stride, or with an index at data + index[i] * stride.
template <typename T>
struct Strided {
  T* data;
  size_t stride;
  const int32_t* index = nullptr;

  T* operator[](size_t i) const { return data + (index ? static_cast<size_t>(index[i]) : i) * stride; }
};

// out = x @ matrix, which is [d_in, d_out], or transposed in memory, or panels of a format.
struct Product {
  size_t rows, d_in, d_out;
  Strided<const float> x;
  const void* matrix = nullptr;
  Element element = Element::kFloat32;
  bool transposed = false;
  Strided<float> out = {};
  const Format* panels = nullptr;  // then `element` says nothing
};

// The bits of a row depend on that row and the matrix alone.
void float_products(const Product* products, size_t n_products, const ParallelFor& parallel_for);

// [d_in, d_out], or transposed in memory.
struct Matrix {
  const void* data;
  Element element;
  bool transposed;
  size_t d_out;
  float* out;  // [rows, d_out]
};

// The same rows times several matrices; those at the end that are all alike are computed once.
void float_matmul(const float* x, size_t rows, size_t d_in, const Matrix* matrices, size_t n_matrices,
                  const ParallelFor& parallel_for);

}  // namespace oxjax
