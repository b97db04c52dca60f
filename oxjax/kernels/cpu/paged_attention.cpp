#include "paged_attention.h"

#include <algorithm>
#include <vector>

#include "tile.h"

namespace oxjax {
namespace {

constexpr size_t kBlock = 128;          // keys, counted from position 0, that share one step of the online softmax
constexpr size_t kQueries = 64;         // queries of a task: rows times the heads that share a key head
constexpr float kNothingSeen = -1e30f;  // finite, so that a row with nothing to see yet does not make NaN

size_t whole_vectors(size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Some rows of one sequence.
struct Rows {
  size_t first, n;
};

// One thread's working memory.
struct Scratch {
  std::vector<float> q, keys, scores, values, sums, best, total;
};

class Attention {
 public:
  Attention(const float* q, const Pages* keys, size_t n_keys, const Pages& v, const int32_t* block_tables,
            const int32_t* row_seq, const int32_t* positions, const AttentionShape& shape, const AttentionForm& form,
            float* out)
      : q_(q),
        keys_(keys),
        n_keys_(n_keys),
        v_(v),
        block_tables_(block_tables),
        row_seq_(row_seq),
        positions_(positions),
        shape_(shape),
        form_(form),
        out_(out),
        group_(shape.n_heads / shape.n_kv) {
    for (size_t i = 0; i < n_keys; ++i) key_dim_ += keys[i].dim;
  }

  // The rows of a task and one key head with the query heads that read it.
  void run(Rows rows, size_t head) const {
    static thread_local Scratch s;
    const size_t n = rows.n * group_, width = whole_vectors(v_.dim);
    int64_t oldest = positions_[rows.first], newest = oldest;
    for (size_t i = rows.first; i < rows.first + rows.n; ++i) {
      oldest = std::min(oldest, oldest_seen(positions_[i]));
      newest = std::max<int64_t>(newest, positions_[i]);
    }
    s.q.resize(n * key_dim_);
    for (size_t i = 0; i < rows.n; ++i)
      std::copy_n(q_ + ((rows.first + i) * shape_.n_heads + head * group_) * key_dim_, group_ * key_dim_,
                  s.q.data() + i * group_ * key_dim_);
    s.keys.resize(key_dim_ * kBlock);
    s.scores.resize(n * kBlock);
    s.values.assign(n * width, 0.0f);
    s.best.assign(n, kNothingSeen);
    s.total.assign(n, 0.0f);
    const int32_t* table = block_tables_ + row_seq_[rows.first] * shape_.table_length;
    for (int64_t block = oldest / kBlock * kBlock; block <= newest; block += kBlock) {
      const size_t first = std::max<int64_t>(oldest - block, 0), last = std::min<int64_t>(newest - block + 1, kBlock);
      score(s, table, block, first, last, n, head);
      for (size_t i = 0; i < n; ++i)
        weigh(s, rows, block, i, head, width, first / kLanes * kLanes, whole_vectors(last));
      add_values(s, table, block, first, last, n, head, width);
    }
    for (size_t i = 0; i < n; ++i) finish(s, rows, i, head, width);
  }

 private:
  int64_t oldest_seen(int64_t position) const {
    if (form_.window) return std::max<int64_t>(position - form_.window + 1, 0);
    return form_.chunk ? position / form_.chunk * form_.chunk : 0;
  }

  template <typename T>
  const T* row_of(const Pages& p, const int32_t* table, int64_t position, size_t head) const {
    const uint32_t at = position, page_size = shape_.page_size;  // a division of 64 bits takes several times as long
    const size_t page = table[at / page_size], offset = at % page_size;
    return static_cast<const T*>(p.data) + ((page * shape_.page_size + offset) * shape_.n_kv + head) * p.dim;
  }

  // Keys first .. last of the block as columns, from row `at` on.
  template <typename T>
  void pack_keys(const Pages& p, const int32_t* table, int64_t block, size_t first, size_t last, size_t head,
                 float* to) const {
    for (size_t j = first / kLanes * kLanes; j < last; j += kLanes) {
      const T* rows[kLanes];
      for (size_t i = 0; i < kLanes; ++i)
        rows[i] = j + i < first || j + i >= last ? nullptr : row_of<T>(p, table, block + j + i, head);
      for (size_t k = 0; k < p.dim; k += kLanes) {
        f32x16 part[kLanes];
        for (size_t i = 0; i < kLanes; ++i) part[i] = rows[i] ? load_first(rows[i] + k, p.dim - k) : f32x16{};
        transpose(part);
        for (size_t i = 0; i < std::min(kLanes, p.dim - k); ++i) store(to + (k + i) * kBlock + j, part[i]);
      }
    }
  }

  void score(Scratch& s, const int32_t* table, int64_t block, size_t first, size_t last, size_t n, size_t head) const {
    float* to = s.keys.data();
    for (size_t i = 0; i < n_keys_; to += keys_[i++].dim * kBlock) {
      switch (keys_[i].element) {
        case Element::kFloat32: pack_keys<float>(keys_[i], table, block, first, last, head, to); break;
        case Element::kBFloat16: pack_keys<BFloat16>(keys_[i], table, block, first, last, head, to); break;
        case Element::kFloat16: pack_keys<Float16>(keys_[i], table, block, first, last, head, to); break;
      }
    }
    const size_t from = first / kLanes * kLanes, end = whole_vectors(last);
    for (size_t i = 0; i < n; ++i) std::fill_n(s.scores.data() + i * kBlock + from, end - from, 0.0f);
    for (size_t j = from; j < end; j += kTileWidth)
      tiles(s.q.data(), key_dim_, n, s.keys.data() + j, kBlock, key_dim_, s.scores.data() + j, kBlock,
            std::min(kTileWidth, end - j), true);
  }

  // Turns a query's scores of a block into weights, and its sums so far to their new scale. Nobody in the task sees
  // keys before `from` or from `end` on, which would add nothing.
  void weigh(Scratch& s, Rows rows, int64_t block, size_t i, size_t head, size_t width, size_t from, size_t end) const {
    const int64_t position = positions_[rows.first + i / group_];
    const int32_t newest = static_cast<int32_t>(std::min<int64_t>(position - block, kBlock - 1));
    const int32_t oldest = static_cast<int32_t>(std::max<int64_t>(oldest_seen(position) - block, 0));
    const size_t query_head = head * group_ + i % group_;
    float* scores = s.scores.data() + i * kBlock;
    i32x16 lane;
    for (size_t l = 0; l < kLanes; ++l) lane[l] = l;
    f32x16 most = broadcast(kNothingSeen);
    for (size_t j = from; j < end; j += kLanes) {
      const i32x16 key = lane + static_cast<int32_t>(j);
      f32x16 x = load(scores + j) * form_.scale;
      if (form_.softcap != 0.0f) x = form_.softcap * tanh_of(x / form_.softcap);
      if (form_.slopes)
        x -= form_.slopes[query_head] * __builtin_convertvector(static_cast<int32_t>(position - block) - key, f32x16);
      x = (key <= newest) & (key >= oldest) ? x : kNothingSeen + f32x16{};
      store(scores + j, x);
      most = larger(most, x);
    }
    const float best = std::max(s.best[i], largest_of(most));
    f32x16 sum = {};
    for (size_t j = from; j < end; j += kLanes) {
      const i32x16 key = lane + static_cast<int32_t>(j);
      const f32x16 weight = exp_of_negative(load(scores + j) - best);
      const f32x16 seen = (key <= newest) & (key >= oldest) ? weight : f32x16{};
      store(scores + j, seen);
      sum += seen;
    }
    const float shrink = exp_of_negative(broadcast(s.best[i] - best))[0];
    s.best[i] = best;
    s.total[i] = s.total[i] * shrink + sum_of(sum);
    float* values = s.values.data() + i * width;
    if (shrink != 1.0f)
      for (size_t d = 0; d < width; d += kLanes) store(values + d, load(values + d) * shrink);
  }

  template <typename T>
  void add_values_of(Scratch& s, const int32_t* table, int64_t block, size_t first, size_t last, size_t n, size_t head,
                     size_t width) const {
    const size_t stride = shape_.n_kv * v_.dim;
    for (size_t j = first; j < last;) {  // a page at a time
      const size_t left = shape_.page_size - (block + j) % shape_.page_size, here = std::min(left, last - j);
      const T* from = row_of<T>(v_, table, block + j, head);
      for (size_t d = 0; d < v_.dim; d += kTileWidth)
        tiles(s.scores.data() + j, kBlock, n, from + d, stride, here, s.values.data() + d, width,
              std::min(kTileWidth, v_.dim - d), false);
      j += here;
    }
  }

  void add_values(Scratch& s, const int32_t* table, int64_t block, size_t first, size_t last, size_t n, size_t head,
                  size_t width) const {
    switch (v_.element) {
      case Element::kFloat32: return add_values_of<float>(s, table, block, first, last, n, head, width);
      case Element::kBFloat16: return add_values_of<BFloat16>(s, table, block, first, last, n, head, width);
      case Element::kFloat16: return add_values_of<Float16>(s, table, block, first, last, n, head, width);
    }
  }

  void finish(Scratch& s, Rows rows, size_t i, size_t head, size_t width) const {
    const size_t query_head = head * group_ + i % group_;
    float total = s.total[i], shrink = 1.0f;
    if (form_.sinks) {  // a score without a value joins
      const float sink = form_.sinks[query_head], best = std::max(s.best[i], sink);
      shrink = exp_of_negative(broadcast(s.best[i] - best))[0];
      total = total * shrink + exp_of_negative(broadcast(sink - best))[0];
    }
    const float* values = s.values.data() + i * width;
    float* to = out_ + ((rows.first + i / group_) * shape_.n_heads + query_head) * v_.dim;
    for (size_t d = 0; d < v_.dim; d += kLanes)  // the last addition makes one zero of two
      store_first(to + d, load(values + d) * shrink / total + 0.0f, v_.dim - d);
  }

  const float* q_;
  const Pages* keys_;
  size_t n_keys_;
  Pages v_;
  const int32_t *block_tables_, *row_seq_, *positions_;
  AttentionShape shape_;
  AttentionForm form_;
  float* out_;
  size_t group_, key_dim_ = 0;
};

}  // namespace

void paged_attention(const float* q, const Pages* keys, size_t n_keys, const Pages& v, const int32_t* block_tables,
                     const int32_t* row_seq, const int32_t* positions, const AttentionShape& shape,
                     const AttentionForm& form, float* out, const ParallelFor& parallel_for) {
  const size_t at_once = std::max<size_t>(kQueries / (shape.n_heads / shape.n_kv), 1);
  std::vector<Rows> parts;
  for (size_t i = 0; i < shape.rows; ++i) {
    if (row_seq[i] < 0) {
      std::fill_n(out + i * shape.n_heads * v.dim, shape.n_heads * v.dim, 0.0f);
    } else if (!parts.empty() && parts.back().n < at_once && parts.back().first + parts.back().n == i &&
               row_seq[i] == row_seq[i - 1]) {
      ++parts.back().n;
    } else {
      parts.push_back({i, 1});
    }
  }
  const Attention attention(q, keys, n_keys, v, block_tables, row_seq, positions, shape, form, out);
  parallel_for(parts.size() * shape.n_kv, [&](size_t task) {
    const DefaultArithmetic arithmetic;
    attention.run(parts[task / shape.n_kv], task % shape.n_kv);
  });
}

}  // namespace oxjax
