// Some rows times one panel of 16 outputs: the one loop that all quantised products are made of.
#pragma once

#include "quantized_matmul.h"
#include "simd.h"

namespace oxjax {

#if defined(__AVX512F__)
constexpr size_t kTallestTile = 8;  // rows that share one pass over the panel, by how many registers there are
#else
constexpr size_t kTallestTile = 2;
#endif

// Rows of a tile, laid out for it: `codes` [chunks, rows, 32], `scales` [chunks, rows], `corrections` [groups, rows].
// A correction is what takes the offset off the codes of a group, -offset times the sum of the inputs' codes, or, where
// a group has a minimum, the sum of the inputs as the bits of a float.
struct Inputs {
  const int8_t* codes;
  const float* scales;
  const int32_t* corrections;
};

// What follows the codes of a panel. Minima and the second level are there where the format has them.
struct Sections {
  const Float16 *scales, *minima;
  const int8_t *sub_scales, *sub_minima;
};

OXJAX_INLINE Sections sections(const Format& f, const uint8_t* panel, size_t d_in) {
  const Float16* scales = reinterpret_cast<const Float16*>(panel + d_in / kChunk * 64 * f.bits);
  const Float16* minima = scales + f.scales(d_in) * kPanel;
  const int8_t* sub_scales = reinterpret_cast<const int8_t*>(minima + (f.minima ? f.scales(d_in) * kPanel : 0));
  return {scales, minima, sub_scales, sub_scales + f.sub_scales(d_in) * kPanel};
}

// `next`: the panel that this thread takes up after this one, which is fetched meanwhile; itself where there is none.
using Tile = void (*)(const Inputs& x, size_t chunks, const uint8_t* panel, const uint8_t* next, float* out,
                      size_t stride, size_t width);

// Bits of bytes, shifted (to the right, where positive) to stay within their bytes, and the others cleared.
template <int kShift>
OXJAX_INLINE u8x64 bits_of(u8x64 bytes, uint8_t mask) {
  const u16x32 pairs = (u16x32)bytes;  // processors have no shift for bytes
  return (u8x64)(kShift < 0 ? pairs << (kShift < 0 ? -kShift : 0) : pairs >> (kShift < 0 ? 0 : kShift)) & mask;
}

// Vector i of the eight that hold the codes of 32 inputs, four of each output; see `_packed_codes` in quantized.py.
template <int kBits>
OXJAX_INLINE u8x64 unpacked(const uint8_t* from, int i) {
  if (kBits == 8) return load_as<u8x64>(from + 64 * i);
  const u8x64 pairs = load_as<u8x64>(from + 64 * (i % 4));
  u8x64 codes = i < 4 ? pairs & 15 : bits_of<4>(pairs, 15);
  if (kBits == 5) {
    const u8x64 fifth = load_as<u8x64>(from + 256);
    switch (i) {
      case 0: codes |= bits_of<-4>(fifth, 16); break;
      case 1: codes |= bits_of<-3>(fifth, 16); break;
      case 2: codes |= bits_of<-2>(fifth, 16); break;
      case 3: codes |= bits_of<-1>(fifth, 16); break;
      case 4: codes |= fifth & 16; break;
      case 5: codes |= bits_of<1>(fifth, 16); break;
      case 6: codes |= bits_of<2>(fifth, 16); break;
      case 7: codes |= bits_of<3>(fifth, 16); break;
    }
  }
  if (kBits == 6) {
    const u8x64 further = load_as<u8x64>(from + 256 + 64 * (i / 4));
    switch (i % 4) {
      case 0: codes |= bits_of<-4>(further, 48); break;
      case 1: codes |= bits_of<-2>(further, 48); break;
      case 2: codes |= further & 48; break;
      case 3: codes |= bits_of<2>(further, 48); break;
    }
  }
  return codes;
}

// To the second cache: the first has too few requests under way to keep memory busy.
OXJAX_INLINE void fetch(const uint8_t* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <int kBits, int kGroup, bool kTwoLevel, bool kMinima, int kRows>
void tile(const Inputs& x, size_t chunks, const uint8_t* panel, const uint8_t* next, float* out, size_t stride,
          size_t width) {
  constexpr int kGroups = kChunk / kGroup;                          // of weights, to one of activations
  constexpr size_t kChunks = kTwoLevel ? kSuperBlock / kChunk : 1;  // to a scale of the first level
  constexpr size_t kScales = kTwoLevel ? 2 * kPanel / kChunks + kPanel * kGroups : 2 * kPanel * kGroups;
  constexpr size_t kCodes = 64 * kBits, kOthers = kScales * (1 + kMinima);  // bytes of a chunk in the sections
  constexpr size_t kAhead = 6144 / kCodes;                                  // chunks
  constexpr Format format{kBits, 0, kGroup, kTwoLevel, kMinima};            // whatever the offset, corrections hold it
  const auto [scales, minima, sub_scales, sub_minima] = sections(format, panel, chunks * kChunk);

  f32x16 total[kRows] = {};
  for (size_t first = 0; first < chunks; first += kChunks) {
    f32x16 scale, minimum;
    if (kTwoLevel) scale = load(scales + first / kChunks * kPanel);
    if (kTwoLevel && kMinima) minimum = load(minima + first / kChunks * kPanel);
    for (size_t c = first; c < first + kChunks; ++c) {
      const uint8_t* packed = panel + c * kCodes;
      fetch(c + kAhead < chunks ? packed + kAhead * kCodes : next + (c + kAhead - chunks) * kCodes, kCodes);
      fetch(next + chunks * kCodes + c * kOthers, kOthers);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const size_t at = c * kGroups + g;
        const f32x16 of_group = kTwoLevel ? scale * load(sub_scales + at * kPanel) : load(scales + at * kPanel);
        i32x16 sums[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          sums[r] = i32x16{} + (kMinima || kCentresCodes<kBits> ? 0 : x.corrections[at * kRows + r]);
#pragma GCC unroll 8
        for (int i = 0; i < kGroup / 4; ++i) {
          const u8x64 codes = unpacked<kBits>(packed, g * (kGroup / 4) + i);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            sums[r] = dot_bytes<kBits>(sums[r], codes,
                                       load_as<int32_t>(x.codes + (c * kRows + r) * kChunk + g * kGroup + 4 * i));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          total[r] = fma(__builtin_convertvector(sums[r], f32x16), of_group * x.scales[c * kRows + r], total[r]);
        if (kMinima) {
          const f32x16 least = kTwoLevel ? minimum * load(sub_minima + at * kPanel) : load(minima + at * kPanel);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            total[r] = fma(least, broadcast(load_as<float>(x.corrections + at * kRows + r)), total[r]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) store_first(out + r * stride, total[r], width);
}

}  // namespace oxjax
