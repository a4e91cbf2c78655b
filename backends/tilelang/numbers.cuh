// Numbers that the kernels make of integers, and what a guarded one does about those that are not finite.
#include <stdint.h>

namespace ternarize {

// 2^exponent for exponents from -126 to 127.
__device__ __forceinline__ float exp2_int(int exponent) { return __int_as_float((exponent + 127) << 23); }
// 2^(E - 1). At E = -126 it is 2^-127, which is subnormal.
__device__ __forceinline__ float half_scale(int E) { return __int_as_float(max((E + 126) << 23, 0x00400000)); }

// 2^exponent for exponents from -149 to 127, which is subnormal below -126.
__device__ __forceinline__ float exp2_or_less(int exponent) {
  return __int_as_float(exponent > -127 ? (exponent + 127) << 23 : 1 << (exponent + 149));
}

// 2^(E - INT8_SHIFT): what sums of int8 products are scaled by, in float32. They take 24 bits for K below 2^17, so that
// this is the one shift for which none overflows at E = 127, and none needs bits below the last of float32 at E = -126.
constexpr int INT8_SHIFT = 23;
__device__ __forceinline__ float int8_scale(int E) { return exp2_or_less(E - INT8_SHIFT); }

// What the sums of a group start from, and the numbers that they then are. Sums of int8 products with 64 T are integers
// in units of 1/64, at most 2^20 of them in a chunk of 128 weights. They start from the bits of 1.5 · 2^17, of which one
// unit in the last place is 1/64: read as float32 they are 1.5 · 2^17 plus the sum, which subtracting makes exact.
template <typename Accumulator>
constexpr Accumulator ORIGIN = 0;
template <>
constexpr int ORIGIN<int> = 0x48400000;
__device__ __forceinline__ float group_value(float sum) { return sum; }
__device__ __forceinline__ float group_value(int sum) { return __int_as_float(sum) - __int_as_float(ORIGIN<int>); }

// bias · 2^exponent. The exponent reaches -128, where 2^exponent is subnormal: two normal factors instead.
__device__ __forceinline__ float bias_value(int bias, int exponent) {
  const int half = exponent >> 1;
  return static_cast<float>(bias) * exp2_int(half) * exp2_int(exponent - half);
}

// So many bytes of constants as a word, the first one lowest: fewer than four, or none.
__device__ __forceinline__ uint32_t word_of(const uint8_t* from, int bytes) {
  uint32_t word = 0;
  for (int i = 0; i < bytes; ++i) word |= static_cast<uint32_t>(__ldg(from + i)) << 8 * i;
  return word;
}

// NONFINITE_OUTPUT of backends/torch/update.py, into status[0] of the layer (ternarize/guard.py).
__device__ __forceinline__ void report_nonfinite(int* status) { atomicOr(status, 1); }

}  // namespace ternarize
