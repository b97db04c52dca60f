#include "dequantize.h"

#include "panel.h"

namespace oxjax {
namespace {

// 32 inputs of 16 outputs as floats, to rows of `to`; every product is exact, and only minima round.
template <int kBits>
void dequantize_chunk(const uint8_t* packed, float offset, const f32x16 scales[2], const f32x16 minima[2], float* to,
                      size_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const u32x16 codes = (u32x16)unpacked<kBits>(packed, i);
    for (int j = 0; j < 4; ++j) {
      const f32x16 code = __builtin_convertvector((i32x16)(codes >> 8 * j & 255), f32x16);
      store(to + (4 * i + j) * stride, scales[i / 4] * (code - offset) + minima[i / 4]);
    }
  }
}

}  // namespace

void dequantize(const Format& f, const uint8_t* panel, size_t d_in, size_t k, size_t depth, float* to, size_t stride) {
  const auto [scales, minima, sub_scales, sub_minima] = sections(f, panel, d_in);
  for (size_t c = k / kChunk; c < (k + depth) / kChunk; ++c, to += kChunk * stride) {
    f32x16 scale[2], minimum[2];
    for (size_t half = 0; half < 2; ++half) {
      const size_t at = c * kChunk + half * kChunk / 2, group = at / f.group,
                   outer = f.two_level ? at / kSuperBlock : group;
      scale[half] = load(scales + outer * kPanel);
      minimum[half] = f.minima ? load(minima + outer * kPanel) : broadcast(-0.0f);  // which changes nothing
      if (f.two_level) scale[half] *= load(sub_scales + group * kPanel);
      if (f.two_level && f.minima) minimum[half] *= load(sub_minima + group * kPanel);
    }
    const uint8_t* packed = panel + c * 64 * f.bits;
    switch (f.bits) {
      case 4: dequantize_chunk<4>(packed, f.offset, scale, minimum, to, stride); break;
      case 5: dequantize_chunk<5>(packed, f.offset, scale, minimum, to, stride); break;
      case 6: dequantize_chunk<6>(packed, f.offset, scale, minimum, to, stride); break;
      case 8: dequantize_chunk<8>(packed, f.offset, scale, minimum, to, stride); break;
    }
  }
}

}  // namespace oxjax
