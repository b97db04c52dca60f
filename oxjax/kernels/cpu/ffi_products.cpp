// Handlers of products: check every size, then call the kernel.
#include <string>
#include <vector>

#include "ffi.h"
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

std::string described(const Format& f) {
  return std::to_string(f.bits) + " bits, offset " + std::to_string(f.offset) + ", groups of " +
         std::to_string(f.group) + (f.two_level ? ", two levels" : "") + (f.minima ? ", minima" : "");
}

ffi::Error no_kernel(const char* kernel, const Format& format, size_t d_in) {
  return ffi::Error::InvalidArgument(std::string(kernel) + ": expected a format with a kernel and a number of inputs " +
                                     "divisible by its blocks; found " + described(format) + ", " +
                                     std::to_string(d_in) + " inputs");
}

ffi::Error wrong_type(const char* kernel, const char* expected) {
  return ffi::Error::InvalidArgument(std::string(kernel) + ": expected " + expected + "; found another element type");
}

ffi::Error wrong_counts(const char* kernel, Dims x, size_t matrices, size_t results, size_t fields) {
  return misfit(std::string(kernel) + ": expected rows, and a result for each of " + std::to_string(matrices) +
                    " matrices, with five fields of a format if it is quantised; got " + std::to_string(results) +
                    " results and " + std::to_string(fields) + " fields",
                {{"x", x}});
}

ffi::Error handle_quantized_matmul(ffi::ThreadPool pool, F32 x, Formats formats, bool rounds, ffi::RemainingArgs args,
                                   ffi::RemainingRets rets) {
  constexpr const char* kName = "quantized_matmul";
  const auto dims = x.dimensions();
  if (dims.size() != 2 || args.size() != rets.size() || formats.size() != kFields * args.size())
    return wrong_counts(kName, dims, args.size(), rets.size(), formats.size());
  const size_t rows = dims[0], d_in = dims[1];
  std::vector<Weights> weights;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<ffi::Buffer<ffi::U8>>(i);
    auto out = rets.get<F32>(i);
    if (!data || !out) return wrong_type(kName, "matrices in uint8 and results in float32");
    const Format format = format_of(formats.begin() + kFields * i);
    if (!has_kernel(format, d_in)) return no_kernel(kName, format, d_in);
    const auto out_dims = (*out)->dimensions();
    if (out_dims.size() != 2 || static_cast<size_t>(out_dims[0]) != rows)
      return misfit("quantized_matmul: expected x [rows, d_in], out [rows, d_out]", {{"x", dims}, {"out", out_dims}});
    const size_t d_out = out_dims[1], bytes = (d_out + kPanel - 1) / kPanel * format.panel_bytes(d_in);
    if (data->element_count() != bytes)
      return misfit("quantized_matmul: expected a matrix of " + std::to_string(bytes) + " bytes",
                    {{"x", dims}, {"matrix", data->dimensions()}, {"out", out_dims}});
    weights.push_back({format, data->typed_data(), d_out, (*out)->typed_data()});
    work += rows * d_in * d_out;
  }
  return run_parallel(pool, work, [&](const ParallelFor& parallel_for) {
    (rounds ? quantized_matmul : dequantized_matmul)(x.typed_data(), rows, d_in, weights.data(), weights.size(),
                                                     parallel_for);
  });
}

using QuantizedGrouped = decltype(grouped_dequantized_matmul);

ffi::Error handle_grouped_matmul(ffi::ThreadPool pool, F32 x, S32 chosen, int64_t n_experts, Formats formats,
                                 bool rounds, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr const char* kName = "grouped_matmul";
  const auto dims = x.dimensions(), pair_dims = chosen.dimensions();
  const bool quantized = formats.size() != 0;
  if (args.size() != rets.size() || (quantized && formats.size() != kFields * args.size()))
    return wrong_counts(kName, dims, args.size(), rets.size(), formats.size());
  if (dims.size() != 3 || pair_dims.size() != 2 || dims[0] != pair_dims[0] || n_experts < 0 ||
      (dims[1] != 1 && dims[1] != pair_dims[1]))
    return misfit("grouped_matmul: expected x [rows, 1 or n_used, d_in], chosen [rows, n_used]",
                  {{"x", dims}, {"chosen", pair_dims}});
  const size_t n_pairs = chosen.element_count(), d_in = dims[2], pairs_per_row = dims[1] == 1 ? pair_dims[1] : 1;
  for (size_t i = 0; i < n_pairs; ++i)
    if (chosen.typed_data()[i] < 0 || chosen.typed_data()[i] > n_experts)
      return misfit("grouped_matmul: expected experts from 0 to " + std::to_string(n_experts), chosen.typed_data()[i]);
  std::vector<FloatExperts> plain;
  std::vector<QuantizedExperts> packed;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<Any>(i);
    auto out = rets.get<F32>(i);
    if (!data || !out) return wrong_type(kName, "results in float32");
    const auto shape = data->dimensions(), out_dims = (*out)->dimensions();
    const std::initializer_list<Found> found = {
        {"x", dims}, {"chosen", pair_dims}, {"matrices", shape}, {"out", out_dims}};
    if (shape.size() != 3 || shape[0] != n_experts || out_dims.size() != 3 ||
        !std::equal(pair_dims.begin(), pair_dims.end(), out_dims.begin()))
      return misfit(
          "grouped_matmul: expected matrices of " + std::to_string(n_experts) + " experts, out [rows, n_used, d_out]",
          found);
    const size_t d_out = out_dims[2];
    work += n_pairs * d_in * d_out;
    if (!quantized) {
      const auto element = element_of(*data);
      if (!element) return wrong_type(kName, "matrices of floats");
      if (shape[1] != dims[2] || shape[2] != out_dims[2])
        return misfit("grouped_matmul: expected matrices [n_experts, d_in, d_out]", found);
      plain.push_back({data->untyped_data(), *element, d_out, (*out)->typed_data()});
      continue;
    }
    const Format format = format_of(formats.begin() + kFields * i);
    if (!has_kernel(format, d_in)) return no_kernel(kName, format, d_in);
    const size_t panels = (d_out + kPanel - 1) / kPanel, bytes = format.panel_bytes(d_in);
    if (data->element_type() != ffi::U8) return wrong_type(kName, "quantised matrices in uint8");
    if (static_cast<size_t>(shape[1]) != panels || static_cast<size_t>(shape[2]) != bytes)
      return misfit("grouped_matmul: expected matrices of " + std::to_string(panels) + " panels of " +
                        std::to_string(bytes) + " bytes",
                    found);
    packed.push_back({format, static_cast<const uint8_t*>(data->untyped_data()), d_out, (*out)->typed_data()});
  }
  return run_parallel(pool, work, [&](const ParallelFor& parallel_for) {
    const Groups groups = grouped(chosen.typed_data(), n_pairs, n_experts);
    if (!quantized)
      grouped_matmul(x.typed_data(), d_in, pairs_per_row, groups, plain.data(), plain.size(), parallel_for);
    else
      (rounds ? static_cast<QuantizedGrouped*>(grouped_matmul) : grouped_dequantized_matmul)(
          x.typed_data(), d_in, pairs_per_row, groups, packed.data(), packed.size(), parallel_for);
  });
}

