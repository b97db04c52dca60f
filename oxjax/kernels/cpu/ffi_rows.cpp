// What XLA calls beside products: checks every size.
#include "ffi.h"

#include <vector>

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

ffi::Error sum(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || dims[1] == 0 || out->element_count() != static_cast<size_t>(dims[0]))
    return ffi::Error::InvalidArgument("expected rows, and a number for each");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_sum(x.typed_data(), dims[0], dims[1], out->typed_data(), parallel_for);
  });
}

ffi::Error best(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> at,
                ffi::ResultBuffer<ffi::F32> largest, ffi::ResultBuffer<ffi::F32> log_sum) {
  const auto dims = x.dimensions();
  const auto fits = [&](auto& out) { return out->element_count() == static_cast<size_t>(dims[0]); };
  if (dims.size() != 2 || dims[1] == 0 || !fits(at) || !fits(largest) || !fits(log_sum))
    return ffi::Error::InvalidArgument("expected rows, and three numbers for each");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_best(x.typed_data(), dims[0], dims[1], at->typed_data(), largest->typed_data(), log_sum->typed_data(),
             parallel_for);
  });
}

ffi::Error draw(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::U32> keys,
                ffi::ResultBuffer<ffi::S32> chosen) {
  const auto dims = logits.dimensions();
  if (dims.size() != 2 || dims[1] == 0 || dims[1] > INT32_MAX || keys.element_count() != 2 * size_t(dims[0]) ||
      chosen->element_count() != size_t(dims[0]))
    return ffi::Error::InvalidArgument("expected rows, a key of two words for each, and a place for each");
  return run(pool, 64 * logits.element_count(), [&](const ParallelFor& parallel_for) {
    gumbel_max(logits.typed_data(), dims[0], dims[1], keys.typed_data(), chosen->typed_data(), parallel_for);
  });
}

ffi::Error selection(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> keys,
                     ffi::Buffer<ffi::F32> mass, ffi::Buffer<ffi::F32> wanted, int64_t kind,
                     ffi::ResultBuffer<ffi::F32> out) {
  const size_t n = x.element_count();
  if (n == 0 || n > UINT32_MAX || keys.element_count() != n || mass.element_count() != n ||
      wanted.element_count() != 1 || out->element_count() != n || kind < 0 || kind > static_cast<int>(Mass::kShares))
    return ffi::Error::InvalidArgument("expected as many keys and masses as numbers");
  return run(pool, 8 * n, [&](const ParallelFor& parallel_for) {
    keep_largest(x.typed_data(), keys.typed_data(), mass.typed_data(), static_cast<Mass>(kind), n,
                 *wanted.typed_data(), out->typed_data(), parallel_for);
  });
}

ffi::Error norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                ffi::Buffer<ffi::F32> bias, float eps, bool centred, ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions();
  const size_t d = dims.size() == 2 ? dims[1] : 0;
  const size_t weights = weight.element_count(), biases = bias.element_count();
  if (d == 0 || out->element_count() != x.element_count() || weights % d != 0 || (biases != 0 && biases != d))
    return ffi::Error::InvalidArgument("the shapes of a norm do not fit");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_norm(x.typed_data(), dims[0], d, weights ? weight.typed_data() : nullptr, weights / d,
             biases ? bias.typed_data() : nullptr, eps, centred, out->typed_data(), parallel_for);
  });
}

