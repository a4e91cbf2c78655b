// x of linear_decode.cuh: in shared memory, in the order in which a lane of mma takes it. Letters and names as there.
//
// Floats lie as [chunk][plane][token][lane of a quad], 16 bytes, which are the column pairs for each b. Digits lie as
// [chunk][two planes][column][lane of a quad][plane], 8 bytes, and int8 of groups of 64 as
// [chunk][group][column][lane of a quad][plane], 4 bytes.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

constexpr int CHUNK = 128;  // weights

template <typename X, int TOKENS, int DIGITS, int K, int GROUP>
struct Activations {
  static constexpr int COLUMNS = TOKENS * (DIGITS ? DIGITS : 1);
  static constexpr int CHUNK_BYTES = CHUNK * COLUMNS * (DIGITS ? 1 : 2);
  static constexpr int SCALES = GROUP < CHUNK ? CHUNK / GROUP : 1;

  const X* x;  // [M, K]
  int M;

  // 8 bytes of a plane, of consecutive bytes of a chunk; zeros past the end.
  __device__ __forceinline__ uint2 load(int m, int chunk, int plane, int byte) const {
    constexpr int GROUP_CHUNKS = (GROUP + CHUNK - 1) / CHUNK;
    const int group = GROUP < CHUNK ? chunk * SCALES + byte / 16 : chunk / GROUP_CHUNKS;
    const int size = min(GROUP, K - group * GROUP);
    const int place = GROUP < CHUNK ? byte % 16 : chunk % GROUP_CHUNKS * 32 + byte;
    if (m >= M || place >= size / 4) return uint2{0, 0};
    return load_activations(x + static_cast<int64_t>(m) * K + group * GROUP + plane * (size / 4) + place);
  }

  // Writes so many chunks from ``first`` to s_x; of several digits also their scales, float32 [chunk][token], to
  // s_scale. By THREADS threads.
  template <int THREADS>
  __device__ __forceinline__ void stage(uint8_t* s_x, float* s_scale, int first, int chunks) const {
    if constexpr (DIGITS == 0)
      stage_floats<THREADS>(reinterpret_cast<uint4*>(s_x), first, chunks);
    else if constexpr (std::is_same_v<X, int8_t>)
      stage_int8<THREADS>(s_x, first, chunks);
    else
      stage_digits<THREADS>(reinterpret_cast<uint32_t*>(s_x), s_scale, first, chunks);
  }

  template <int THREADS>
  __device__ __forceinline__ void stage_floats(uint4* s_x, int first, int chunks) const {
    for (int i = threadIdx.x; i < chunks * 16 * TOKENS; i += THREADS) {
      const int q = i % 4, m = i / 4 % TOKENS, plane = i / 4 / TOKENS % 4, chunk = i / 16 / TOKENS;
      const uint2 v = load(m, first + chunk, plane, SCALES == 1 ? 8 * q : 4 * q);
      const uint2 w = load(m, first + chunk, plane, SCALES == 1 ? 8 * q + 4 : 16 + 4 * q);
      const uint32_t even_v = __byte_perm(v.x, v.y, 0x5410), odd_v = __byte_perm(v.x, v.y, 0x7632);
      const uint32_t even_w = __byte_perm(w.x, w.y, 0x5410), odd_w = __byte_perm(w.x, w.y, 0x7632);
      s_x[i] = SCALES == 1 ? uint4{even_v, even_w, odd_v, odd_w} : uint4{even_v, odd_v, even_w, odd_w};
    }
  }

  template <int THREADS>
  __device__ __forceinline__ void stage_int8(uint8_t* s_x, int first, int chunks) const {
    for (int i = threadIdx.x; i < chunks * 16 * TOKENS; i += THREADS) {
      const int eight = i % 4, plane = i / 4 % 4, m = i / 16 % TOKENS, chunk = i / 16 / TOKENS;
      const uint2 v = load(m, first + chunk, plane, eight * 8);
      if constexpr (SCALES == 1) {
        reinterpret_cast<uint2*>(s_x)[((chunk * 2 + plane / 2) * COLUMNS + m) * 8 + eight * 2 + plane % 2] = v;
      } else {
        // Of two lanes of a quad.
        uint32_t* const to =
            reinterpret_cast<uint32_t*>(s_x) + ((chunk * 2 + eight / 2) * COLUMNS + m) * 16 + eight % 2 * 8 + plane;
        to[0] = v.x;
        to[4] = v.y;
      }
    }
  }

  // A warp takes a chunk of a token at a time.
  template <int THREADS>
  __device__ __forceinline__ void stage_digits(uint32_t* s_x, float* s_scale, int first, int chunks) const {
    for (int i = threadIdx.x / 32; i < chunks * TOKENS; i += THREADS / 32) {
      const int m = i % TOKENS, chunk = i / TOKENS;
      const int lane = threadIdx.x % 32, plane = lane / 8, byte = lane % 8 * 4;
      const uint2 v = load(m, first + chunk, plane, byte);
      uint32_t bits[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) bits[k] = float_bits<X>((k < 2 ? v.x : v.y) >> (16 * (k % 2)));
      uint32_t largest = 1;
#pragma unroll
      for (int k = 0; k < 4; ++k) largest = max(largest, bits[k] >> 23 & 0xFF);
      largest = __reduce_max_sync(0xFFFFFFFF, largest);
      uint32_t words[DIGITS] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t exponent = bits[k] >> 23 & 0xFF;
        const int significand = (bits[k] & 0x7FFFFF) + (exponent != 0 ? 0x800000 : 0);
        // Fixed point, the leading bit of the largest exponent at 7 DIGITS - 2.
        const int shift = 7 * DIGITS - 25 - static_cast<int>(largest - max(exponent, 1u));
        const int right = min(max(-shift, 0), 30);
        int value = shift >= 0 ? significand << shift : (significand + (1 << right >> 1)) >> right;
        if (bits[k] >> 31) value = -value;
#pragma unroll
        for (int digit = DIGITS - 1; digit >= 0; --digit) {
          const int rest = digit == 0 ? 0 : (value + 64) >> 7;
          words[digit] |= static_cast<uint32_t>((value - rest * 128) & 0xFF) << (8 * k);
          value = rest;
        }
      }
#pragma unroll
      for (int digit = 0; digit < DIGITS; ++digit)
        s_x[(((chunk * 2 + plane / 2) * COLUMNS + m * DIGITS + digit) * 4 + byte / 8) * 4 + plane % 2 * 2 +
            byte / 4 % 2] = words[digit];
      // The weight of the first digit; what is not finite makes the sum NaN.
      if (lane == 0)
        s_scale[i] = largest == 255 ? __int_as_float(0x7FC00000)
                     : largest > 5  ? exp2_int(static_cast<int>(largest) - 132)
                                    : __int_as_float(1 << (largest + 17));
    }
  }
};

}  // namespace ternarize
