// x rounded to int8 for linear_decode.cuh, as `quantize_activation` of ternarize/activation.py does it: every block finds
// the largest magnitude of each token for itself, which becomes 127. Letters and names as there.
#include <stdint.h>

namespace ternarize {

// The largest magnitude of 8 16-bit floats, as their bits: without their signs they are ordered as their bits are.
__device__ __forceinline__ uint32_t largest_magnitude(const uint2 (&v)[2]) {
  const uint32_t words[] = {v[0].x, v[0].y, v[1].x, v[1].y};
  uint32_t largest = 0;
#pragma unroll
  for (uint32_t two : words) largest = __vmaxs2(largest, two & 0x7FFF7FFF);
  return max(largest >> 16, largest & 0xFFFF);
}
// That of 16 neighbouring lanes.
__device__ __forceinline__ uint32_t largest_of_16_lanes(uint32_t largest) {
#pragma unroll
  for (int lanes = 1; lanes < 16; lanes *= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
  return largest;
}

// Four 16-bit floats times ``factor``, rounded to int8. Added to 1.5 · 2^23 they are integers in the last bits, to
// nearest; where the scale of their token is not finite, any.
template <typename X>
__device__ __forceinline__ uint32_t rounded_to_int8(uint2 four, float factor) {
  const auto bits = [factor](uint32_t word) {
    return __float_as_uint(__fadd_rn(__fmul_rn(__int_as_float(float_bits<X>(word)), factor), 12582912.0f));
  };
  return __byte_perm(__byte_perm(bits(four.x), bits(four.x >> 16), 0x0040),
                     __byte_perm(bits(four.y), bits(four.y >> 16), 0x0040), 0x5410);
}

// The scales of tokens, float32, in shared memory. 16 neighbouring threads have the same token, and the next 16 the next.
template <typename X, int TOKENS, int WARPS>
struct TokenScales {
  static constexpr int HALF_WARPS = 2 * WARPS;
  // Scales, and the largest magnitude that each half of a warp has met.
  static constexpr int BYTES = (TOKENS + HALF_WARPS) * 4;

  float* scales;

  // 127 by the largest magnitude of this thread's token, where ``largest`` is that of what this thread has of it. A
  // value that is not finite makes the scale so. For all threads, which meet.
  __device__ __forceinline__ float set(uint32_t largest) const {
    static_assert(HALF_WARPS % TOKENS == 0);
    uint32_t* const of_half_warps = reinterpret_cast<uint32_t*>(scales + TOKENS);
    const int half_warp = threadIdx.x / 16, token = half_warp % TOKENS;
    largest = largest_of_16_lanes(largest);
    if (threadIdx.x % 16 == 0) of_half_warps[half_warp] = largest;
    __syncthreads();
    // Shared out to the lanes, since a broadcast takes as long as a load of them all.
#pragma unroll
    for (int i = 0; i < HALF_WARPS; i += 16 * TOKENS)
      if (const int other = i + threadIdx.x % 16 * TOKENS; other < HALF_WARPS)
        largest = max(largest, of_half_warps[other + token]);
    largest = largest_of_16_lanes(largest);
    float magnitude = __int_as_float(float_bits<X>(largest));
    // _LEAST_MAGNITUDE of ternarize/activation.py; NaN is no less.
    if (magnitude < 1e-5f) magnitude = 1e-5f;
    if (half_warp < TOKENS && threadIdx.x % 16 == 0) scales[token] = __fdiv_rn(magnitude, 127);
    // _TOP of ternarize/activation.py.
    return __fdiv_rn(127 + 0x1p-13f, magnitude);
  }
};

}  // namespace ternarize
