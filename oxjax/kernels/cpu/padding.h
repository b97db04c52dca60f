// Rows at the end of a batch that are all alike, as padding is: computed once, and not at all where they are zeros.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace oxjax {

// How many rows to compute; what the others get is the last of these, or zeros.
struct UniqueRows {
  size_t rows;
  bool zeros;

  UniqueRows(const float* x, size_t n, size_t d) : rows(n), zeros(false) {
    if (n == 0) return;
    while (rows > 1 && std::memcmp(x + (rows - 2) * d, x + (rows - 1) * d, d * sizeof(float)) == 0) --rows;
    const float* last = x + (rows - 1) * d;
    zeros = std::all_of(last, last + d, [](float v) { return v == 0.0f; });
    rows -= zeros;
  }

  // Completes columns first .. first + width of n rows.
  void fill(float* out, size_t n, size_t stride, size_t first, size_t width) const {
    for (size_t r = rows; r < n; ++r) {
      float* to = out + r * stride + first;
      if (zeros) {
        std::fill_n(to, width, 0.0f);
      } else {
        std::copy_n(out + (rows - 1) * stride + first, width, to);
      }
    }
  }
};

}  // namespace oxjax
