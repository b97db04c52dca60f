#include "float_matmul.h"

#include <algorithm>
#include <vector>

#include "padding.h"
#include "tile.h"

namespace oxjax {
namespace {

// A task is some outputs of all rows; the longer the stretches it reads of a matrix's rows, the faster is memory.
constexpr size_t kWidth = 256, kDepth = 128;      // of the part of a matrix that is packed at a time
constexpr size_t kFewRows = 8;                    // up to so many, a matrix is read where it lies,
constexpr size_t kFewWidth = 512, kFewDepth = 8;  // so much of it at a time

// Outputs first .. first + width of all rows, through a packed copy that stays in the cache.
template <typename T>
void by_packing(const float* x, size_t rows, size_t d_in, const Matrix& m, size_t first, size_t width) {
  static thread_local std::vector<float> packed;
  packed.resize(kDepth * kWidth);
  for (size_t k = 0; k < d_in; k += kDepth) {
    const size_t depth = std::min(kDepth, d_in - k), stride = m.transposed ? d_in : m.d_out;
    const T* from = static_cast<const T*>(m.data) + (m.transposed ? first * stride + k : k * stride + first);
    pack(from, stride, m.transposed, depth, width, packed.data(), kWidth);
    for (size_t j = 0; j < width; j += kTileWidth)
      tiles(x + k, d_in, rows, packed.data() + j, kWidth, depth, m.out + first + j, m.d_out,
            std::min(kTileWidth, width - j), true);
  }
}

// Without a copy: a few rows of the matrix at a time, from end to end, with the sums in memory.
template <typename T>
void in_place(const float* x, size_t rows, size_t d_in, const Matrix& m, size_t first, size_t width) {
  for (size_t k = 0; k < d_in; k += kFewDepth) {
    const size_t depth = std::min(kFewDepth, d_in - k);
    for (size_t j = first; j < first + width; j += kTileWidth)
      tiles(x + k, d_in, rows, static_cast<const T*>(m.data) + k * m.d_out + j, m.d_out, depth, m.out + j, m.d_out,
            std::min(kTileWidth, first + width - j), false);
  }
}

bool is_read_in_place(const Matrix& m, size_t rows) { return rows <= kFewRows && !m.transposed; }

template <typename T>
void product(const float* x, size_t rows, size_t d_in, const Matrix& m, size_t first, size_t width) {
  for (size_t i = 0; i < rows; ++i) std::fill_n(m.out + i * m.d_out + first, width, 0.0f);
  (is_read_in_place(m, rows) ? in_place<T> : by_packing<T>)(x, rows, d_in, m, first, width);
}

}  // namespace

void float_matmul(const float* x, size_t n_rows, size_t d_in, const Matrix* matrices, size_t n_matrices,
                  const ParallelFor& parallel_for) {
  const Distinct distinct(x, n_rows, d_in);
  const size_t rows = distinct.rows;
  std::vector<size_t> ends, widths;  // of each matrix: one past its last task, and the outputs of a task
  for (size_t i = 0; i < n_matrices; ++i) {
    widths.push_back(is_read_in_place(matrices[i], rows) ? kFewWidth : kWidth);
    ends.push_back((matrices[i].d_out + widths[i] - 1) / widths[i] + (i ? ends.back() : 0));
  }
  parallel_for(n_matrices ? ends.back() : 0, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Matrix& m = matrices[i];
    const size_t first = (task - (i ? ends[i - 1] : 0)) * widths[i], width = std::min(widths[i], m.d_out - first);
    switch (m.element) {
      case Element::kFloat32: product<float>(x, rows, d_in, m, first, width); break;
      case Element::kBFloat16: product<BFloat16>(x, rows, d_in, m, first, width); break;
      case Element::kFloat16: product<Float16>(x, rows, d_in, m, first, width); break;
    }
    distinct.fill(m.out, n_rows, m.d_out, first, width);
  });
}

}  // namespace oxjax
