// Shared by all handlers that XLA calls: threads lent by XLA, types, and messages about shapes.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "float_matmul.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace oxjax {

using Any = ffi::AnyBuffer;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using Formats = ffi::Span<const int64_t>;
using Dims = ffi::Span<const int64_t>;

constexpr size_t kWorthWaking = 1 << 17;  // multiplications; fewer are done before another thread is awake

// Runs a kernel of about `work` multiplications on the caller's thread and those of the pool.
template <typename Kernel>
ffi::Error run_parallel(ffi::ThreadPool& pool, size_t work, Kernel kernel) {
  const size_t helpers = work < kWorthWaking ? 0 : std::max<int64_t>(pool.num_threads(), 1) - 1;
  try {
    kernel([&](size_t n, const std::function<void(size_t)>& task) {
      if (n == 1 || helpers == 0) {
        for (size_t i = 0; i < n; ++i) task(i);
        return;
      }
      const auto tasks = std::make_shared<TaskQueue>(n, &task);
      for (size_t i = 1; i < std::min(n, helpers + 1); ++i)
        WorkerPool::shared().help(tasks, [&](auto work) { pool.Schedule(std::move(work)); });
      tasks->work();
      tasks->wait();
    });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a kernel's working space");
  }
  return ffi::Error::Success();
}

inline std::optional<Element> element_of(const Any& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return Element::kFloat32;
    case ffi::BF16: return Element::kBFloat16;
    case ffi::F16: return Element::kFloat16;
    default: return std::nullopt;
  }
}

// An argument or a result as it was found, for messages.
struct Found {
  const char* name;
  Dims dims;
};

// "row_sum: expected x [rows, d], out [rows]; found x [2, 3], out [4]".
inline ffi::Error misfit(const std::string& expected, std::initializer_list<Found> found) {
  std::string message = expected + "; found";
  for (const Found& f : found) {
    message += std::string(f.name == found.begin()->name ? " " : ", ") + f.name + " [";
    for (size_t i = 0; i < f.dims.size(); ++i) message += (i ? ", " : "") + std::to_string(f.dims[i]);
    message += "]";
  }
  return ffi::Error::InvalidArgument(message);
}

// "grouped_matmul: expected experts from 0 to 8; found 9".
inline ffi::Error misfit(const std::string& expected, int64_t found) {
  return ffi::Error::InvalidArgument(expected + "; found " + std::to_string(found));
}

}  // namespace oxjax

// Defines the handler `oxjax_<name>`, which calls oxjax::<name> with the thread pool and what `binding` adds.
#define OXJAX_HANDLER(name, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(oxjax_##name, oxjax::handle_##name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() binding)
