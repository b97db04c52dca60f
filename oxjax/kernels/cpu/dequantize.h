// Panels of quantised weights as floats.
#pragma once

#include "quantized_matmul.h"

namespace oxjax {

// Inputs k .. k + depth of one panel's outputs, all 16 of them, to rows of `to`. Both are multiples of 32.
void dequantize(const Format& format, const uint8_t* panel, size_t d_in, size_t k, size_t depth, float* to,
                size_t stride);

}  // namespace oxjax
