// Threads that share the tasks of a kernel.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace oxjax {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Tasks are taken off a counter by the caller and by whichever threads come in time. The caller waits only for tasks
// that someone has begun, so it makes progress even when all other threads of the pool wait like itself.
class TaskQueue {
 public:
  TaskQueue(size_t n, const std::function<void(size_t)>* task) : n_(n), task_(task) {}

  void work() {
    for (size_t i; (i = next_.fetch_add(1)) < n_;) {
      (*task_)(i);  // the caller's, who stays until all are done
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < n_; ++spins) {
      spins > 1000 ? std::this_thread::yield() : pause();
    }
  }

 private:
  const size_t n_;
  const std::function<void(size_t)>* const task_;
  std::atomic<size_t> next_{0}, done_{0};
};

// Threads that have helped stay awake a little for the next kernel: waking one takes as long as many kernels do.
class WorkerPool {
 public:
  static WorkerPool& shared() {
    static WorkerPool pool;
    return pool;
  }

  // Lets one more thread work on the tasks: one that is awake, or else one that `schedule` finds for a function.
  template <typename Schedule>
  void help(const std::shared_ptr<TaskQueue>& tasks, Schedule schedule) {
    if (!claim()) return schedule([this, tasks] { stay(tasks); });
    const std::lock_guard<std::mutex> lock(mutex_);
    posts_.push_back(tasks);
    n_posts_.fetch_add(1, std::memory_order_release);
  }

 private:
  static constexpr std::chrono::microseconds kStay{100};

  void stay(std::shared_ptr<TaskQueue> tasks) {
    while (tasks) {
      tasks->work();
      awake_.fetch_add(1);
      tasks = next();
    }
  }

  // What to work on next; null when nothing came, and nobody counts on this thread.
  std::shared_ptr<TaskQueue> next() {
    const auto end = std::chrono::steady_clock::now() + kStay;
    for (int spins = 1;; ++spins) {
      if (n_posts_.load(std::memory_order_acquire)) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!posts_.empty()) {
          const auto tasks = std::move(posts_.front());
          posts_.pop_front();
          n_posts_.fetch_sub(1, std::memory_order_relaxed);
          return tasks;
        }
      }
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > end && claim()) return nullptr;
      pause();
    }
  }

  // Takes one off those who are awake. As many wait in next() as are awake, and one for each post.
  bool claim() {
    size_t n = awake_.load();
    while (n && !awake_.compare_exchange_weak(n, n - 1)) {
    }
    return n != 0;
  }

  std::mutex mutex_;
  std::deque<std::shared_ptr<TaskQueue>> posts_;
  std::atomic<size_t> n_posts_{0}, awake_{0};
};

}  // namespace oxjax
