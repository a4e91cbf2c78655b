// Weights of linear_wgmma.cuh: packed trits to the operand A, exponents and mantissas as they are needed along a row.
#include <stdint.h>

namespace ternarize {

// Register A of wgmma for 16 columns: j of the four that 16 packed bytes hold, from the bytes of a row and of the row 8
// below (``words``: [row][plane], the most significant trit first).
//
// In each 16 columns a thread has the pairs (2q, 2q + 1) and (2q + 8, 2q + 9), q its place in its quad. 16 packed bytes
// are four planes of 16 columns, so it needs the byte pairs 2q and 2q + 8. With their bytes dealt to the word
// (2q + 8, 2q, 2q + 9, 2q + 1), lowest first, the codes of a pair are 16 bits apart, and the code is a number once it
// lies in the top two bits of a 16-bit float: 00 is 0, 01 is 0x4000 = 2.0, 11 is 0xC000 = -2.0, in bfloat16 and in
// float16. So (word << shift) & 0xC000C000 is a register of A. Groups of 32 are 8 bytes of four planes of 8 columns:
// two planes make 16 columns, and the two byte pairs belong to two groups.
//
// scales: [row][byte pair], two bfloat16 each that are multiplied in if SCALED: 2^(E - 1), which takes back the 2.
template <typename Float, int GROUP, int PLANES, bool SCALED>
__device__ __forceinline__ void decode(const uint32_t (&words)[2][PLANES], const uint32_t (&scales)[2][2], int j,
                                       uint32_t* registers) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = r % 2, pair = GROUP == 32 ? j / 2 : r / 2, field = GROUP == 32 ? j % 2 * 2 + r / 2 : j;
    const int shift = (pair ? 14 : 6) - 2 * field;
    uint32_t level = (words[row][0] << shift) & 0xC000C000u;
#pragma unroll
    for (int p = 1; p < PLANES; ++p) level = three_times_plus<Float>(level, (words[row][p] << shift) & 0xC000C000u);
    registers[r] = SCALED ? multiply_bfloat16(level, scales[row][pair]) : level;
  }
}

// A word of E [N, G], or the last one there is; zeros in place of what lies past its end.
template <int G>
__device__ __forceinline__ uint32_t exponent_word(const int8_t* E, uint32_t N, uint32_t word) {
  const uint32_t bytes = N * G;
  word = min(word, (bytes - 1) / 4);
  if (G % 4 == 0 || word < bytes / 4) return __ldg(reinterpret_cast<const uint32_t*>(E) + word);
  return word_of(reinterpret_cast<const uint8_t*>(E) + bytes / 4 * 4, bytes % 4);
}

// The exponents of four groups of a row, from a multiple of four on, loaded four groups before they are needed. Rows need
// not start at a whole word.
template <int G>
struct Exponents {
  static constexpr bool ALIGNED = G % 4 == 0;
  uint32_t window, low, next;
  uint32_t first;

  __device__ __forceinline__ void start(const int8_t* E, uint32_t N, uint32_t row, uint32_t group) {
    first = min(row, N - 1) * G;
    const uint32_t place = first + group / 4 * 4;
    window = exponent_word<G>(E, N, place / 4);
    next = exponent_word<G>(E, N, (place + 4) / 4);
    if (!ALIGNED) {
      window = __funnelshift_r(window, next, first % 4 * 8);
      low = next;
      next = exponent_word<G>(E, N, (place + 8) / 4);
    }
  }
  // To the four groups from ``group`` on.
  __device__ __forceinline__ void advance(const int8_t* E, uint32_t N, uint32_t group) {
    window = ALIGNED ? next : __funnelshift_r(low, next, first % 4 * 8);
    low = next;
    next = exponent_word<G>(E, N, (first + group + (ALIGNED ? 4 : 8)) / 4);
  }
  __device__ __forceinline__ int at(uint32_t group) const {
    return static_cast<int>(window << (24 - group % 4 * 8)) >> 24;
  }
};

// A mantissa of a row and group; groups past the last have the last one's.
template <int BYTES, int G>
__device__ __forceinline__ float mantissa_at(const void* E_mantissa, int N, int row, int group) {
  const int64_t place = static_cast<int64_t>(min(row, N - 1)) * G + min(group, G - 1);
  if constexpr (BYTES == 1) return __ldg(static_cast<const uint8_t*>(E_mantissa) + place);
  if constexpr (BYTES == 2) return __ldg(static_cast<const int16_t*>(E_mantissa) + place);
  if constexpr (BYTES == 4) return static_cast<float>(__ldg(static_cast<const int*>(E_mantissa) + place));
  return 1;
}

}  // namespace ternarize
