// Rows of activations in int8, laid out for the tiles that multiply them with panels.
#pragma once

#include <vector>

#include "panel.h"

namespace oxjax {

// The loop for a format and so many rows; null where there is none.
Tile tile_for(const Format& format, size_t rows);

// Rows of the tile that begins at row `r`: a power of two, as large as the rows left allow.
inline size_t tile_rows_at(size_t r, size_t rows) {
  size_t tile_rows = kTallestTile;
  while (tile_rows > rows - r) tile_rows /= 2;
  return tile_rows;
}

// A row of a tile: the tile's first row, its number of rows, and the row within it.
struct Place {
  size_t first, tile_rows, row;
};

// And the corrections that each of the weights needs.
class Activations {
 public:
  Activations(size_t rows, size_t d_in, const Weights* weights, size_t n_weights);

  // 32 inputs share a scale. A group that holds an infinity or NaN gets the scale NaN, one smaller than floats can
  // divide by counts as zero.
  void quantize(const float* x, const Place& to);
  void copy(const Place& from, const Place& to);

  // Of the tile that begins at row `first`, for the weights of this number.
  Inputs at(size_t first, size_t of_weights) const {
    return {codes_.data() + first * chunks_ * kChunk, scales_.data() + first * chunks_,
            corrections_[of_weights].data() + first * chunks_ * groups(of_weights)};
  }

 private:
  size_t groups(size_t of_weights) const { return kChunk / formats_[of_weights].group; }

  size_t chunks_;
  std::vector<Format> formats_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<std::vector<int32_t>> corrections_;
};

}  // namespace oxjax
