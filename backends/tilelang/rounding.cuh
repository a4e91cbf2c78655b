// Stochastic rounding to small integers: the random bits and the fixed point of ternarize/philox.py, bit for bit.
#include <stdint.h>

namespace ternarize {

// The random bits of one stream of one step of a layer.
struct Philox {
  uint32_t seed, layer, step, stream;

  // The four words of a block: ten rounds.
  __device__ __forceinline__ void block(uint64_t number, uint32_t (&words)[4]) const {
    uint32_t c0 = static_cast<uint32_t>(number), c1 = static_cast<uint32_t>(number >> 32), c2 = step, c3 = stream;
    uint32_t key0 = seed, key1 = layer;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(p0);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }
};

// value · factor, clamped to -1 and 1, times LIMIT, in units of 2^-16 to nearest. Both signs are clamped to 0 and 1, which
// is free; of one the product is 0. Added to 1.5 · 2^23, a float32 is rounded to an integer, which then is in the last bits
// of the sum: the result is 0x4B400000 more than the integer.
template <int LIMIT>
__device__ __forceinline__ uint32_t clamped_fixed(float value, float factor) {
  constexpr float ONE = LIMIT * 65536.0f;
  const float above = multiply_clamped(value, factor), below = multiply_clamped(value, -factor);
  return __float_as_uint(__fmaf_rn(above, ONE, __fmaf_rn(below, -ONE, 12582912.0f)));
}
// Two of these and 16 random bits each: the integers in the low two bytes.
__device__ __forceinline__ uint32_t round_off_pair(uint32_t even, uint32_t odd, uint32_t bits) {
  even += (bits & 0xFFFF) - 0x400000;
  odd += (bits >> 16) - 0x400000;
  return __byte_perm(even, odd, 0x0062);
}

// Sums of four int8, which stop at -127 and 127: in two halves of two sign-extended bytes each.
__device__ __forceinline__ uint32_t add_saturating(uint32_t a, uint32_t b) {
  constexpr uint32_t EVEN = 0xA280, ODD = 0xB391, MOST = 0x007F007F, LEAST = 0xFF81FF81;
  const uint32_t even = __vmaxs2(__viaddmin_s16x2(sign_extended<EVEN>(a), sign_extended<EVEN>(b), MOST), LEAST);
  const uint32_t odd = __vmaxs2(__viaddmin_s16x2(sign_extended<ODD>(a), sign_extended<ODD>(b), MOST), LEAST);
  return __byte_perm(even, odd, 0x6240);
}

// The four lanes of a quad have a pair of bytes of each of four runs of 8 bytes; quad lane i gets all of run i.
class QuadTranspose {
 public:
  __device__ __forceinline__ explicit QuadTranspose(int quad) : upper(quad & 2) {
    const bool odd = quad & 1;
    mine = odd ? 0x7632 : 0x5410;
    given = odd ? 0x5410 : 0x7632;
    // Which of the four pairs are neighbours, by the lane that they come from.
    const uint32_t low = odd ? 0x1054 : 0x5410, high = odd ? 0x3276 : 0x7632;
    first = upper ? high : low;
    second = upper ? low : high;
  }

  // pairs: of runs 0 to 3, in the low two bytes.
  __device__ __forceinline__ uint2 operator()(const uint32_t (&pairs)[4]) const {
    const uint32_t a = __byte_perm(pairs[0], pairs[1], 0x5410), b = __byte_perm(pairs[2], pairs[3], 0x5410);
    const uint32_t own = upper ? b : a, across = __shfl_xor_sync(0xFFFFFFFFu, upper ? a : b, 2);
    const uint32_t kept = __byte_perm(own, across, mine);
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, __byte_perm(own, across, given), 1);
    return {__byte_perm(kept, got, first), __byte_perm(kept, got, second)};
  }

 private:
  bool upper;
  uint32_t mine, given, first, second;
};

}  // namespace ternarize
