// The products that XLA calls: checks every size.
#include "ffi.h"

#include <vector>

#include "grouped_matmul.h"
#include "quantized_matmul.h"

namespace oxjax {
namespace {

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
