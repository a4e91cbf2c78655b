// RMSNorm of x for linear_decode.cuh: every block normalises all of x, for itself. Letters and names as there.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// Of Inputs as `Activations`, all of which a block has at once: no more pieces a thread than it loads together.
template <typename Inputs, int WARPS>
struct RootMeanSquare {
  using X = typename Inputs::Value;
  static constexpr int TOKENS = Inputs::MOST_TOKENS, K = Inputs::WIDTH;
  static constexpr int THREADS = WARPS * 32;
  static constexpr int PIECES = (K + 4 * CHUNK - 1) / (4 * CHUNK) * CHUNKS * Inputs::PIECES;
  // DecodeTile.normalises (linear_decode.py).
  static constexpr bool FITS = !std::is_same_v<X, int8_t> && TOKENS <= 2 && PIECES <= Inputs::BATCH * THREADS;
  static constexpr int BATCH = FITS ? (PIECES + THREADS - 1) / THREADS : 1;

  uint2 weight[BATCH][2];

  // Of this thread's pieces. A constant: it may be read before the kernel that writes x is complete.
  __device__ __forceinline__ void load_weight(const X* norm_weight) {
    if constexpr (FITS)
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (const int i = threadIdx.x + b * THREADS; i < PIECES)
          Inputs::load_row(weight[b], norm_weight, i, 0,
                           [](const X* from) { return __ldg(reinterpret_cast<const uint2*>(from)); });
  }

  // Writes x / sqrt(mean(x²) + eps) · weight to s_x, rounded to X once; of one digit then as ``scales`` say. ``sums``:
  // TOKENS floats a warp, until the next barrier.
  template <typename Scales>
  __device__ __forceinline__ void stage(const Inputs& inputs, uint8_t* s_x, float* sums, float eps,
                                        const Scales& scales) const {
    if constexpr (FITS) {
      uint2 values[BATCH][2] = {};
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (const int i = threadIdx.x + b * THREADS; i < PIECES) inputs.load_piece(values[b], i, 0);
#pragma unroll
      for (int m = 0; m < TOKENS; ++m) {
        float squares = 0;
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
          for (int v = 0; v < 8; ++v)
            if (const float value = value_of(values[b], v); Inputs::token_of(threadIdx.x + b * THREADS) == m)
              squares += value * value;
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lanes);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 * TOKENS + m] = squares;
      }
      __syncthreads();
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int i = threadIdx.x + b * THREADS;
        if (i >= PIECES) continue;
        float squares = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) squares += sums[warp * TOKENS + Inputs::token_of(i)];
        const float factor = rsqrtf(squares / K + eps);
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float low = value_of(values[b], 2 * w) * factor * value_of(weight[b], 2 * w);
          const float high = value_of(values[b], 2 * w + 1) * factor * value_of(weight[b], 2 * w + 1);
          words[w] = bits_of(rounded<X>(low)) | static_cast<uint32_t>(bits_of(rounded<X>(high))) << 16;
        }
        values[b][0] = {words[0], words[1]};
        values[b][1] = {words[2], words[3]};
      }
      float factor = 0;
      if constexpr (Inputs::ROUNDS) {
        uint32_t largest = 0;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) largest = max(largest, largest_magnitude(values[b]));
        factor = scales.set(largest);
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (const int i = threadIdx.x + b * THREADS; i < PIECES) Inputs::store_piece(s_x, i, values[b], factor);
    }
  }

 private:
  static __device__ __forceinline__ float value_of(const uint2 (&eight)[2], int i) {
    const uint32_t word = i % 4 < 2 ? eight[i / 4].x : eight[i / 4].y;
    return __int_as_float(float_bits<X>(i % 2 ? word >> 16 : word));
  }
  static __device__ __forceinline__ uint16_t bits_of(X value) { return *reinterpret_cast<const uint16_t*>(&value); }
};

}  // namespace ternarize
