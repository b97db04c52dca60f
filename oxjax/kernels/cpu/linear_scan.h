// Recurrences of layers whose state is fixed in size, row by row. The bits of a sequence's rows depend on nothing but
// that sequence, however it is cut into calls.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace oxjax {

// Rows starts[s] ... ends[s] - 1 are sequence s's, in order and without overlap; outputs of all others become zeros.
struct Sequences {
  size_t rows, count;
  const int32_t *starts, *ends;
};

// A head's state is a matrix h of keys by values, one number decaying all of it or one each row of it. For each row
//   h = decay * h + key (value - h^T read)^T,
// or with `write` h = decay * h + key value^T - write (h^T read)^T, or without `read` h = decay * h + key value^T;
// then y = h^T query. With a bonus y = (h + (bonus * key) value^T)^T query comes before, from the old h.
struct LinearScan {
  size_t heads, key_heads, key_dim, value_dim, decays;  // head i uses key head i / (heads / key_heads)
  const float *query, *key;                             // [rows, key_heads, key_dim]
  const float* value;                                   // [rows, heads, value_dim]
  const float* decay;                                   // [rows, heads, decays], which is 1 or key_dim
  const float *read, *write;                            // [rows, key_heads, key_dim], or null
  const float* bonus;                                   // [key_heads, key_dim], or null; not with `read`
  const float* initial;                                 // [count, heads, key_dim, value_dim]
  float *y, *states;                                    // as `value` and `initial`
};

void linear_scan(const LinearScan& scan, const Sequences& sequences, const ParallelFor& parallel_for);

}  // namespace oxjax
