// Handlers of all kernels but products: check every size, then call the kernel.
#include <vector>

#include "ffi.h"
#include "gumbel_max.h"
#include "keep_largest.h"
#include "linear_scan.h"
#include "paged_attention.h"
#include "rotate.h"
#include "row_best.h"
#include "row_norm.h"
#include "simd.h"

namespace oxjax {
namespace {

ffi::Error handle_row_sum(ffi::ThreadPool pool, F32 x, ffi::Result<F32> out) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || dims[1] == 0 || out->element_count() != static_cast<size_t>(dims[0]))
    return misfit("row_sum: expected x [rows, d], out [rows]", {{"x", dims}, {"out", out->dimensions()}});
  return run_parallel(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_sum(x.typed_data(), dims[0], dims[1], out->typed_data(), parallel_for);
  });
}

ffi::Error handle_row_best(ffi::ThreadPool pool, F32 x, ffi::Result<S32> at, ffi::Result<F32> largest,
                           ffi::Result<F32> log_sum) {
  const auto dims = x.dimensions();
  const auto fits = [&](auto& out) { return out->element_count() == static_cast<size_t>(dims[0]); };
  if (dims.size() != 2 || dims[1] == 0 || !fits(at) || !fits(largest) || !fits(log_sum))
    return misfit("row_best: expected x [rows, d], and three outputs [rows]", {{"x", dims},
                                                                               {"at", at->dimensions()},
                                                                               {"largest", largest->dimensions()},
                                                                               {"log_sum", log_sum->dimensions()}});
  return run_parallel(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_best(x.typed_data(), dims[0], dims[1], at->typed_data(), largest->typed_data(), log_sum->typed_data(),
             parallel_for);
  });
}

ffi::Error handle_gumbel_max(ffi::ThreadPool pool, F32 logits, U32 keys, ffi::Result<S32> chosen) {
  const auto dims = logits.dimensions();
  if (dims.size() != 2 || dims[1] == 0 || dims[1] > INT32_MAX || keys.element_count() != 2 * size_t(dims[0]) ||
      chosen->element_count() != size_t(dims[0]))
    return misfit("gumbel_max: expected logits [rows, vocab], keys [rows, 2], chosen [rows]",
                  {{"logits", dims}, {"keys", keys.dimensions()}, {"chosen", chosen->dimensions()}});
  return run_parallel(pool, 64 * logits.element_count(), [&](const ParallelFor& parallel_for) {
    gumbel_max(logits.typed_data(), dims[0], dims[1], keys.typed_data(), chosen->typed_data(), parallel_for);
  });
}

ffi::Error handle_keep_largest(ffi::ThreadPool pool, F32 x, F32 keys, F32 mass, F32 wanted, int64_t kind,
                               ffi::Result<F32> out) {
  const size_t n = x.element_count();
  constexpr int kKinds = static_cast<int>(Mass::kShares);
  if (kind < 0 || kind > kKinds) return misfit("keep_largest: expected a kind up to " + std::to_string(kKinds), kind);
  if (n == 0 || n > UINT32_MAX || keys.element_count() != n || mass.element_count() != n ||
      wanted.element_count() != 1 || out->element_count() != n)
    return misfit("keep_largest: expected x, keys, mass and out [n], wanted []", {{"x", x.dimensions()},
                                                                                  {"keys", keys.dimensions()},
                                                                                  {"mass", mass.dimensions()},
                                                                                  {"wanted", wanted.dimensions()},
                                                                                  {"out", out->dimensions()}});
  return run_parallel(pool, 8 * n, [&](const ParallelFor& parallel_for) {
    keep_largest(x.typed_data(), keys.typed_data(), mass.typed_data(), static_cast<Mass>(kind), n, *wanted.typed_data(),
                 out->typed_data(), parallel_for);
  });
}

ffi::Error handle_row_norm(ffi::ThreadPool pool, F32 x, F32 weight, F32 bias, float eps, bool centred,
                           ffi::Result<F32> out) {
  const auto dims = x.dimensions();
  const size_t d = dims.size() == 2 ? dims[1] : 0;
  const size_t weights = weight.element_count(), biases = bias.element_count();
  if (d == 0 || out->element_count() != x.element_count() || weights % d != 0 || (biases != 0 && biases != d))
    return misfit(
        "row_norm: expected x and out [rows, d], weight [d], [n, d] or [0], bias [d] or [0]",
        {{"x", dims}, {"weight", weight.dimensions()}, {"bias", bias.dimensions()}, {"out", out->dimensions()}});
  return run_parallel(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_norm(x.typed_data(), dims[0], d, weights ? weight.typed_data() : nullptr, weights / d,
             biases ? bias.typed_data() : nullptr, eps, centred, out->typed_data(), parallel_for);
  });
}

