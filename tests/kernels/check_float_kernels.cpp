// Runs the float kernels on odd sizes in buffers without slack and prints a checksum of all the bits they give.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "grouped_matmul.h"
#include "gumbel_max.h"
#include "keep_largest.h"
#include "linear_scan.h"
#include "paged_attention.h"
#include "rotate.h"
#include "row_best.h"
#include "row_norm.h"

using namespace oxjax;

namespace {

std::mt19937 source(0);
uint64_t checksum = 14695981039346656037u;

void backwards(size_t n, const std::function<void(size_t)>& task) {
  for (size_t i = n; i-- > 0;) task(i);
}

// Multiples of 1/64 below 4: sums of some hundred products still round, and every type holds them.
float number() { return static_cast<int>(source() % 512 - 256) / 64.0f; }

std::vector<float> numbers(size_t n) {
  std::vector<float> all(n);
  for (float& x : all) x = number();
  return all;
}

void add(const std::vector<float>& out) {
  for (float x : out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    checksum = (checksum ^ bits) * 1099511628211u;
  }
}

uint16_t as_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 16;
}

// Exact for the numbers above.
uint16_t as_float16(float x) {
  if (x == 0.0f) return 0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023);
}

std::vector<uint16_t> halves(const std::vector<float>& from, Element element) {
  std::vector<uint16_t> to;
  for (float x : from) to.push_back(element == Element::kBFloat16 ? as_bfloat16(x) : as_float16(x));
  return to;
}

void check_matmul() {
  for (size_t rows : {1, 2, 5, 6, 8, 9, 13}) {
    for (size_t d_in : {1, 8, 17, 128, 131}) {
      for (size_t d_out : {1, 15, 64, 67, 257, 530}) {
        const auto x = numbers(rows * d_in), w = numbers(d_in * d_out);
        std::vector<int32_t> from, to;
        for (size_t i = 0; i < rows; ++i) from.push_back(source() % rows), to.push_back(rows - i);
        for (Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
          const auto narrow = halves(w, element);
          const void* data = element == Element::kFloat32 ? static_cast<const void*>(w.data()) : narrow.data();
          std::vector<float> out(rows * d_out), turned(rows * d_out);
          const Matrix both[] = {{data, element, false, d_out, out.data()},
                                 {data, element, true, d_out, turned.data()}};
          float_matmul(x.data(), rows, d_in, both, 2, backwards);
          add(out);
          add(turned);
          std::vector<float> moved((rows + 1) * d_out);
          const Product scattered{rows, d_in,    d_out, {x.data(), d_in, from.data()},
                                  data, element, false, {moved.data(), d_out, to.data()}};
          float_products(&scattered, 1, backwards);
          add(moved);
        }
      }
    }
  }
}

// Experts of odd sizes, of which one is chosen by nobody, and pairs without any.
void check_experts() {
  for (size_t d_in : {1, 17, 131}) {
    for (size_t d_out : {1, 67, 530}) {
      const size_t rows = 11, experts = 5;
      std::vector<int32_t> chosen;
      for (size_t i = 0; i < 2 * rows; ++i) chosen.push_back(source() % 3 ? source() % 4 : experts);
      const Groups groups = grouped(chosen.data(), chosen.size(), experts);
      const auto w = numbers(experts * d_in * d_out), x = numbers(rows * d_in);
      const auto narrow = halves(w, Element::kBFloat16);
      std::vector<float> wide(2 * rows * d_out), out(2 * rows * d_out);
      const FloatExperts maps[] = {{w.data(), Element::kFloat32, d_out, wide.data()},
                                   {narrow.data(), Element::kBFloat16, d_out, out.data()}};
      grouped_matmul(x.data(), d_in, 2, groups, maps, 2, backwards);
      add(wide);
      add(out);
    }
  }
}

// Two sequences, one without rows between them, and padding.
void check_scan() {
  const int32_t starts[] = {0, 3, 3}, ends[] = {3, 3, 8};
  const size_t rows = 10, heads = 4, key_heads = 2;
  for (size_t key_dim : {1, 17}) {
    for (size_t value_dim : {1, 16, 67, 130}) {
      for (size_t decays : {size_t{1}, key_dim}) {
        for (int kind = 0; kind < 4; ++kind) {
          const size_t n_keys = rows * key_heads * key_dim, n_values = rows * heads * value_dim;
          const size_t n_state = 3 * heads * key_dim * value_dim;
          const auto query = numbers(n_keys), key = numbers(n_keys), read = numbers(n_keys), write = numbers(n_keys);
          const auto value = numbers(n_values), bonus = numbers(key_heads * key_dim), initial = numbers(n_state);
          auto decay = numbers(rows * heads * decays);
          for (float& x : decay) x /= 4;
          std::vector<float> y(n_values), states(n_state);
          const LinearScan scan{heads,
                                key_heads,
                                key_dim,
                                value_dim,
                                decays,
                                query.data(),
                                key.data(),
                                value.data(),
                                decay.data(),
                                kind > 1 ? read.data() : nullptr,
                                kind > 2 ? write.data() : nullptr,
                                kind == 1 ? bonus.data() : nullptr,
                                initial.data(),
                                y.data(),
                                states.data()};
          linear_scan(scan, {rows, 3, starts, ends}, backwards);
          add(y);
          add(states);
        }
      }
    }
  }
}