ffi::Error rotation(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cos,
                    ffi::Buffer<ffi::F32> sin, bool adjacent, ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions(), angles = cos.dimensions();
  if (dims.size() != 3 || angles.size() != 2 || angles[0] != dims[0] || 2 * angles[1] > dims[2] || dims[1] == 0 ||
      sin.element_count() != cos.element_count() || out->element_count() != x.element_count())
    return ffi::Error::InvalidArgument("the shapes of a rotation do not fit");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    rotate(x.typed_data(), dims[0], dims[1], dims[2], cos.typed_data(), sin.typed_data(), angles[1], adjacent,
           out->typed_data(), parallel_for);
  });
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> block_tables, ffi::Buffer<ffi::S32> row_seq,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::F32> slopes, ffi::Buffer<ffi::F32> sinks,
                     float scale, int64_t window, int64_t chunk, float softcap, ffi::RemainingArgs args,
                     ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = q.dimensions(), v_dims = v.dimensions(), table_dims = block_tables.dimensions();
  const auto element = element_of(v);
  if (dims.size() != 3 || v_dims.size() != 4 || table_dims.size() != 2 || !element || v_dims[2] == 0 ||
      dims[1] % v_dims[2] != 0 || args.size() == 0)
    return ffi::Error::InvalidArgument("the shapes of attention do not fit");
  const size_t rows = dims[0], heads = dims[1];
  std::vector<Pages> keys;
  int64_t key_dim = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto k = args.get<ffi::AnyBuffer>(i);
    if (!k) return ffi::Error::InvalidArgument("keys are missing");
    const auto k_dims = k->dimensions();
    const auto k_element = element_of(*k);
    if (!k_element || k_dims.size() != 4 || !std::equal(k_dims.begin(), k_dims.begin() + 3, v_dims.begin()))
      return ffi::Error::InvalidArgument("keys do not fit the values");
    keys.push_back({k->untyped_data(), *k_element, static_cast<size_t>(k_dims[3])});
    key_dim += k_dims[3];
  }
  const auto fits = [](const auto& b, size_t n) { return b.element_count() == 0 || b.element_count() == n; };
  if (key_dim != dims[2] || row_seq.element_count() != rows || positions.element_count() != rows ||
      !fits(slopes, heads) || !fits(sinks, heads) || out->element_count() != rows * heads * v_dims[3])
    return ffi::Error::InvalidArgument("the shapes of attention do not fit");
  const AttentionShape shape{rows, heads, static_cast<size_t>(v_dims[2]), static_cast<size_t>(v_dims[1]),
                             static_cast<size_t>(table_dims[1])};
  size_t work = 0;
  for (size_t i = 0; i < rows; ++i) {
    const int64_t seq = row_seq.typed_data()[i], position = positions.typed_data()[i];
    if (seq < 0) continue;
    work += heads * (position + 1) * (dims[2] + v_dims[3]);  // at most
    if (seq >= table_dims[0] || position < 0 || position / v_dims[1] >= table_dims[1])
      return ffi::Error::InvalidArgument("a row's sequence or position is beyond the block tables");
  }
  for (size_t i = 0; i < block_tables.element_count(); ++i)
    if (block_tables.typed_data()[i] < 0 || block_tables.typed_data()[i] >= v_dims[0])
      return ffi::Error::InvalidArgument("a block table names a page that does not exist");
  const AttentionForm form{scale,
                           window,
                           chunk,
                           softcap,
                           slopes.element_count() ? slopes.typed_data() : nullptr,
                           sinks.element_count() ? sinks.typed_data() : nullptr};
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    paged_attention(q.typed_data(), keys.data(), keys.size(), {v.untyped_data(), *element, static_cast<size_t>(v_dims[3])},
                    block_tables.typed_data(), row_seq.typed_data(), positions.typed_data(), shape, form,
                    out->typed_data(), parallel_for);
  });
}

ffi::Error scan(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> decay,
                ffi::Buffer<ffi::F32> key, ffi::Buffer<ffi::F32> value, ffi::Buffer<ffi::F32> read,
                ffi::Buffer<ffi::F32> write, ffi::Buffer<ffi::F32> bonus, ffi::Buffer<ffi::F32> initial,
                ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> ends, ffi::ResultBuffer<ffi::F32> y,
                ffi::ResultBuffer<ffi::F32> states) {
  const auto keys = key.dimensions(), values = value.dimensions(), decays = decay.dimensions();
  const auto optional = [](const auto& b) { return b.element_count() ? b.typed_data() : nullptr; };
  if (keys.size() != 3 || values.size() != 3 || decays.size() != 3 || keys[1] == 0 || values[1] % keys[1] != 0 ||
      keys[0] != values[0] || decays[0] != values[0] || decays[1] != values[1] ||
      (decays[2] != 1 && decays[2] != keys[2]))
    return ffi::Error::InvalidArgument("the shapes of a scan do not fit");
  const size_t rows = keys[0], heads = values[1], key_heads = keys[1], key_dim = keys[2], value_dim = values[2];
  const size_t count = starts.element_count(), n_keys = rows * key_heads * key_dim;
  const auto fits = [](const auto& b, size_t n) { return b.element_count() == 0 || b.element_count() == n; };
  if (query.element_count() != n_keys || !fits(read, n_keys) || !fits(write, n_keys) ||
      !fits(bonus, key_heads * key_dim) || ends.element_count() != count || y->element_count() != rows * heads * value_dim ||
      initial.element_count() != count * heads * key_dim * value_dim ||
      states->element_count() != initial.element_count() || (optional(write) && !optional(read)) ||
      (optional(bonus) && optional(read)))
    return ffi::Error::InvalidArgument("the shapes of a scan do not fit");
  int64_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    if (starts.typed_data()[i] < before || ends.typed_data()[i] < starts.typed_data()[i])
      return ffi::Error::InvalidArgument("the rows of sequences overlap");
    before = ends.typed_data()[i];
  }
  if (before > keys[0]) return ffi::Error::InvalidArgument("a sequence has more rows than there are");
  const LinearScan scan{heads, key_heads, key_dim, value_dim, static_cast<size_t>(decays[2]), query.typed_data(),
                        key.typed_data(), value.typed_data(), decay.typed_data(), optional(read), optional(write),
                        optional(bonus), initial.typed_data(), y->typed_data(), states->typed_data()};
  const size_t work = 2 * (before + count) * heads * key_dim * value_dim;
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    linear_scan(scan, {rows, count, starts.typed_data(), ends.typed_data()}, parallel_for);
  });
}

}  // namespace
}  // namespace oxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    oxjax_row_sum, oxjax::sum,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_row_best, oxjax::best,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_gumbel_max, oxjax::draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_keep_largest, oxjax::selection,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_row_norm, oxjax::norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("centred")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_rotate, oxjax::rotation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("adjacent")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_paged_attention, oxjax::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<float>("softcap")
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_linear_scan, oxjax::scan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

extern "C" const char* oxjax_instructions() { return oxjax::kInstructions; }
