// What XLA calls: checks every size, and lends its own threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "float_matmul.h"
#include "grouped_matmul.h"
#include "linear_scan.h"
#include "paged_attention.h"
#include "quantized_matmul.h"
#include "row_best.h"
#include "row_norm.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace oxjax {
namespace {

// Tasks are taken off a counter by the caller and by whichever threads come in time. The caller waits only for tasks
// that someone has begun, so it makes progress even when all other threads of the pool wait like itself.
class Tasks {
 public:
  Tasks(size_t n, const std::function<void(size_t)>* task) : n_(n), task_(task) {}

  void work() {
    for (size_t i; (i = next_.fetch_add(1)) < n_;) {
      (*task_)(i);  // the caller's, who stays until all are done
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < n_; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }

 private:
  const size_t n_;
  const std::function<void(size_t)>* const task_;
  std::atomic<size_t> next_{0}, done_{0};
};

constexpr size_t kWorthWaking = 1 << 17;  // multiplications; fewer are done before another thread is awake

// Runs a kernel of so many multiplications, about, on the caller's thread and those of the pool.
template <typename Kernel>
ffi::Error run(ffi::ThreadPool& pool, size_t work, Kernel kernel) {
  const size_t helpers = work < kWorthWaking ? 0 : std::max<int64_t>(pool.num_threads(), 1) - 1;
  try {
    kernel([&](size_t n, const std::function<void(size_t)>& task) {
      if (n == 1 || helpers == 0) {
        for (size_t i = 0; i < n; ++i) task(i);
        return;
      }
      const auto tasks = std::make_shared<Tasks>(n, &task);
      for (size_t i = 1; i < std::min(n, helpers + 1); ++i) pool.Schedule([tasks] { tasks->work(); });
      tasks->work();
      tasks->wait();
    });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a kernel's working space");
  }
  return ffi::Error::Success();
}

std::optional<Element> element_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return Element::kFloat32;
    case ffi::BF16: return Element::kBFloat16;
    case ffi::F16: return Element::kFloat16;
    default: return std::nullopt;
  }
}

// Formats come as five numbers each.
constexpr size_t kFields = 5;

Format format_of(const int64_t* f) {
  return {static_cast<int>(f[0]), static_cast<int>(f[1]), static_cast<int>(f[2]), f[3] != 0, f[4] != 0};
}

bool has_kernel(const Format& format, size_t d_in) {
  return format.valid() && d_in != 0 && d_in % (format.two_level ? kSuperBlock : kChunk) == 0;
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Span<const int64_t> formats, bool rounds,
                  ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || args.size() != rets.size() || formats.size() != kFields * args.size())
    return ffi::Error::InvalidArgument("expected rows, and a format and a result for each matrix");
  const size_t rows = dims[0], d_in = dims[1];
  std::vector<Weights> weights;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<ffi::Buffer<ffi::U8>>(i);
    auto out = rets.get<ffi::Buffer<ffi::F32>>(i);
    if (!data || !out) return ffi::Error::InvalidArgument("a matrix is not uint8, or a result not float32");
    const Format format = format_of(formats.begin() + kFields * i);
    if (!has_kernel(format, d_in))
      return ffi::Error::InvalidArgument("no kernel for the format or the number of inputs");
    const auto out_dims = (*out)->dimensions();
    if (out_dims.size() != 2 || static_cast<size_t>(out_dims[0]) != rows)
      return ffi::Error::InvalidArgument("a result has not as many rows as the input");
    const size_t d_out = out_dims[1];
    if (data->element_count() != (d_out + kPanel - 1) / kPanel * format.panel_bytes(d_in))
      return ffi::Error::InvalidArgument("the bytes of a matrix do not fit its shape");
    weights.push_back({format, data->typed_data(), d_out, (*out)->typed_data()});
    work += rows * d_in * d_out;
  }
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    (rounds ? quantized_matmul : dequantized_matmul)(x.typed_data(), rows, d_in, weights.data(), weights.size(), parallel_for);
  });
}

using QuantizedGrouped = decltype(grouped_dequantized_matmul);

