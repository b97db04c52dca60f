// What XLA calls: checks every size, and lends its own threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "quantized_matmul.h"
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

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Span<const int64_t> formats,
                  ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr size_t kFields = 5;
  const auto dims = x.dimensions();
  if (dims.size() != 2 || args.size() != rets.size() || formats.size() != kFields * args.size())
    return ffi::Error::InvalidArgument("expected rows, and a format and a result for each matrix");
  const size_t rows = dims[0], d_in = dims[1];
  std::vector<Weights> weights;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto data = args.get<ffi::Buffer<ffi::U8>>(i);
    auto out = rets.get<ffi::Buffer<ffi::F32>>(i);
    if (!data || !out) return ffi::Error::InvalidArgument("a matrix is not uint8, or a result not float32");
    const int64_t* f = formats.begin() + kFields * i;
    const Format format{static_cast<int>(f[0]), static_cast<int>(f[1]), static_cast<int>(f[2]), f[3] != 0, f[4] != 0};
    if (!format.valid() || d_in == 0 || d_in % (format.two_level ? kSuperBlock : kChunk) != 0)
      return ffi::Error::InvalidArgument("no kernel for the format or the number of inputs");
    const auto out_dims = (*out)->dimensions();
    if (out_dims.size() != 2 || static_cast<size_t>(out_dims[0]) != rows)
      return ffi::Error::InvalidArgument("a result has not as many rows as the input");
    const size_t d_out = out_dims[1];
    if (data->element_count() != (d_out + kPanel - 1) / kPanel * format.panel_bytes(d_in))
      return ffi::Error::InvalidArgument("the bytes of a matrix do not fit its shape");
    weights.push_back({format, data->typed_data(), d_out, (*out)->typed_data()});
  }
  const size_t helpers = std::max<int64_t>(pool.num_threads(), 1) - 1;
  try {
    quantized_matmul(x.typed_data(), rows, d_in, weights.data(), weights.size(),
                     [&](size_t n, const std::function<void(size_t)>& task) {
                       const auto tasks = std::make_shared<Tasks>(n, &task);
                       for (size_t i = 1; i < std::min(n, helpers + 1); ++i) pool.Schedule([tasks] { tasks->work(); });
                       tasks->work();
                       tasks->wait();
                     });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for quantised activations");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace oxjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_quantized_matmul, oxjax::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("formats")
                                  .RemainingArgs()
                                  .RemainingRets());

extern "C" const char* oxjax_instructions() { return oxjax::best_isa(); }
