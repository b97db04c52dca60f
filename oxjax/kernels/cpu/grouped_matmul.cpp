#include "grouped_matmul.h"

#include <algorithm>

#include "activations.h"

namespace oxjax {
namespace {

size_t n_experts(const Groups& groups) { return groups.bounds.size() - 1; }

// Pairs without an expert come last.
template <typename Map>
void clear_others(const Groups& groups, const Map* maps, size_t n_maps) {
  for (size_t m = 0; m < n_maps; ++m)
    for (size_t i = groups.bounds.back(); i < groups.pairs.size(); ++i)
      std::fill_n(maps[m].out + groups.pairs[i] * maps[m].d_out, maps[m].d_out, 0.0f);
}

// Each expert's rows times its matrices, as floats.
template <typename Map, typename SetMatrix>
void float_products(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups, const Map* maps,
                    size_t n_maps, const ParallelFor& parallel_for, SetMatrix set_matrix) {
  std::vector<int32_t> read;
  for (int32_t pair : groups.pairs) read.push_back(pair / pairs_per_row);
  std::vector<Product> products;
  for (size_t e = 0; e < n_experts(groups); ++e) {
    const size_t first = groups.bounds[e], rows = groups.bounds[e + 1] - first;
    for (size_t m = 0; m < n_maps && rows; ++m) {
      const size_t d_out = maps[m].d_out;
      Product product{rows, d_in, d_out, {x, d_in, &read[first]}};
      product.out = {maps[m].out, d_out, &groups.pairs[first]};
      set_matrix(product, maps[m], e);
      products.push_back(product);
    }
  }
  clear_others(groups, maps, n_maps);
  float_products(products.data(), products.size(), parallel_for);
}

}  // namespace

Groups grouped(const int32_t* chosen, size_t n_pairs, size_t n_experts) {
  Groups groups{std::vector<int32_t>(n_pairs), std::vector<int32_t>(n_experts + 2)};
  std::vector<int32_t>& bounds = groups.bounds;
  for (size_t i = 0; i < n_pairs; ++i) ++bounds[chosen[i] + 1];
  for (size_t e = 1; e < bounds.size(); ++e) bounds[e] += bounds[e - 1];
  std::vector<int32_t> next = bounds;
  for (size_t i = 0; i < n_pairs; ++i) groups.pairs[next[chosen[i]]++] = i;
  bounds.pop_back();
  return groups;
}

void grouped_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups, const FloatExperts* maps,
                    size_t n_maps, const ParallelFor& parallel_for) {
  float_products(x, d_in, pairs_per_row, groups, maps, n_maps, parallel_for,
                 [&](Product& p, const FloatExperts& map, size_t e) {
                   p.matrix = static_cast<const char*>(map.data) + e * d_in * map.d_out * bytes_of(map.element);
                   p.element = map.element;
                 });
}

void grouped_dequantized_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups,
                                const QuantizedExperts* maps, size_t n_maps, const ParallelFor& parallel_for) {
  float_products(x, d_in, pairs_per_row, groups, maps, n_maps, parallel_for,
                 [&](Product& p, const QuantizedExperts& map, size_t e) {
                   p.matrix = map.panels + e * map.n_panels() * map.format.panel_bytes(d_in);
                   p.panels = &map.format;
                 });
}

void grouped_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups,
                    const QuantizedExperts* maps, size_t n_maps, const ParallelFor& parallel_for) {
  // Where each pair's activations go: tiles are made of the rows of one expert.
  std::vector<Place> places(groups.pairs.size());
  for (size_t e = 0; e < n_experts(groups); ++e) {
    const size_t first = groups.bounds[e], last = groups.bounds[e + 1];
    for (size_t r = first, tile_rows; r < last; r += tile_rows) {
      tile_rows = tile_rows_at(r - first, last - first);
      for (size_t i = 0; i < tile_rows; ++i) places[groups.pairs[r + i]] = {r, tile_rows, i};
    }
  }

  // Each row is quantised once, and copied for its further pairs.
  Activations inputs(groups.bounds.back(), d_in, maps, n_maps);
  constexpr size_t kRowsAtOnce = 8;
  const size_t rows = groups.pairs.size() / pairs_per_row;
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    for (size_t r = part * kRowsAtOnce; r < std::min(rows, (part + 1) * kRowsAtOnce); ++r) {
      const Place* made = nullptr;
      for (size_t pair = r * pairs_per_row; pair < (r + 1) * pairs_per_row; ++pair) {
        if (places[pair].tile_rows == 0) continue;  // without an expert
        if (made) {
          inputs.copy(*made, places[pair]);
        } else {
          inputs.quantize(x + r * d_in, places[pair]);
          made = &places[pair];
        }
      }
    }
  });

  // A task is some panels of one expert's matrix and all rows that chose it.
  constexpr size_t kTaskBytes = 128 << 10;
  struct Task {
    size_t expert, map, first_panel, last_panel;
  };
  std::vector<Task> tasks;
  for (size_t e = 0; e < n_experts(groups); ++e) {
    for (size_t m = 0; m < n_maps && groups.bounds[e] < groups.bounds[e + 1]; ++m) {
      const size_t at_once = std::max<size_t>(kTaskBytes / maps[m].format.panel_bytes(d_in), 1);
      for (size_t panel = 0; panel < maps[m].n_panels(); panel += at_once)
        tasks.push_back({e, m, panel, std::min(maps[m].n_panels(), panel + at_once)});
    }
  }
  clear_others(groups, maps, n_maps);
  parallel_for(tasks.size(), [&](size_t i) {
    const DefaultArithmetic arithmetic;
    const Task& task = tasks[i];
    const QuantizedExperts& map = maps[task.map];
    const size_t bytes = map.format.panel_bytes(d_in), first = groups.bounds[task.expert];
    const size_t last = groups.bounds[task.expert + 1];
    const uint8_t* matrix = map.panels + task.expert * map.n_panels() * bytes;
    for (size_t panel = task.first_panel; panel < task.last_panel; ++panel) {
      const size_t width = std::min(kPanel, map.d_out - panel * kPanel);
      const uint8_t* codes = matrix + panel * bytes;
      const uint8_t* next = panel + 1 < task.last_panel ? codes + bytes : codes;
      for (size_t r = first, tile_rows; r < last; r += tile_rows) {
        tile_rows = tile_rows_at(r - first, last - first);
        float out[kTallestTile * kPanel];
        tile_for(map.format, tile_rows)(inputs.at(r, task.map), d_in / kChunk, codes, next, out, kPanel, width);
        for (size_t j = 0; j < tile_rows; ++j)
          std::copy_n(out + j * kPanel, width, map.out + groups.pairs[r + j] * map.d_out + panel * kPanel);
      }
    }
  });
}

}  // namespace oxjax
