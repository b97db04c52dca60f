// Rows times one panel of 16 outputs, written once for all sets of instructions.
//
// Whoever includes this file is in a namespace of its own and has defined TARGET, which lets the compiler use the
// set's instructions, and
//   kTallest            rows that share one pass over the panel, by how many registers there are
//   kSigned             dot() takes 8-bit codes with their offset subtracted
//   from_halves(from)   16 float16 as f32x16
//   from_bytes(from)    16 int8 as f32x16
//   dot<bits>(sum, codes, four)   sum += codes of 16 outputs times four int8 inputs
//
// Vectors are those of GCC and Clang, which cut them to what the processor has.

// Numbers at `from`, which need not be aligned.
template <typename V>
INLINE TARGET V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Bits of bytes, shifted (to the right, where positive) to stay within their bytes, and the others cleared.
template <int kShift>
INLINE TARGET u8x64 bits_of(u8x64 bytes, uint8_t mask) {
  const u16x32 pairs = (u16x32)bytes;  // processors have no shift for bytes
  return (u8x64)(kShift < 0 ? pairs << (kShift < 0 ? -kShift : 0) : pairs >> (kShift < 0 ? 0 : kShift)) & mask;
}

// Vector i of the eight that hold the codes of 32 inputs, four of each output; see `_packed_codes` in quantized.py.
template <int kBits, int i>
INLINE TARGET u8x64 unpacked(const uint8_t* from) {
  if constexpr (kBits == 8) return kSigned ? load<u8x64>(from + 64 * i) ^ 128 : load<u8x64>(from + 64 * i);
  u8x64 codes = bits_of<i / 4 * 4>(load<u8x64>(from + 64 * (i % 4)), 15);
  if constexpr (kBits == 5) codes |= bits_of<i - 4>(load<u8x64>(from + 256), 16);
  if constexpr (kBits == 6) codes |= bits_of<2 * (i % 4) - 4>(load<u8x64>(from + 256 + 64 * (i / 4)), 48);
  return codes;
}

template <int kBits, int kGroup, bool kMinima, int kRows>
TARGET void tile(const Format& format, const Chunk* x, size_t chunks, const uint8_t* panel, float* out, size_t stride,
                 size_t width) {
  constexpr int kGroups = kChunk / kGroup;  // of weights, to one of activations
  constexpr bool kShifted = !kMinima && !(kSigned && kBits == 8);
  const size_t d_in = chunks * kChunk, n_scales = format.scales(d_in);
  const uint8_t* scales = panel + chunks * 64 * kBits;
  const uint8_t* minima = scales + n_scales * 2 * kPanel;
  const uint8_t* sub_scales = minima + (kMinima ? n_scales * 2 * kPanel : 0);
  const uint8_t* sub_minima = sub_scales + format.sub_scales(d_in) * kPanel;

  f32x16 total[kRows] = {};
  for (size_t c = 0; c < chunks; ++c) {
    const uint8_t* packed = panel + c * 64 * kBits;
    const u8x64 codes[8] = {unpacked<kBits, 0>(packed), unpacked<kBits, 1>(packed), unpacked<kBits, 2>(packed),
                            unpacked<kBits, 3>(packed), unpacked<kBits, 4>(packed), unpacked<kBits, 5>(packed),
                            unpacked<kBits, 6>(packed), unpacked<kBits, 7>(packed)};
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const size_t at = c * kGroups + g, of_scale = format.two_level ? at * kGroup / kSuperBlock : at;
      f32x16 scale = from_halves(scales + of_scale * 2 * kPanel), minimum = {};
      if constexpr (kMinima) minimum = from_halves(minima + of_scale * 2 * kPanel);
      if (format.two_level) {
        scale *= from_bytes(sub_scales + at * kPanel);
        if constexpr (kMinima) minimum *= from_bytes(sub_minima + at * kPanel);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Chunk& inputs = x[r * chunks + c];
        const int32_t negated_sum = kGroups == 2 ? inputs.negated_halves[g] : inputs.negated_sum;
        i32x16 sum = {};
        if constexpr (kShifted) sum = (sum + negated_sum) * (1 << (kBits - 1));
#pragma GCC unroll 8
        for (int i = 0; i < kGroup / 4; ++i) {
          sum = dot<kBits>(sum, codes[g * (kGroup / 4) + i], load<int32_t>(inputs.codes + g * kGroup + 4 * i));
        }
        total[r] += __builtin_convertvector(sum, f32x16) * scale * inputs.scale;
        if constexpr (kMinima) total[r] -= minimum * (inputs.scale * static_cast<float>(negated_sum));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(out + r * stride, &total[r], width * sizeof(float));
}

// So many rows of one panel's outputs.
template <int kBits, int kGroup, bool kMinima>
TARGET void panel_product(const Format& format, const Chunk* x, size_t rows, size_t chunks, const uint8_t* panel,
                          float* out, size_t stride, size_t width) {
  size_t r = 0;
  for (; r + kTallest <= rows; r += kTallest)
    tile<kBits, kGroup, kMinima, kTallest>(format, x + r * chunks, chunks, panel, out + r * stride, stride, width);
  if constexpr (kTallest >= 8)
    for (; r + 4 <= rows; r += 4)
      tile<kBits, kGroup, kMinima, 4>(format, x + r * chunks, chunks, panel, out + r * stride, stride, width);
  for (; r < rows; ++r)
    tile<kBits, kGroup, kMinima, 1>(format, x + r * chunks, chunks, panel, out + r * stride, stride, width);
}

inline PanelProduct panel_product_for(const Format& f) {
  switch (f.bits * 1000 + f.group * 10 + f.minima) {
    case 4320: return panel_product<4, 32, false>;
    case 4321: return panel_product<4, 32, true>;
    case 5320: return panel_product<5, 32, false>;
    case 5321: return panel_product<5, 32, true>;
    case 6160: return panel_product<6, 16, false>;
    case 8320: return panel_product<8, 32, false>;
    default: return nullptr;
  }
}
