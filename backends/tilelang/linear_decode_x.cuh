// x of linear_decode.cuh: in shared memory, in the order in which a lane of mma takes it. Letters and names as there.
//
// Floats lie as [chunk][plane][column][lane of a quad], 16 bytes, which are the column pairs for each b. int8 lies as
// [chunk][two planes][column][lane of a quad][plane], 8 bytes, and of groups of 64 as
// [chunk][group][column][lane of a quad][plane], 4 bytes. A token is a column, or three of digits.
//
// Digits. The values of a token and chunk are rounded to integers of 23 bits, in units that are a power of two of the
// largest, and an integer is three digits in base 256, from -128 to 127. bfloat16 has 8 bits: a value down to 2^-14 of
// the largest is exact, and what is rounded off the others is at most 2^-22 of it. A chunk with a value that is not
// finite has NaN for a unit. One digit is int8 with a scale for all of a token (linear_decode_round.cuh).
#include <stdint.h>

#include <type_traits>

namespace ternarize {

constexpr int CHUNK = 128;  // weights
constexpr int DIGIT_BITS = 8;

// DIGITS: 3 or 1 for floats that are to be multiplied as int8, else 0.
template <typename X, int DIGITS, int TOKENS, int K, int GROUP>
struct Activations {
  static_assert(DIGITS == 0 || DIGITS == 1 || DIGITS == 3);
  using Value = X;
  static constexpr int MOST_TOKENS = TOKENS, WIDTH = K;
  static constexpr bool ROUNDS = DIGITS == 1;
  static constexpr int COLUMNS_A_TOKEN = DIGITS != 0 ? DIGITS : 1;
  static constexpr int COLUMNS = TOKENS * COLUMNS_A_TOKEN;
  static constexpr int COLUMN_TILES = (COLUMNS + 7) / 8;
  static constexpr int X_BYTES = CHUNK * COLUMNS * (DIGITS != 0 ? 1 : sizeof(X));
  // Of digits, with the units of their columns behind them.
  static constexpr int UNITS_AT = X_BYTES;
  static constexpr int CHUNK_BYTES = X_BYTES + (DIGITS == 3 ? 8 * COLUMN_TILES * sizeof(float) : 0);
  static constexpr int SCALES = GROUP < CHUNK ? CHUNK / GROUP : 1;
  // Pieces that a thread loads before it stores the first: x comes from L2, one latency for all of them.
  static constexpr int BATCH = 4;

  // A piece is 8 values of a token: floats in the order of s_x, or what will be int8, in the order of x.
  static constexpr int PIECES = 16 * TOKENS;  // of a chunk
  static constexpr bool IN_ORDER = DIGITS != 0 || std::is_same_v<X, int8_t>;

  const X* x;  // [M, K]
  int M;

  // Writes so many chunks from ``first`` to s_x, of one digit times ``factor``. By THREADS threads.
  template <int THREADS>
  __device__ __forceinline__ void stage(uint8_t* s_x, int first, int chunks, float factor = 0) const {
    const int pieces = chunks * PIECES;
    for (int i = threadIdx.x; i < pieces; i += BATCH * THREADS) {
      uint2 values[BATCH][2];
      load_batch<THREADS>(values, i, first, pieces);
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (i + b * THREADS < pieces) store_piece(s_x, i + b * THREADS, values[b], factor);
    }
  }

  // The largest magnitude, as bits, of those of this thread's token that it would stage. By THREADS threads.
  template <int THREADS>
  __device__ __forceinline__ uint32_t largest_of(int chunks) const {
    const int pieces = chunks * PIECES;
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < pieces; i += BATCH * THREADS) {
      uint2 values[BATCH][2] = {};
      load_batch<THREADS>(values, i, 0, pieces);
#pragma unroll
      for (int b = 0; b < BATCH; ++b) largest = max(largest, largest_magnitude(values[b]));
    }
    return largest;
  }

  // Of ``pieces`` those with the numbers i, i + THREADS, ...
  template <int THREADS>
  __device__ __forceinline__ void load_batch(uint2 (&values)[BATCH][2], int i, int first, int pieces) const {
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
      if (i + b * THREADS < pieces) load_piece(values[b], i + b * THREADS, first);
  }

  static __device__ __forceinline__ int token_of(int i) { return IN_ORDER ? i / 16 % TOKENS : i / 4 % TOKENS; }

  __device__ __forceinline__ void load_piece(uint2 (&v)[2], int i, int first) const {
    const int m = token_of(i);
    v[0] = v[1] = {0, 0};
    if (m < M)
      load_row(v, x + static_cast<int64_t>(m) * K, i, first, [](const X* from) { return load_activations(from); });
  }