void check_norm() {
  for (size_t d : {1, 15, 64, 65, 1000}) {
    const size_t rows = 12;
    const auto x = numbers(rows * d), weight = numbers(3 * d), bias = numbers(d);
    std::vector<float> out(rows * d), sums(rows);
    for (bool centred : {false, true}) {
      row_norm(x.data(), rows, d, weight.data(), 3, bias.data(), 1e-5f, centred, out.data(), backwards);
      add(out);
      row_norm(x.data(), rows, d, nullptr, 0, nullptr, 1e-5f, centred, out.data(), backwards);
      add(out);
    }
    row_sum(x.data(), rows, d, sums.data(), backwards);
    add(sums);
  }
}

void check_rotate() {
  for (size_t half : {1, 15, 16, 33}) {
    const size_t rows = 9, heads = 3, d = 2 * half + 5;
    const auto x = numbers(rows * heads * d), cos = numbers(rows * half), sin = numbers(rows * half);
    std::vector<float> out(x.size());
    for (bool adjacent : {false, true}) {
      rotate(x.data(), rows, heads, d, cos.data(), sin.data(), half, adjacent, out.data(), backwards);
      add(out);
    }
  }
}

void check_best() {
  for (size_t d : {1, 15, 17, 8192, 8195}) {
    const size_t rows = 5;
    auto x = numbers(rows * d);
    std::copy_n(x.data() + 3 * d, d, x.data() + 4 * d);
    std::vector<int32_t> best(rows);
    std::vector<float> largest(rows), sums(rows);
    row_best(x.data(), rows, d, best.data(), largest.data(), sums.data(), backwards);
    add(largest);
    add(sums);
    add(std::vector<float>(best.begin(), best.end()));
  }
}

void check_draws() {
  for (size_t d : {1, 15, 17, 8192, 8195}) {
    const size_t rows = 9;
    const auto x = numbers(rows * d);
    std::vector<uint32_t> keys(2 * rows);
    for (uint32_t& key : keys) key = source();
    std::vector<int32_t> chosen(rows);
    gumbel_max(x.data(), rows, d, keys.data(), chosen.data(), backwards);
    add(std::vector<float>(chosen.begin(), chosen.end()));
  }
  for (size_t i = 0; i < 64; ++i) {  // the noise's logarithms, at all sizes
    auto x = numbers(16);
    for (float& v : x) v = std::abs(v) / (1 << i % 24) + 1e-30f;
    std::vector<float> y(16);
    store(y.data(), log_of_positive(load(x.data())));
    add(y);
    for (float& v : x) v = -std::min(v, 0.9999999f);
    store(y.data(), log1p_of_negative(load(x.data())));
    add(y);
  }
}

void check_selection() {
  for (size_t d : {1, 17, 64, 300, 20003}) {  // those sorted, and those that are too many to be
    auto x = numbers(d), mass = numbers(d);
    for (float& v : mass) v = std::abs(v);
    for (size_t i = 0; i < d; i += 7) x[i] = -std::numeric_limits<float>::infinity();
    for (auto [kind, wanted] : {std::pair{Mass::kGiven, 3.0},
                                {Mass::kOnes, 5.0},
                                {Mass::kOnes, 0.5 * d},
                                {Mass::kShares, 0.3},
                                {Mass::kShares, 0.99}}) {
      std::vector<float> out(d);
      keep_largest(x.data(), x.data(), mass.data(), kind, d, wanted, out.data(), backwards);
      for (float& v : out) v = std::max(v, -1e9f);
      add(out);
    }
  }
}

void check_attention() {
  const size_t kPageSize = 8, kPages = 40;
  for (size_t group : {1, 3, 70}) {
    for (size_t key_dim : {1, 17, 64}) {
      for (size_t value_dim : {1, 16, 67}) {
        for (Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
          const size_t kv = 2, heads = kv * group;
          // Sequence 0: 300 tokens, of which the last 5 are rows; sequence 1: 9 tokens; a row of padding.
          const size_t rows = 15, length = 38;
          std::vector<int32_t> tables(2 * length), seqs, positions;
          for (int32_t& page : tables) page = source() % kPages;
          for (int i = 0; i < 15; ++i) {
            seqs.push_back(i < 5 ? 0 : i < 14 ? 1 : -1);
            positions.push_back(i < 5 ? 295 + i : i - 5);
          }
          const auto q = numbers(rows * heads * key_dim), k = numbers(kPages * kPageSize * kv * key_dim),
                     v = numbers(kPages * kPageSize * kv * value_dim), slopes = numbers(heads), sinks = numbers(heads);
          const auto k_narrow = halves(k, element), v_narrow = halves(v, element);
          const bool wide = element == Element::kFloat32;
          const Pages keys{wide ? static_cast<const void*>(k.data()) : k_narrow.data(), element, key_dim};
          const Pages values{wide ? static_cast<const void*>(v.data()) : v_narrow.data(), element, value_dim};
          const AttentionShape shape{rows, heads, kv, kPageSize, length};
          for (const AttentionForm& form : {AttentionForm{0.3f, 0, 0, 0.0f, nullptr, nullptr},
                                            AttentionForm{0.1f, 100, 0, 2.0f, nullptr, sinks.data()},
                                            AttentionForm{1.0f, 0, 7, 0.0f, slopes.data(), nullptr}}) {
            std::vector<float> out(rows * heads * value_dim);
            paged_attention(q.data(), &keys, 1, values, tables.data(), seqs.data(), positions.data(), shape, form,
                            out.data(), backwards);
            add(out);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_matmul();
  check_experts();
  check_scan();
  check_norm();
  check_best();
  check_draws();
  check_selection();
  check_rotate();
  check_attention();
  std::printf("%016llx\n", static_cast<unsigned long long>(checksum));
}
