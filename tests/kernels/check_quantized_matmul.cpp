// Runs the kernels on odd sizes in buffers without slack, compares rows with themselves alone and with what experts
// give, and prints a checksum of all the bits.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "grouped_matmul.h"

using namespace oxjax;

namespace {

uint64_t checksum = 14695981039346656037u;

void add(const std::vector<float>& out) {
  for (float v : out) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    checksum = (checksum ^ bits) * 1099511628211u;
  }
}

}  // namespace

int main() {
  const Format formats[] = {{4, 8, 32, false, false}, {4, 0, 32, false, true},    {5, 16, 32, false, false},
                            {5, 0, 32, false, true},  {8, 128, 32, false, false}, {4, 0, 32, true, true},
                            {5, 0, 32, true, true},   {6, 32, 16, true, false},   {8, 128, 32, true, false},
                            {4, 8, 16, true, false},  {4, 0, 16, true, true},     {8, 128, 16, true, false}};
  std::mt19937 random(0);
  const auto backwards = [](size_t n, const std::function<void(size_t)>& task) {
    for (size_t i = n; i-- > 0;) task(i);
  };
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
          // The last rows are alike, or zeros.
          for (size_t r = rows - rows / 3; r < rows; ++r)
            for (size_t i = 0; i < d_in; ++i) x[r * d_in + i] = rows % 2 ? 0.0f : x[i];
          std::vector<float> out(rows * d_out), one(d_out);
          for (auto product : {dequantized_matmul, quantized_matmul}) {
            const Weights weights{format, packed.data(), d_out, out.data()};
            product(x.data(), rows, d_in, &weights, 1, backwards);
            add(out);
            for (size_t r = 0; r < rows; ++r) {
              const Weights same{format, packed.data(), d_out, one.data()};
              product(x.data() + r * d_in, 1, d_in, &same, 1, backwards);
              if (std::memcmp(one.data(), out.data() + r * d_out, d_out * sizeof(float)) != 0) {
                std::printf("a row alone differs: %d bits, %zu x %zu, row %zu of %zu\n", format.bits, d_in, d_out, r,
                            rows);
                return 1;
              }
            }
          }

          // By expert: two of three have half of the matrix each, as far as panels go; some pairs have none.
          const size_t half = (panels / 2) * kPanel;
          std::vector<int32_t> chosen(2 * rows);
          for (auto& e : chosen) e = random() % 3 == 0 ? 2 : random() % 2;
          const Groups groups = grouped(chosen.data(), chosen.size(), 2);
          std::vector<float> pairs(chosen.size() * half), dense(pairs.size());
          const QuantizedExperts experts{format, packed.data(), half, pairs.data()};
          grouped_matmul(x.data(), d_in, 2, groups, &experts, 1, backwards);
          add(pairs);
          const QuantizedExperts floats{format, packed.data(), half, dense.data()};
          grouped_dequantized_matmul(x.data(), d_in, 2, groups, &floats, 1, backwards);
          add(dense);
          for (size_t i = 0; i < chosen.size() && half; ++i) {
            const std::vector<float> zeros(half);
            const float* same = chosen[i] == 2 ? zeros.data() : out.data() + i / 2 * d_out + chosen[i] * half;
            if (std::memcmp(same, pairs.data() + i * half, half * sizeof(float)) != 0) {
              std::printf("an expert gives something else: %d bits, %zu x %zu, pair %zu\n", format.bits, d_in, half, i);
              return 1;
            }
          }
        }
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(checksum));
}