ffi::Error by_expert(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> chosen, int64_t n_experts,
                     ffi::Span<const int64_t> formats, bool rounds, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const auto dims = x.dimensions(), pair_dims = chosen.dimensions();
  const bool quantized = formats.size() != 0;
  if (dims.size() != 3 || pair_dims.size() != 2 || dims[0] != pair_dims[0] || n_experts < 0 ||
      (dims[1] != 1 && dims[1] != pair_dims[1]) || args.size() != rets.size() ||
      (quantized && formats.size() != kFields * args.size()))
    return ffi::Error::InvalidArgument("expected rows, their experts, and a result for each map");
  const size_t n_pairs = chosen.element_count(), d_in = dims[2], pairs_per_row = dims[1] == 1 ? pair_dims[1] : 1;
  for (size_t i = 0; i < n_pairs; ++i)
    if (chosen.typed_data()[i] < 0 || chosen.typed_data()[i] > n_experts)
      return ffi::Error::InvalidArgument("a row chose an expert that does not exist");
  std::vector<FloatExperts> plain;
  std::vector<QuantizedExperts> packed;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<ffi::AnyBuffer>(i);
    auto out = rets.get<ffi::Buffer<ffi::F32>>(i);
    if (!data || !out) return ffi::Error::InvalidArgument("a result is not float32");
    const auto shape = data->dimensions(), out_dims = (*out)->dimensions();
    if (shape.size() != 3 || shape[0] != n_experts || out_dims.size() != 3 ||
        !std::equal(pair_dims.begin(), pair_dims.end(), out_dims.begin()))
      return ffi::Error::InvalidArgument("the experts or a result are not as many as was said");
    const size_t d_out = out_dims[2];
    work += n_pairs * d_in * d_out;
    if (!quantized) {
      const auto element = element_of(*data);
      if (!element || shape[1] != dims[2] || shape[2] != out_dims[2])
        return ffi::Error::InvalidArgument("a matrix is not of floats, or its shape does not fit");
      plain.push_back({data->untyped_data(), *element, d_out, (*out)->typed_data()});
      continue;
    }
    const Format format = format_of(formats.begin() + kFields * i);
    if (!has_kernel(format, d_in))
      return ffi::Error::InvalidArgument("no kernel for the format or the number of inputs");
    if (data->element_type() != ffi::U8 || static_cast<size_t>(shape[1]) != (d_out + kPanel - 1) / kPanel ||
        static_cast<size_t>(shape[2]) != format.panel_bytes(d_in))
      return ffi::Error::InvalidArgument("the bytes of a matrix do not fit its shape");
    packed.push_back({format, static_cast<const uint8_t*>(data->untyped_data()), d_out, (*out)->typed_data()});
  }
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    const Groups groups = grouped(chosen.typed_data(), n_pairs, n_experts);
    if (!quantized)
      grouped_matmul(x.typed_data(), d_in, pairs_per_row, groups, plain.data(), plain.size(), parallel_for);
    else
      (rounds ? static_cast<QuantizedGrouped*>(grouped_matmul) : grouped_dequantized_matmul)(
          x.typed_data(), d_in, pairs_per_row, groups, packed.data(), packed.size(), parallel_for);
  });
}

ffi::Error dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, bool transposed, ffi::RemainingArgs args,
                 ffi::RemainingRets rets) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || args.size() != rets.size())
    return ffi::Error::InvalidArgument("expected rows, and a result for each matrix");
  std::vector<Matrix> matrices;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<ffi::AnyBuffer>(i);
    auto out = rets.get<ffi::Buffer<ffi::F32>>(i);
    if (!data || !out) return ffi::Error::InvalidArgument("a result is not float32");
    const auto element = element_of(*data);
    const auto shape = data->dimensions(), out_dims = (*out)->dimensions();
    if (!element || shape.size() != 2 || shape[transposed] != dims[1] || out_dims.size() != 2 ||
        out_dims[0] != dims[0] || out_dims[1] != shape[!transposed])
      return ffi::Error::InvalidArgument("a matrix is not of floats, or its shape does not fit");
    matrices.push_back({data->untyped_data(), *element, transposed, static_cast<size_t>(shape[!transposed]),
                        (*out)->typed_data()});
    work += data->element_count() * dims[0];
  }
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    float_matmul(x.typed_data(), dims[0], dims[1], matrices.data(), matrices.size(), parallel_for);
  });
}

ffi::Error by_head(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer matrices,
                   ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions(), shape = matrices.dimensions(), out_dims = out->dimensions();
  const auto element = element_of(matrices);
  if (!element || dims.size() != 3 || shape.size() != 3 || out_dims.size() != 3 || shape[0] != dims[1] ||
      shape[1] != dims[2] || out_dims[0] != dims[0] || out_dims[1] != dims[1] || out_dims[2] != shape[2])
    return ffi::Error::InvalidArgument("the matrices of heads are not of floats, or their shape does not fit");
  const size_t rows = dims[0], heads = dims[1], d_in = dims[2], d_out = shape[2];
  std::vector<Product> products;
  for (size_t h = 0; h < heads; ++h) {
    const char* matrix = static_cast<const char*>(matrices.untyped_data()) + h * d_in * d_out * bytes_of(*element);
    products.push_back({rows, d_in, d_out, {x.typed_data() + h * d_in, heads * d_in}, matrix, *element, false,
                        {out->typed_data() + h * d_out, heads * d_out}});
  }
  return run(pool, rows * heads * d_in * d_out, [&](const ParallelFor& parallel_for) {
    float_products(products.data(), products.size(), parallel_for);
  });
}

ffi::Error sum(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || dims[1] == 0 || out->element_count() != static_cast<size_t>(dims[0]))
    return ffi::Error::InvalidArgument("expected rows, and a number for each");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_sum(x.typed_data(), dims[0], dims[1], out->typed_data(), parallel_for);
  });
}

ffi::Error best(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> at,
                ffi::ResultBuffer<ffi::F32> largest, ffi::ResultBuffer<ffi::F32> sum) {
  const auto dims = x.dimensions();
  const auto fits = [&](auto& out) { return out->element_count() == static_cast<size_t>(dims[0]); };
  if (dims.size() != 2 || dims[1] == 0 || !fits(at) || !fits(largest) || !fits(sum))
    return ffi::Error::InvalidArgument("expected rows, and three numbers for each");
  return run(pool, x.element_count(), [&](const ParallelFor& parallel_for) {
    row_best(x.typed_data(), dims[0], dims[1], at->typed_data(), largest->typed_data(), sum->typed_data(),
             parallel_for);
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
  const size_t work = initial.element_count() + 4 * before * heads * key_dim * value_dim;
  return run(pool, work, [&](const ParallelFor& parallel_for) {
    linear_scan(scan, {rows, count, starts.typed_data(), ends.typed_data()}, parallel_for);
  });
}

}  // namespace
}  // namespace oxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_quantized_matmul, oxjax::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<bool>("rounds")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_float_matmul, oxjax::dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("transposed")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_grouped_matmul, oxjax::by_expert,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("n_experts")
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .Attr<bool>("rounds")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_dot_heads, oxjax::by_head,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_row_norm, oxjax::norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("centred")
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
