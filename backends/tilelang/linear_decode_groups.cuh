// Scales of groups for linear_decode.cuh. Letters and names as there.
#include <stdint.h>

namespace ternarize {

constexpr int CHUNKS = 4;  // of a step

// The exponents or mantissas of a row that a step needs, in a ring: the aligned words that hold them.
template <int BYTES, int K, int GROUP>
struct GroupValues {
  static constexpr int G = (K + GROUP - 1) / GROUP;
  static constexpr int PER_CHUNK = GROUP < CHUNK ? CHUNK / GROUP : 1;
  static constexpr bool ALIGNED = GROUP <= CHUNK && G * BYTES % 4 == 0;
  static constexpr int WORDS = ALIGNED ? PER_CHUNK * BYTES : (CHUNKS * PER_CHUNK * BYTES + (4 - BYTES) + 3) / 4;

  // Of a chunk.
  static __device__ __forceinline__ int first_group(int chunk) {
    return GROUP < CHUNK ? chunk * PER_CHUNK : chunk / ((GROUP + CHUNK - 1) / CHUNK);
  }
  // Where in its tensor the first value of a row and step lies, in bytes.
  static __device__ __forceinline__ int offset(int row, int step) {
    return (row * G + first_group(step * CHUNKS)) * BYTES;
  }
  static __device__ __forceinline__ void copy_async(uint8_t* to, int row_in_block, int row, int step, int lane_word,
                                                    const void* values, int N) {
    const int from = (offset(row, step) & ~3) + 4 * lane_word, left = N * G * BYTES - from;
    const auto* const values_at = static_cast<const uint8_t*>(values) + from;
    uint8_t* const word = to + (row_in_block * WORDS + lane_word) * 4;
    // Rows that are whole steps have no words past their end.
    constexpr bool WHOLE = ALIGNED && G * BYTES % (4 * WORDS) == 0;
    if (WHOLE || left >= 4)
      copy_4_async(word, values_at);
    else
      *reinterpret_cast<uint32_t*>(word) = word_of(values_at, left);
  }
  static __device__ __forceinline__ int read(const uint8_t* ring, int row_in_block, int row, int step, int group) {
    // Past the last group of a row there are zeros in the ring, or the next row: x is zero there.
    const int index = first_group(step * CHUNKS + group / PER_CHUNK) - first_group(step * CHUNKS) + group % PER_CHUNK;
    const uint8_t* const value = ring + row_in_block * WORDS * 4 + (offset(row, step) & 3) + index * BYTES;
    if constexpr (BYTES == 1) return *value;
    if constexpr (BYTES == 2) return *reinterpret_cast<const int16_t*>(value);
    if constexpr (BYTES == 4) return *reinterpret_cast<const int*>(value);
    return 0;
  }
};

}  // namespace ternarize
