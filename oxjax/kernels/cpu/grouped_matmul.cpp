#include "grouped_matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>

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
  std::vector<int32_t> read;
  for (int32_t pair : groups.pairs) read.push_back(pair / pairs_per_row);
  std::vector<Product> products;
  for (size_t e = 0; e < n_experts(groups); ++e) {
    const size_t first = groups.bounds[e], rows = groups.bounds[e + 1] - first;
    for (size_t m = 0; m < n_maps && rows; ++m) {
      const FloatExperts& map = maps[m];
      const char* matrix = static_cast<const char*>(map.data) + e * d_in * map.d_out * bytes_of(map.element);
      products.push_back({rows, d_in, map.d_out, {x, d_in, &read[first]}, matrix, map.element, false,
                          {map.out, map.d_out, &groups.pairs[first]}});
    }
  }
  clear_others(groups, maps, n_maps);
  float_matmul(products.data(), products.size(), parallel_for);
}

void grouped_matmul(const float* x, size_t d_in, size_t pairs_per_row, const Groups& groups,
                    const QuantizedExperts* maps, size_t n_maps, const ParallelFor& parallel_for, Isa isa) {
  const size_t chunks = d_in / kChunk, n_pairs = groups.bounds.back();
  std::vector<int32_t> place(groups.pairs.size());
  for (size_t i = 0; i < place.size(); ++i) place[groups.pairs[i]] = i;

  // Each row is quantised once, to the places of all its pairs.
  const std::unique_ptr<Chunk[]> inputs(new Chunk[n_pairs * chunks]);
  constexpr size_t kRowsAtOnce = 16;
  const size_t rows = groups.pairs.size() / pairs_per_row;
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](size_t part) {
    const DefaultArithmetic arithmetic;
    for (size_t r = part * kRowsAtOnce; r < std::min(rows, (part + 1) * kRowsAtOnce); ++r) {
      const Chunk* made = nullptr;
      for (size_t pair = r * pairs_per_row; pair < (r + 1) * pairs_per_row; ++pair) {
        if (static_cast<size_t>(place[pair]) >= n_pairs) continue;
        Chunk* to = &inputs[place[pair] * chunks];
        if (made) {
          std::copy_n(made, chunks, to);
        } else {
          quantize(x + r * d_in, chunks, to);
          made = to;
        }
      }
    }
  });

  // A task is some panels of one expert's matrix and all rows that chose it.
  constexpr size_t kTaskBytes = 128 << 10, kBlockRows = 256;
  struct Task {
    size_t expert, map, first_panel, last_panel;
  };
  std::vector<Task> tasks;
  for (size_t e = 0; e < n_experts(groups); ++e) {
    if (groups.bounds[e] == groups.bounds[e + 1]) continue;
    for (size_t m = 0; m < n_maps; ++m) {
      const size_t panels = (maps[m].d_out + kPanel - 1) / kPanel;
      const size_t at_once = std::max<size_t>(kTaskBytes / maps[m].format.panel_bytes(d_in), 1);
      for (size_t panel = 0; panel < panels; panel += at_once)
        tasks.push_back({e, m, panel, std::min(panels, panel + at_once)});
    }
  }
  clear_others(groups, maps, n_maps);
  parallel_for(tasks.size(), [&](size_t i) {
    const DefaultArithmetic arithmetic;
    const Task& task = tasks[i];
    const QuantizedExperts& map = maps[task.map];
    const PanelProduct product = panel_product_for(map.format, isa);
    const size_t bytes = map.format.panel_bytes(d_in), panels = (map.d_out + kPanel - 1) / kPanel;
    const size_t last_row = groups.bounds[task.expert + 1];
    float out[kBlockRows * kPanel];
    for (size_t first = groups.bounds[task.expert]; first < last_row; first += kBlockRows) {
      const size_t n = std::min(kBlockRows, last_row - first);
      for (size_t panel = task.first_panel; panel < task.last_panel; ++panel) {
        const size_t width = std::min(kPanel, map.d_out - panel * kPanel);
        product(map.format, &inputs[first * chunks], n, chunks, map.panels + (task.expert * panels + panel) * bytes,
                out, kPanel, width);
        for (size_t r = 0; r < n; ++r)
          std::copy_n(out + r * kPanel, width, map.out + groups.pairs[first + r] * map.d_out + panel * kPanel);
      }
    }
  });
}

}  // namespace oxjax