ffi::Error handle_rotate(ffi::ThreadPool pool, F32 x, F32 cos, F32 sin, bool adjacent, ffi::Result<F32> out) {
  const auto dims = x.dimensions(), angles = cos.dimensions();
  if (dims.size() != 3 || angles.size() != 2 || angles[0] != dims[0] || 2 * angles[1] > dims[2] || dims[1] == 0 ||
      sin.element_count() != cos.element_count() || out->element_count() != x.element_count())
    return misfit("rotate: expected x and out [rows, heads, head_dim], cos and sin [rows, up to head_dim / 2]",
                  {{"x", dims}, {"cos", angles}, {"sin", sin.dimensions()}, {"out", out->dimensions()}});
  return run_parallel(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    rotate(x.typed_data(), dims[0], dims[1], dims[2], cos.typed_data(), sin.typed_data(), angles[1], adjacent,
           out->typed_data(), parallel_for);
  });
}

ffi::Error handle_paged_attention(ffi::ThreadPool pool, F32 q, Any v, S32 block_tables, S32 row_seq, S32 positions,
                                  F32 slopes, F32 sinks, float scale, int64_t window, int64_t chunk, float softcap,
                                  ffi::RemainingArgs args, ffi::Result<F32> out) {
  const auto dims = q.dimensions(), v_dims = v.dimensions(), table_dims = block_tables.dimensions();
  const auto element = element_of(v);
  const auto refused = [&](Dims k_dims) {
    return misfit(
        "paged_attention: expected q [rows, heads, key_dim], v [pages, page_size, kv_heads, value_dim], block_tables "
        "[seqs, pages], row_seq and positions [rows], slopes and sinks [heads] or [0], out [rows, heads, value_dim], "
        "k like v in parts of key_dim",
        {{"q", dims},
         {"v", v_dims},
         {"block_tables", table_dims},
         {"row_seq", row_seq.dimensions()},
         {"positions", positions.dimensions()},
         {"slopes", slopes.dimensions()},
         {"sinks", sinks.dimensions()},
         {"out", out->dimensions()},
         {"k", k_dims}});
  };
  if (dims.size() != 3 || v_dims.size() != 4 || table_dims.size() != 2 || !element || v_dims[2] == 0 ||
      dims[1] % v_dims[2] != 0 || args.size() == 0)
    return refused({});
  const size_t rows = dims[0], heads = dims[1];
  std::vector<Pages> keys;
  int64_t key_dim = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto k = args.get<Any>(i);
    if (!k) return refused({});
    const auto k_dims = k->dimensions();
    const auto k_element = element_of(*k);
    if (!k_element || k_dims.size() != 4 || !std::equal(k_dims.begin(), k_dims.begin() + 3, v_dims.begin()))
      return refused(k_dims);
    keys.push_back({k->untyped_data(), *k_element, static_cast<size_t>(k_dims[3])});
    key_dim += k_dims[3];
  }
  const auto fits = [](const auto& b, size_t n) { return b.element_count() == 0 || b.element_count() == n; };
  if (key_dim != dims[2] || row_seq.element_count() != rows || positions.element_count() != rows ||
      !fits(slopes, heads) || !fits(sinks, heads) || out->element_count() != rows * heads * v_dims[3])
    return refused({&key_dim, 1});
  const AttentionShape shape{rows, heads, static_cast<size_t>(v_dims[2]), static_cast<size_t>(v_dims[1]),
                             static_cast<size_t>(table_dims[1])};
  size_t work = 0;
  for (size_t i = 0; i < rows; ++i) {
    const int64_t seq = row_seq.typed_data()[i], position = positions.typed_data()[i];
    if (seq < 0) continue;
    work += heads * (position + 1) * (dims[2] + v_dims[3]);  // at most
    if (seq >= table_dims[0])
      return misfit("paged_attention: expected sequences below " + std::to_string(table_dims[0]), seq);
    if (position < 0 || position / v_dims[1] >= table_dims[1])
      return misfit("paged_attention: expected positions below " + std::to_string(v_dims[1] * table_dims[1]), position);
  }
  for (size_t i = 0; i < block_tables.element_count(); ++i)
    if (block_tables.typed_data()[i] < 0 || block_tables.typed_data()[i] >= v_dims[0])
      return misfit("paged_attention: expected pages below " + std::to_string(v_dims[0]), block_tables.typed_data()[i]);
  const AttentionForm form{scale,
                           window,
                           chunk,
                           softcap,
                           slopes.element_count() ? slopes.typed_data() : nullptr,
                           sinks.element_count() ? sinks.typed_data() : nullptr};
  return run_parallel(pool, work, [&](const ParallelFor& parallel_for) {
    paged_attention(q.typed_data(), keys.data(), keys.size(),
                    {v.untyped_data(), *element, static_cast<size_t>(v_dims[3])}, block_tables.typed_data(),
                    row_seq.typed_data(), positions.typed_data(), shape, form, out->typed_data(), parallel_for);
  });
}

