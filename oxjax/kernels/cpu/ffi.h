// What all that XLA calls has in common: threads that XLA lends, and types.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <thread>

#include "float_matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace oxjax {

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

inline std::optional<Element> element_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return Element::kFloat32;
    case ffi::BF16: return Element::kBFloat16;
    case ffi::F16: return Element::kFloat16;
    default: return std::nullopt;
  }
}

}  // namespace oxjax