ffi::Error handle_float_matmul(ffi::ThreadPool pool, F32 x, bool transposed, ffi::RemainingArgs args,
                               ffi::RemainingRets rets) {
  constexpr const char* kName = "float_matmul";
  const auto dims = x.dimensions();
  if (dims.size() != 2 || args.size() != rets.size()) return wrong_counts(kName, dims, args.size(), rets.size(), 0);
  std::vector<Matrix> matrices;
  size_t work = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<Any>(i);
    auto out = rets.get<F32>(i);
    if (!data || !out) return wrong_type(kName, "results in float32");
    const auto element = element_of(*data);
    if (!element) return wrong_type(kName, "matrices of floats");
    const auto shape = data->dimensions(), out_dims = (*out)->dimensions();
    if (shape.size() != 2 || shape[transposed] != dims[1] || out_dims.size() != 2 || out_dims[0] != dims[0] ||
        out_dims[1] != shape[!transposed])
      return misfit(std::string("float_matmul: expected x [rows, d_in], a matrix ") +
                        (transposed ? "[d_out, d_in]" : "[d_in, d_out]") + ", out [rows, d_out]",
                    {{"x", dims}, {"matrix", shape}, {"out", out_dims}});
    matrices.push_back(
        {data->untyped_data(), *element, transposed, static_cast<size_t>(shape[!transposed]), (*out)->typed_data()});
    work += data->element_count() * dims[0];
  }
  return run_parallel(pool, work, [&](const ParallelFor& parallel_for) {
    float_matmul(x.typed_data(), dims[0], dims[1], matrices.data(), matrices.size(), parallel_for);
  });
}

ffi::Error handle_dot_heads(ffi::ThreadPool pool, F32 x, Any matrices, ffi::Result<F32> out) {
  const auto dims = x.dimensions(), shape = matrices.dimensions(), out_dims = out->dimensions();
  const auto element = element_of(matrices);
  if (!element) return wrong_type("dot_heads", "matrices of floats");
  if (dims.size() != 3 || shape.size() != 3 || out_dims.size() != 3 || shape[0] != dims[1] || shape[1] != dims[2] ||
      out_dims[0] != dims[0] || out_dims[1] != dims[1] || out_dims[2] != shape[2])
    return misfit("dot_heads: expected x [rows, heads, d_in], matrices [heads, d_in, d_out], out [rows, heads, d_out]",
                  {{"x", dims}, {"matrices", shape}, {"out", out_dims}});
  const size_t rows = dims[0], heads = dims[1], d_in = dims[2], d_out = shape[2];
  std::vector<Product> products;
  for (size_t h = 0; h < heads; ++h) {
    const char* matrix = static_cast<const char*>(matrices.untyped_data()) + h * d_in * d_out * bytes_of(*element);
    products.push_back({rows,
                        d_in,
                        d_out,
                        {x.typed_data() + h * d_in, heads * d_in},
                        matrix,
                        *element,
                        false,
                        {out->typed_data() + h * d_out, heads * d_out}});
  }
  return run_parallel(pool, rows * heads * d_in * d_out, [&](const ParallelFor& parallel_for) {
    float_products(products.data(), products.size(), parallel_for);
  });
}

}  // namespace

OXJAX_HANDLER(quantized_matmul,
              .Arg<F32>().Attr<Formats>("formats").Attr<bool>("rounds").RemainingArgs().RemainingRets());

OXJAX_HANDLER(grouped_matmul, .Arg<F32>()
                                  .Arg<S32>()
                                  .Attr<int64_t>("n_experts")
                                  .Attr<Formats>("formats")
                                  .Attr<bool>("rounds")
                                  .RemainingArgs()
                                  .RemainingRets());

OXJAX_HANDLER(float_matmul, .Arg<F32>().Attr<bool>("transposed").RemainingArgs().RemainingRets());

OXJAX_HANDLER(dot_heads, .Arg<F32>().Arg<Any>().Ret<F32>());

}  // namespace oxjax
