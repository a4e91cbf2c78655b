// Numbers that the kernels make of integers, and what a guarded one does about those that are not finite.
#include <stdint.h>

namespace ternarize {

// 2^exponent for exponents from -126 to 127.
__device__ __forceinline__ float exp2_int(int exponent) { return __int_as_float((exponent + 127) << 23); }
// 2^(E - 1). At E = -126 it is 2^-127, which is subnormal.
__device__ __forceinline__ float half_scale(int E) { return __int_as_float(max((E + 126) << 23, 0x00400000)); }

// 2^(E - INT8_SHIFT), subnormal for the least E: what sums of int8 products are scaled by, in float32. They take 24 bits
// for K below 2^17, so that this is the one shift for which none overflows at E = 127, and none needs bits below the last
// of float32 at E = -126.
constexpr int INT8_SHIFT = 23;
__device__ __forceinline__ float int8_scale(int E) {
  return __int_as_float(E > INT8_SHIFT - 127 ? (E - INT8_SHIFT + 127) << 23 : 1 << (E - INT8_SHIFT + 149));
}

// bias · 2^exponent. The exponent reaches -128, where 2^exponent is subnormal: two normal factors instead.
__device__ __forceinline__ float bias_value(int bias, int exponent) {
  const int half = exponent >> 1;
  return static_cast<float>(bias) * exp2_int(half) * exp2_int(exponent - half);
}

// NONFINITE_OUTPUT of backends/torch/update.py, into status[0] of the layer (ternarize/guard.py).
__device__ __forceinline__ void report_nonfinite(int* status) { atomicOr(status, 1); }

}  // namespace ternarize
