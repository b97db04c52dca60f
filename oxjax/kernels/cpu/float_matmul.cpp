#include "float_matmul.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dequantize.h"
#include "padding.h"
#include "tile.h"

namespace oxjax {
namespace {

// A task is some outputs of all rows; the longer the stretches it reads of a matrix's rows, the faster is memory.
constexpr size_t kWidth = 256, kDepth = 128;      // of the part of a matrix that is packed at a time
constexpr size_t kFewRows = 8;                    // up to so many, a matrix is read where it lies,
constexpr size_t kFewWidth = 512, kFewDepth = 8;  // so much of it at a time

// Inputs k .. k + depth of all rows, copied where an index scatters them.
Strided<const float> inputs(const Product& p, size_t k, size_t depth) {
  if (!p.x.index) return {p.x.data + k, p.x.stride};
  static thread_local std::vector<float> copy;
  copy.resize(p.rows * depth);
  for (size_t i = 0; i < p.rows; ++i) std::copy_n(p.x[i] + k, depth, &copy[i * depth]);
  return {copy.data(), depth};
}

// Inputs k .. k + depth of outputs first .. first + width as floats.
template <typename T>
void pack_part(const Product& p, size_t k, size_t depth, size_t first, size_t width, float* to) {
  const size_t stride = p.transposed ? p.d_in : p.d_out;
  const T* from = static_cast<const T*>(p.matrix) + (p.transposed ? first * stride + k : k * stride + first);
  pack(from, stride, p.transposed, depth, width, to, kWidth);
}

struct Panels {};

template <>
void pack_part<Panels>(const Product& p, size_t k, size_t depth, size_t first, size_t width, float* to) {
  const size_t bytes = p.panels->panel_bytes(p.d_in);
  for (size_t j = 0; j < width; j += kPanel) {
    const uint8_t* panel = static_cast<const uint8_t*>(p.matrix) + (first + j) / kPanel * bytes;
    dequantize(*p.panels, panel, p.d_in, k, depth, to + j, kWidth);
  }
}

// Outputs first .. first + width of all rows, through a packed copy that stays in the cache.
template <typename T>
void by_packing(const Product& p, size_t first, size_t width, float* out, size_t out_stride) {
  static thread_local std::vector<float> packed;
  packed.resize(kDepth * kWidth);
  for (size_t k = 0; k < p.d_in; k += kDepth) {
    const size_t depth = std::min(kDepth, p.d_in - k);
    pack_part<T>(p, k, depth, first, width, packed.data());
    const Strided<const float> x = inputs(p, k, depth);
    for (size_t j = 0; j < width; j += kTileWidth)
      tiles(x.data, x.stride, p.rows, packed.data() + j, kWidth, depth, out + j, out_stride,
            std::min(kTileWidth, width - j), true);
  }
}

// Without a copy: a few rows of the matrix at a time, from end to end, with the sums in memory.
template <typename T>
void in_place(const Product& p, size_t first, size_t width, float* out, size_t out_stride) {
  const Strided<const float> x = inputs(p, 0, p.d_in);
  for (size_t k = 0; k < p.d_in; k += kFewDepth) {
    const size_t depth = std::min(kFewDepth, p.d_in - k);
    for (size_t j = 0; j < width; j += kTileWidth)
      tiles(x.data + k, x.stride, p.rows, static_cast<const T*>(p.matrix) + k * p.d_out + first + j, p.d_out, depth,
            out + j, out_stride, std::min(kTileWidth, width - j), false);
  }
}

bool is_read_in_place(const Product& p) { return p.rows <= kFewRows && !p.transposed && !p.panels; }

template <typename T>
void outputs(const Product& p, size_t first, size_t width) {
  static thread_local std::vector<float> sums;  // of rows that an index will scatter
  Strided<float> to{p.out.data + first, p.out.stride};
  if (p.out.index) {
    sums.resize(p.rows * width);
    to = {sums.data(), width};
  }
  for (size_t i = 0; i < p.rows; ++i) std::fill_n(to[i], width, 0.0f);
  if constexpr (std::is_same_v<T, Panels>) {
    by_packing<T>(p, first, width, to.data, to.stride);
  } else {
    (is_read_in_place(p) ? in_place<T> : by_packing<T>)(p, first, width, to.data, to.stride);
  }
  for (size_t i = 0; i < p.rows && p.out.index; ++i) std::copy_n(to[i], width, p.out[i] + first);
}

}  // namespace

void float_products(const Product* products, size_t n_products, const ParallelFor& parallel_for) {
  std::vector<size_t> ends;  // of each product: one past its last task
  const auto task_width = [](const Product& p) { return is_read_in_place(p) ? kFewWidth : kWidth; };
  for (size_t i = 0; i < n_products; ++i) {
    const size_t width = task_width(products[i]);
    ends.push_back((products[i].d_out + width - 1) / width + (i ? ends.back() : 0));
  }
  parallel_for(n_products ? ends.back() : 0, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Product& p = products[i];
    const size_t first = (task - (i ? ends[i - 1] : 0)) * task_width(p);
    const size_t width = std::min(task_width(p), p.d_out - first);
    if (p.panels) return outputs<Panels>(p, first, width);
    switch (p.element) {
      case Element::kFloat32: return outputs<float>(p, first, width);
      case Element::kBFloat16: return outputs<BFloat16>(p, first, width);
      case Element::kFloat16: return outputs<Float16>(p, first, width);
    }
  });
}

namespace {

// Products of the same rows with several matrices; rows at the end that are all alike are computed once.
template <typename M, typename ToProduct>
void with_all(const float* x, size_t n_rows, size_t d_in, const M* matrices, size_t n_matrices,
              const ParallelFor& parallel_for, ToProduct to_product) {
  const UniqueRows unique(x, n_rows, d_in);
  std::vector<Product> products;
  for (size_t i = 0; i < n_matrices; ++i) products.push_back(to_product(matrices[i], unique.rows));
  float_products(products.data(), n_matrices, parallel_for);
  if (unique.rows == n_rows) return;
  parallel_for(n_matrices,
               [&](size_t i) { unique.fill(matrices[i].out, n_rows, matrices[i].d_out, 0, matrices[i].d_out); });
}

}  // namespace

void float_matmul(const float* x, size_t n_rows, size_t d_in, const Matrix* matrices, size_t n_matrices,
                  const ParallelFor& parallel_for) {
  with_all(x, n_rows, d_in, matrices, n_matrices, parallel_for, [&](const Matrix& m, size_t rows) {
    return Product{rows, d_in, m.d_out, {x, d_in}, m.data, m.element, m.transposed, {m.out, m.d_out}};
  });
}

void dequantized_matmul(const float* x, size_t n_rows, size_t d_in, const Weights* weights, size_t n_weights,
                        const ParallelFor& parallel_for) {
  with_all(x, n_rows, d_in, weights, n_weights, parallel_for, [&](const Weights& w, size_t rows) {
    return Product{rows, d_in, w.d_out, {x, d_in}, w.panels, Element::kFloat32, false, {w.out, w.d_out}, &w.format};
  });
}

}  // namespace oxjax