ffi::Error handle_linear_scan(ffi::ThreadPool pool, F32 query, F32 decay, F32 key, F32 value, F32 read, F32 write,
                              F32 bonus, F32 initial, S32 starts, S32 ends, ffi::Result<F32> y,
                              ffi::Result<F32> states) {
  const auto keys = key.dimensions(), values = value.dimensions(), decays = decay.dimensions();
  const auto optional = [](const auto& b) { return b.element_count() ? b.typed_data() : nullptr; };
  const auto refused = [&] {
    return misfit(
        "linear_scan: expected key [rows, key_heads, key_dim], value [rows, heads, value_dim], decay [rows, heads, 1 "
        "or "
        "key_dim], query like key, read and write like key or [0], bonus [key_heads, key_dim] or [0], starts and ends "
        "[seqs], initial and states [seqs, heads, key_dim, value_dim], y like value",
        {{"key", keys},
         {"value", values},
         {"decay", decays},
         {"query", query.dimensions()},
         {"read", read.dimensions()},
         {"write", write.dimensions()},
         {"bonus", bonus.dimensions()},
         {"starts", starts.dimensions()},
         {"ends", ends.dimensions()},
         {"initial", initial.dimensions()},
         {"states", states->dimensions()},
         {"y", y->dimensions()}});
  };
  if (keys.size() != 3 || values.size() != 3 || decays.size() != 3 || keys[1] == 0 || values[1] % keys[1] != 0 ||
      keys[0] != values[0] || decays[0] != values[0] || decays[1] != values[1] ||
      (decays[2] != 1 && decays[2] != keys[2]))
    return refused();
  const size_t rows = keys[0], heads = values[1], key_heads = keys[1], key_dim = keys[2], value_dim = values[2];
  const size_t count = starts.element_count(), n_keys = rows * key_heads * key_dim;
  const auto fits = [](const auto& b, size_t n) { return b.element_count() == 0 || b.element_count() == n; };
  if (query.element_count() != n_keys || !fits(read, n_keys) || !fits(write, n_keys) ||
      !fits(bonus, key_heads * key_dim) || ends.element_count() != count ||
      y->element_count() != rows * heads * value_dim ||
      initial.element_count() != count * heads * key_dim * value_dim ||
      states->element_count() != initial.element_count() || (optional(write) && !optional(read)) ||
      (optional(bonus) && optional(read)))
    return refused();
  int64_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    if (starts.typed_data()[i] < before || ends.typed_data()[i] < starts.typed_data()[i])
      return misfit("linear_scan: expected rows from " + std::to_string(before) + " for sequence " + std::to_string(i),
                    starts.typed_data()[i]);
    before = ends.typed_data()[i];
  }
  if (before > keys[0]) return misfit("linear_scan: expected ends up to " + std::to_string(keys[0]), before);
  const LinearScan scan{heads,
                        key_heads,
                        key_dim,
                        value_dim,
                        static_cast<size_t>(decays[2]),
                        query.typed_data(),
                        key.typed_data(),
                        value.typed_data(),
                        decay.typed_data(),
                        optional(read),
                        optional(write),
                        optional(bonus),
                        initial.typed_data(),
                        y->typed_data(),
                        states->typed_data()};
  const size_t work = 2 * (before + count) * heads * key_dim * value_dim;
  return run_parallel(pool, work, [&](const ParallelFor& parallel_for) {
    linear_scan(scan, {rows, count, starts.typed_data(), ends.typed_data()}, parallel_for);
  });
}

}  // namespace

OXJAX_HANDLER(row_sum, .Arg<F32>().Ret<F32>());

OXJAX_HANDLER(row_best, .Arg<F32>().Ret<S32>().Ret<F32>().Ret<F32>());

OXJAX_HANDLER(gumbel_max, .Arg<F32>().Arg<U32>().Ret<S32>());

OXJAX_HANDLER(keep_largest, .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Attr<int64_t>("kind").Ret<F32>());

OXJAX_HANDLER(row_norm, .Arg<F32>().Arg<F32>().Arg<F32>().Attr<float>("eps").Attr<bool>("centred").Ret<F32>());

OXJAX_HANDLER(rotate, .Arg<F32>().Arg<F32>().Arg<F32>().Attr<bool>("adjacent").Ret<F32>());

OXJAX_HANDLER(paged_attention, .Arg<F32>()
                                   .Arg<Any>()
                                   .Arg<S32>()
                                   .Arg<S32>()
                                   .Arg<S32>()
                                   .Arg<F32>()
                                   .Arg<F32>()
                                   .Attr<float>("scale")
                                   .Attr<int64_t>("window")
                                   .Attr<int64_t>("chunk")
                                   .Attr<float>("softcap")
                                   .RemainingArgs()
                                   .Ret<F32>());

OXJAX_HANDLER(linear_scan, .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<F32>()
                               .Arg<S32>()
                               .Arg<S32>()
                               .Ret<F32>()
                               .Ret<F32>());

}  // namespace oxjax

extern "C" const char* oxjax_instructions() { return oxjax::kInstructions; }