  // The same columns of any row. Zeros past the end.
  template <typename Load>
  static __device__ __forceinline__ void load_row(uint2 (&v)[2], const X* row, int i, int first, Load load) {
    constexpr int GROUP_CHUNKS = (GROUP + CHUNK - 1) / CHUNK;
    const int chunk = first + i / PIECES, plane = IN_ORDER ? i / 4 % 4 : i / 4 / TOKENS % 4;
#pragma unroll
    for (int half = 0; half < (std::is_same_v<X, int8_t> ? 1 : 2); ++half) {
      // Of a plane's 32 bytes of the chunk, the first of 4, or of what int8 has of them, 8.
      const int byte = IN_ORDER || SCALES == 1 ? i % 4 * 8 + half * 4 : i % 4 * 4 + half * 16;
      const int group = GROUP < CHUNK ? chunk * SCALES + byte / 16 : chunk / GROUP_CHUNKS;
      const int size = min(GROUP, K - group * GROUP);
      const int place = GROUP < CHUNK ? byte % 16 : chunk % GROUP_CHUNKS * 32 + byte;
      v[half] = place < size / 4 ? load(row + group * GROUP + plane * (size / 4) + place) : uint2{0, 0};
    }
  }

  static __device__ __forceinline__ void store_piece(uint8_t* s_x, int i, const uint2 (&v)[2], float factor = 0) {
    const int eight = i % 4, plane = i / 4 % 4, m = i / 16 % TOKENS, chunk = i / 16 / TOKENS;
    if constexpr (ROUNDS) {
      store_int8(s_x + chunk * CHUNK_BYTES, m, plane, eight,
                 {rounded_to_int8<X>(v[0], factor), rounded_to_int8<X>(v[1], factor)});
    } else if constexpr (DIGITS == 3) {
      store_digits(s_x + chunk * CHUNK_BYTES, m, plane, eight, v);
    } else if constexpr (std::is_same_v<X, int8_t>) {
      store_int8(s_x + chunk * CHUNK_BYTES, m, plane, eight, v[0]);
    } else {
      const uint32_t even_v = __byte_perm(v[0].x, v[0].y, 0x5410), odd_v = __byte_perm(v[0].x, v[0].y, 0x7632);
      const uint32_t even_w = __byte_perm(v[1].x, v[1].y, 0x5410), odd_w = __byte_perm(v[1].x, v[1].y, 0x7632);
      reinterpret_cast<uint4*>(s_x)[i] =
          SCALES == 1 ? uint4{even_v, even_w, odd_v, odd_w} : uint4{even_v, odd_v, even_w, odd_w};
    }
  }

  // 8 values of a plane into their column of a chunk.
  static __device__ __forceinline__ void store_int8(uint8_t* chunk, int column, int plane, int eight, uint2 v) {
    if constexpr (SCALES == 1) {
      reinterpret_cast<uint2*>(chunk)[(plane / 2 * COLUMNS + column) * 8 + eight * 2 + plane % 2] = v;
    } else {
      // Of two lanes of a quad.
      uint32_t* const to =
          reinterpret_cast<uint32_t*>(chunk) + (eight / 2 * COLUMNS + column) * 16 + eight % 2 * 8 + plane;
      to[0] = v.x;
      to[4] = v.y;
    }
  }

  // The same of 8 floats, whose chunk is in 16 neighbouring lanes.
  static __device__ __forceinline__ void store_digits(uint8_t* chunk, int m, int plane, int eight,
                                                      const uint2 (&v)[2]) {
    const uint32_t words[] = {v[0].x, v[0].y, v[1].x, v[1].y};
    const uint32_t largest = largest_of_16_lanes(largest_magnitude(v));
    // All are below 2^(exponent - 126): times 2^(148 - exponent), which may take two factors, they are below 2^22.
    const int exponent = float_bits<X>(largest) >> 23, lifted = exponent < 64 ? 64 : 0;
    const float factor = exp2_int(148 - exponent - lifted);
    uint32_t digits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = __int_as_float(float_bits<X>(i % 2 ? words[i / 2] >> 16 : words[i / 2]));
      if (lifted) value *= exp2_int(64);
      // Added to 1.5 · 2^23 they are integers in the last bits, to nearest. Balanced digits are those of the integer
      // plus 128 in each place, less 128.
      digits[i] = (__float_as_uint(__fmaf_rn(value, factor, 12582912.0f)) - 0x4B400000 + 0x808080) ^ 0x808080;
    }
#pragma unroll
    for (int d = 0; d < DIGITS; ++d) {
      const uint32_t both = d | (4 + d) << 4;
      const auto four = [&](int i) {
        return __byte_perm(__byte_perm(digits[i], digits[i + 1], both), __byte_perm(digits[i + 2], digits[i + 3], both),
                           0x5410);
      };
      store_int8(chunk, m * DIGITS + d, plane, eight, {four(0), four(4)});
    }
    const int d = plane * 4 + eight;
    if (d < DIGITS)
      reinterpret_cast<float*>(chunk + UNITS_AT)[m * DIGITS + d] =
          exponent == 255 ? __int_as_float(0x7FC00000) : exp2_or_less(exponent - 148 + DIGIT_BITS * d);
  }
};

}  // namespace ternarize
