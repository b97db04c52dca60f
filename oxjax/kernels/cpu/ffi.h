// What all that XLA calls has in common: threads that XLA lends, and types.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include "crew.h"
#include "float_matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace oxjax {

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
      for (size_t i = 1; i < std::min(n, helpers + 1); ++i)
        Crew::only().help(tasks, [&](auto work) { pool.Schedule(std::move(work)); });
      tasks->work();
      tasks->wait();
    });
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a kernel's working space");
  }
  return ffi::Error::Success();
}

inline std::optional<Element> element_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return Element::kFloat32;
    case ffi::BF16: return Element::kBFloat16;
    case ffi::F16: return Element::kFloat16;
    default: return std::nullopt;
  }
}

}  // namespace oxjax
