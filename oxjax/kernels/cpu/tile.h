// Some rows times a panel of a matrix: the one loop that all float products are made of.
#pragma once

#include "simd.h"

namespace oxjax {

#if defined(__AVX512F__)
constexpr size_t kTallest = 6, kWidest = 4;  // rows, and vectors of outputs, whose sums fit in the registers
#else
constexpr size_t kTallest = 2, kWidest = 2;
#endif
constexpr size_t kTileWidth = kWidest * kLanes;

// c += a @ b, in the order of b's rows, without a rounding between product and sum. So the bits of an output depend
// on its row of a and its column of b alone, and not on how sums over more rows of b are cut into calls.
//
// Of b's and c's rows, `width` numbers exist (at most 16 kVectors); b is read beyond them only where `padded`.
template <size_t kRows, size_t kVectors, typename T>
OXJAX_INLINE void tile(const float* a, size_t a_stride, const T* b, size_t b_stride, size_t depth, float* c,
                       size_t c_stride, size_t width, bool padded) {
  const size_t last = width - (kVectors - 1) * kLanes;
  f32x16 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (size_t j = 0; j < kVectors; ++j)
      sums[i][j] =
          j + 1 < kVectors ? load(c + i * c_stride + j * kLanes) : load_first(c + i * c_stride + j * kLanes, last);
  }
  for (size_t k = 0; k < depth; ++k) {
    f32x16 row[kVectors];
#pragma GCC unroll 8
    for (size_t j = 0; j < kVectors; ++j) {
      const T* from = b + k * b_stride + j * kLanes;
      row[j] = j + 1 < kVectors || padded ? load(from) : load_first(from, last);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows; ++i) {
      const f32x16 x = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 8
      for (size_t j = 0; j < kVectors; ++j) sums[i][j] = fma(x, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (size_t j = 0; j < kVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      j + 1 < kVectors ? store(to, sums[i][j]) : store_first(to, sums[i][j], last);
    }
  }
}

// The same for at most kTileWidth outputs.
template <size_t kRows, typename T>
void tile_of_rows(const float* a, size_t a_stride, const T* b, size_t b_stride, size_t depth, float* c, size_t c_stride,
                  size_t width, bool padded) {
  if (width > (kWidest - 1) * kLanes)
    return tile<kRows, kWidest>(a, a_stride, b, b_stride, depth, c, c_stride, width, padded);
  for (size_t j = 0; j < width; j += kLanes)
    tile<kRows, 1>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, width - j < kLanes ? width - j : kLanes,
                   padded);
}

// And for any number of rows.
template <typename T>
void tiles(const float* a, size_t a_stride, size_t rows, const T* b, size_t b_stride, size_t depth, float* c,
           size_t c_stride, size_t width, bool padded) {
  while (rows) {
    size_t n = 1;
    if (rows >= kTallest) {
      n = kTallest;
      tile_of_rows<kTallest>(a, a_stride, b, b_stride, depth, c, c_stride, width, padded);
    } else if (rows >= 2) {
      n = 2;
      tile_of_rows<2>(a, a_stride, b, b_stride, depth, c, c_stride, width, padded);
    } else {
      tile_of_rows<1>(a, a_stride, b, b_stride, depth, c, c_stride, width, padded);
    }
    a += n * a_stride;
    c += n * c_stride;
    rows -= n;
  }
}

// Copies columns first .. first + width of b's rows (or, transposed, of its columns) to rows of `to`, whole vectors
// long with zeros at the end.
template <typename T>
void pack(const T* b, size_t b_stride, bool transposed, size_t depth, size_t width, float* to, size_t to_stride) {
  for (size_t k = 0; k < depth && !transposed; ++k)
    for (size_t j = 0; j < width; j += kLanes)
      store(to + k * to_stride + j, load_first(b + k * b_stride + j, width - j));
  for (size_t j = 0; j < width && transposed; j += kLanes) {
    const size_t columns = width - j < kLanes ? width - j : kLanes;
    for (size_t k = 0; k < depth; k += kLanes) {
      const size_t here = depth - k < kLanes ? depth - k : kLanes;
      f32x16 block[kLanes] = {};
      for (size_t i = 0; i < columns; ++i) block[i] = load_first(b + (j + i) * b_stride + k, here);
      transpose(block);
      for (size_t i = 0; i < here; ++i) store(to + (k + i) * to_stride + j, block[i]);
    }
  }
}

}  // namespace oxjax
