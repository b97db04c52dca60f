// Runs the kernel on odd sizes in buffers without slack, with every set of instructions, and compares the bits.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "quantized_matmul.h"

using namespace oxjax;

int main() {
  const Format formats[] = {{4, 8, 32, false, false}, {4, 0, 32, false, true}, {5, 16, 32, false, false},
                            {5, 0, 32, false, true},  {8, 128, 32, false, false}, {4, 0, 32, true, true},
                            {5, 0, 32, true, true},   {6, 32, 16, true, false}, {8, 128, 32, true, false}};
  std::mt19937 random(0);
  int compared = 0;
  for (const Format& format : formats) {
    for (size_t d_in : {256, 512}) {
      for (size_t d_out : {1, 16, 33}) {
        for (size_t rows : {1, 7, 8, 13}) {
          const size_t panels = (d_out + kPanel - 1) / kPanel, bytes = format.panel_bytes(d_in);
          std::vector<uint8_t> packed(panels * bytes);
          for (auto& b : packed) b = random();
          // Float16 scales keep clear of infinity and NaN, whose payloads may differ.
          const size_t codes = d_in * kPanel * format.bits / 8;
          const size_t halves = format.scales(d_in) * kPanel * (format.minima ? 2 : 1);
          for (size_t p = 0; p < panels; ++p)
            for (size_t i = 0; i < halves; ++i) packed[p * bytes + codes + 2 * i + 1] &= 0xbb;
          std::vector<float> x(rows * d_in);
          for (auto& v : x) v = std::normal_distribution<float>()(random);
          x[0] = 1e30f;
          std::vector<float> expected;
          for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512Vnni}) {
            if (!supported(isa)) continue;
            std::vector<float> out(rows * d_out);
            const Weights weights{format, packed.data(), d_out, out.data()};
            quantized_matmul(x.data(), rows, d_in, &weights, 1,
                             [](size_t n, const std::function<void(size_t)>& task) {
                               for (size_t i = n; i-- > 0;) task(i);
                             },
                             isa);
            if (expected.empty()) expected = out;
            if (std::memcmp(expected.data(), out.data(), out.size() * sizeof(float)) != 0) {
              std::printf("bits differ: %d bits, %zu x %zu, %zu rows\n", format.bits, d_in, d_out, rows);
              return 1;
            }
            ++compared;
          }
        }
      }
    }
  }
  std::printf("all agree: %d\n", compared);
}
