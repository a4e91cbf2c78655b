// What linear_decode.cuh is called with. Letters as there.
#include <stdint.h>

namespace ternarize {

// The tensors of a layer, as the host passes them; null for those that it does not have.
struct Layer {
  int N;
  const uint8_t* T_packed;  // [PLANES, N, K / 4]
  const int8_t* E;          // [N, G]
  const void* E_mantissa;   // [N, G] of MANTISSA_BYTES each
  const int* bias;          // [N]
  const int8_t* bias_exponent;
  int* status;  // [2], of a guarded call
  void* y;      // [M, N] of Y; of two that are gated, only of the first
};
__device__ __forceinline__ Layer layer(int N, const void* T_packed, const void* E, const void* E_mantissa,
                                       const void* bias, const void* bias_exponent, void* status, void* y) {
  return {N,
          static_cast<const uint8_t*>(T_packed),
          static_cast<const int8_t*>(E),
          E_mantissa,
          static_cast<const int*>(bias),
          static_cast<const int8_t*>(bias_exponent),
          static_cast<int*>(status),
          y};
}

// What a call of floats does besides, if it is asked to: see ``FUSED`` of linear_decode.py.
struct Fused {
  const void* norm_weight;  // [K] of X
  const void* residual;     // [M, N] of Y, of one layer
  float norm_eps;
  int what;  // bits of those below

  static constexpr int NORM = 1, RESIDUAL = 2, GATED = 4;
  __device__ __forceinline__ bool has(int bit) const { return what & bit; }
};
__device__ __forceinline__ Fused fused(const void* norm_weight, const void* residual, float norm_eps, int what) {
  return {norm_weight, residual, norm_eps, what};
}

}  // namespace ternarize
