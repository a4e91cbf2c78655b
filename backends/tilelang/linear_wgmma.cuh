// Parts of linear_wgmma.py that are shorter in CUDA: packed trits to the register operand of wgmma, and the sum over
// a thread block cluster. Letters and packed layout as in ternarize/packing.py.
#include <stdint.h>

namespace ternarize {

// The operand A of wgmma.m64nNk16 for one group: 16-bit floats of 2T, or of T · 2^E.
//
// A thread has rows r and r + 8, and in each 16 columns of k the pairs (2q, 2q + 1) and (2q + 8, 2q + 9), q its place
// in its quad. 16 packed bytes are four planes of 16 columns each, so it needs the byte pairs 2q and 2q + 8 of every 16
// bytes. With their bytes dealt to the word (2q + 8, 2q, 2q + 9, 2q + 1), lowest first, the codes of a pair are 16
// bits apart, and the code is a number once it lies in the top two bits of a 16-bit float: 00 is 0, 01 is 0x4000 = 2.0,
// 11 is 0xC000 = -2.0, in bfloat16 and in float16. So (word << shift) & 0xC000C000 is a register of A.
//
// A group of 32 is 8 bytes of four planes of 8 columns: two planes make 16 columns, and the thread has one byte pair.
//
// packed: [row r, row r + 8][byte pairs in order], uint16. weight: registers [16 columns][pair][row].
// half_scale: for rows r and r + 8, the bits of 2^(E - 1) in bfloat16, which take back the factor 2; not read unless
// SCALED.
template <int GROUP, bool SCALED>
__device__ __forceinline__ void decode_weight(const void* packed, void* weight, int half_scale_0, int half_scale_8) {
  constexpr int PAIRS = GROUP / 32;
  const uint16_t* const pairs = static_cast<const uint16_t*>(packed);
  uint32_t* const registers = static_cast<uint32_t*>(weight);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t scale = static_cast<uint32_t>(half ? half_scale_8 : half_scale_0) * 0x00010001u;
    auto store = [&](int index, uint32_t word, int shift) {
      uint32_t value = (word << shift) & 0xC000C000u;
      if (SCALED) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(value) : "r"(scale));
      registers[index * 2 + half] = value;
    };
    if (GROUP == 32) {
      const uint32_t word = __byte_perm(pairs[half], 0, 0x1404);
#pragma unroll
      for (int plane = 0; plane < 4; ++plane) store(plane, word, 6 - 2 * plane);
    } else {
#pragma unroll
      for (int i = 0; i < PAIRS / 2; ++i) {
        const uint32_t word = __byte_perm(pairs[half * PAIRS + 2 * i], pairs[half * PAIRS + 2 * i + 1], 0x1504);
#pragma unroll
        for (int plane = 0; plane < 4; ++plane) {
          const int columns = plane * (PAIRS / 2) + i;
          store(columns * 2, word, 6 - 2 * plane);
          store(columns * 2 + 1, word, 14 - 2 * plane);
        }
      }
    }
  }
}

// The bits of 2^(E - 1) in bfloat16. At E = -126 it is 2^-127, which is subnormal.
__device__ __forceinline__ int half_scale_bits(int E) { return max((E + 126) << 7, 0x0040); }

// Waits for all blocks of the cluster; what they wrote to shared memory before can be read after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The sum of a float32 variable of shared memory over the blocks of the cluster, in the order of their ranks.
template <int CLUSTER>
__device__ __forceinline__ float cluster_sum(const float* variable) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(variable));
  float sum = 0;
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank) {
    uint32_t remote;
    float value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote));
    sum += value;
  }
  return sum;
}

}  // namespace ternarize
