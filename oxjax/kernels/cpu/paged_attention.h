// Attention of flat rows over paged keys and values; the XLA form is oxjax/kernels/paged_attention.py.
#pragma once

#include "float_matmul.h"
#include "parallel.h"

namespace oxjax {

// Keys or values: [pages, page_size, n_kv, dim].
struct Pages {
  const void* data;
  Element element;
  size_t dim;
};

struct AttentionShape {
  size_t rows, n_heads, n_kv, page_size, table_length;
};

// Absent fields have the value that changes nothing.
struct AttentionForm {
  float scale;
  int64_t window, chunk;  // 0: none
  float softcap;          // 0: none
  const float* slopes;    // [n_heads], or null
  const float* sinks;     // [n_heads], or null
};

// out[rows, n_heads, v.dim] for queries q[rows, n_heads, sum of the keys' dims]. Row r is at positions[r] of the
// sequence whose pages are block_tables[row_seq[r]]; row_seq[r] < 0 is padding and gives zeros. All positions that a
// row sees must be written. The bits of a row depend on itself and what it sees alone.
void paged_attention(const float* q, const Pages* keys, size_t n_keys, const Pages& v, const int32_t* block_tables,
                     const int32_t* row_seq, const int32_t* positions, const AttentionShape& shape,
                     const AttentionForm& form, float* out, const ParallelFor& parallel_for);

}  // namespace oxjax
