#pragma once

#include <cstddef>
#include <functional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace oxjax {

// Runs task(0) ... task(n - 1), in any order, some of them at once; returns when all are done.
using ParallelFor = std::function<void(size_t n, const std::function<void(size_t)>& task)>;

// Makes arithmetic the default one: whoever runs us may flush denormal numbers to zero, in some threads.
class DefaultArithmetic {
#if defined(__x86_64__)
 public:
  DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultArithmetic() { _mm_setcsr(before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  unsigned before_;
#endif
};

}  // namespace oxjax
