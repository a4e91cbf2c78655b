// Stochastic rounding to small integers: the random numbers of ternarize/philox.py, bit for bit, a floor, and sums of four
// int8 in a word.
#include <stdint.h>

namespace ternarize {

// The random bits of one stream of one step of a layer.
class Philox {
 public:
  __device__ __forceinline__ Philox(uint32_t seed, uint32_t layer, uint32_t step, uint32_t stream)
      : step(step), stream(stream) {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      keys[2 * round] = seed + round * 0x9E3779B9u;
      keys[2 * round + 1] = layer + round * 0xBB67AE85u;
    }
    // Else the compiler adds them up again for every block.
    keep(keys);
  }

  // The four words of a block.
  __device__ __forceinline__ void block(uint64_t counter, uint32_t (&words)[4]) const {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = step, c3 = stream;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys[2 * round];
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys[2 * round + 1];
      c3 = static_cast<uint32_t>(p0);
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }

 private:
  static constexpr int ROUNDS = 10;
  uint32_t step, stream, keys[2 * ROUNDS];
};

// floor(value + the uniform number of a word), clamped to -LIMIT and LIMIT, a power of two; in the low 16 bits. The
// uniform number is a product with a power of two, which is exact: the sum is rounded once, as in the reference. Brought
// to 0 to 1 and rounded down, it stays on the same side of every integer, and clamping is free. Added to 1.5 · 2^23, a
// float32 is rounded to an integer, which then is in the last bits of the sum.
template <int LIMIT>
__device__ __forceinline__ uint32_t stochastic_round(float value, uint32_t word) {
  const float sum = __fmaf_rn(static_cast<float>(word >> 8), 5.9604644775390625e-08f, value);
  const float part = fma_down_clamped(sum, 0.5f / LIMIT, 0.5f);
  return __float_as_uint(__fmaf_rd(part, 2.0f * LIMIT, 12582912.0f - LIMIT));
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// Sums of four int8, which stop at -127 and 127: in two halves of two sign-extended bytes each.
__device__ __forceinline__ uint32_t add_saturating(uint32_t a, uint32_t b) {
  constexpr uint32_t EVEN = 0xA280, ODD = 0xB391, MOST = 0x007F007F, LEAST = 0xFF81FF81;
  const uint32_t even = __vmaxs2(__viaddmin_s16x2(__byte_perm(a, 0, EVEN), __byte_perm(b, 0, EVEN), MOST), LEAST);
  const uint32_t odd = __vmaxs2(__viaddmin_s16x2(__byte_perm(a, 0, ODD), __byte_perm(b, 0, ODD), MOST), LEAST);
  return __byte_perm(even, odd, 0x6240);
}

}  // namespace ternarize
