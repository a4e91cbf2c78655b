// Sums of linear_wgmma.cuh for activations in bfloat16 and float16.
//
// Scales. bfloat16 holds T · 2^E for every E, so there 2^E is multiplied into the operand, and one sum runs over all of
// K. Where it does not fit the operand (float16, mantissas) the operand is the trit, and the sum of each group is scaled
// in float32, which takes twice the registers.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// The sums of this thread for a tile.
template <typename Float, int MANTISSA_BYTES, typename S>
__device__ __forceinline__ void sum_up(const Work& work, Stages<S>& stages, float (&sums)[S::ROW_TILES][S::SUMS]) {
  constexpr bool SCALED = std::is_same_v<Float, __nv_bfloat16> && MANTISSA_BYTES == 0;
  constexpr int ROW_TILES = S::ROW_TILES, GROUP = S::GROUP, GROUPS_PER_STEP = S::GROUPS_PER_STEP, PLANES = S::PLANES;

  // wgmma of 16 columns are issued in batches: while the tensor cores work on one, the operand of the next is decoded.
  // What they add to, if scales come after, is the sum of one group.
  constexpr int BATCH = SCALED ? 4 * ROW_TILES : GROUP == 32 ? 2 : 4;
  constexpr int BATCHES = 8 * ROW_TILES / BATCH;
  static_assert(BATCHES % 2 == 0);

  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  // Rows row and row + 8 of each 64; 16 bytes are swapped in every other four rows.
  const int row = warp * 16 + lane / 4;
  const int n = work.n0 + warpgroup * ROW_TILES * 64 + row;
  const int swizzle = lane / 16 * 16;

  Exponents<S::G> exponents[ROW_TILES][2];
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
    for (int i = 0; i < S::SUMS; ++i) sums[t][i] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      exponents[t][half].start(work.layer.E, work.layer.N, n + t * 64 + half * 8, S::group_of(work.first));
  }

  int previous = -1;
  for (int step = work.first; step < work.last; ++step, stages.advance()) {
    const int group = S::group_of(step);
    if (group % 4 == 0 && (GROUP != 128 || step % S::STEPS_PER_GROUP == 0) && step > work.first) {
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) exponents[t][half].advance(work.layer.E, work.layer.N, group);
    }
    float mantissas[ROW_TILES][2][GROUPS_PER_STEP];
    if constexpr (MANTISSA_BYTES != 0)
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < GROUPS_PER_STEP; ++i)
            mantissas[t][half][i] = mantissa_at<MANTISSA_BYTES, S::G>(work.layer.E_mantissa, work.layer.N,
                                                                     n + t * 64 + half * 8, group + i);

    barrier_wait(stages.full + stages.stage, stages.phase);
    const uint8_t* const packed = stages.stage_packed(warpgroup) + row * S::PACKED_ROW_BYTES + lane % 4 * 2;
    uint32_t words[ROW_TILES][2][2][PLANES];  // [row tile][16 bytes][row]
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int p = 0; p < PLANES; ++p) {
            const uint8_t* const bytes =
                packed + p * S::PLANE_BYTES + (t * 64 + half * 8) * S::PACKED_ROW_BYTES + ((i * 16) ^ swizzle);
            words[t][i][half][p] = __byte_perm(*reinterpret_cast<const uint16_t*>(bytes),
                                               *reinterpret_cast<const uint16_t*>(bytes + 8), 0x1504);
          }

    // Sums of groups that are not scaled yet, of two batches in turn.
    float group_sums[2][SCALED ? 1 : S::SUMS];
    auto add_group = [&](int batch) {
      const int t = batch * BATCH / 8, i = batch * BATCH / 4 % 2;
      const int index = GROUP == 128 ? 0 : GROUP == 64 ? i : 2 * i + batch * BATCH / 2 % 2;
      float scales[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Sums of groups past the last are zero, and must not be scaled by Inf.
        scales[half] = half_scale(exponents[t][half].at(min(group + index, S::G - 1)));
        if (MANTISSA_BYTES != 0) scales[half] *= mantissas[t][half][index];
      }
      if constexpr (!SCALED) {
        keep(group_sums[batch % 2]);
#pragma unroll
        for (int k = 0; k < S::SUMS; ++k) sums[t][k] += scales[k / 2 % 2] * group_sums[batch % 2][k];
      }
    };

    const uint64_t descriptor = matrix_descriptor<S::X_ROW_BYTES>(stages.stage_x());
#pragma unroll
    for (int batch = 0; batch < BATCHES; ++batch) {
      // Of a tile: which 16 bytes, and which columns of them.
      const int t = batch * BATCH / 8;
      uint32_t a[BATCH * 4];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int i = (batch * BATCH + b) / 4 % 2, j = (batch * BATCH + b) % 4;
        uint32_t scales[2][2] = {};
        if constexpr (SCALED) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const int index = GROUP == 128 ? 0 : GROUP == 64 ? i : 2 * i + pair;
              // The bits of 2^(E - 1) in bfloat16: half_scale of numbers.cuh.
              scales[half][pair] =
                  static_cast<uint32_t>(max((exponents[t][half].at(group + index) + 126) << 7, 0x0040)) * 0x00010001u;
            }
        }
        decode<Float, GROUP, PLANES, SCALED>(words[t][i], scales, j, a + b * 4);
      }
      keep(a);
      float* const to = SCALED ? sums[t] : group_sums[batch % 2];
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int i = (batch * BATCH + b) / 4 % 2, j = (batch * BATCH + b) % 4;
        const int column = (GROUP == 128 ? 2 * j + i : 4 * i + j) * 16;
        wgmma<Float, S::BLOCK_M>(to, a + b * 4, descriptor + S::x_offset(column) / 16, SCALED || b > 0);
      }
      wgmma_commit();
      if (SCALED || batch > 0) wgmma_wait<1>();
      if (!SCALED && batch > 0) add_group(batch - 1);
      if (SCALED && batch == 0 && previous >= 0 && lane == 0) barrier_arrive(stages.empty + previous);
    }
    if (!SCALED) {
      wgmma_wait<0>();
      add_group(BATCHES - 1);
      if (lane == 0) barrier_arrive(stages.empty + stages.stage);
    }
    previous = stages.stage;
  }
  if (SCALED) {
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) keep(sums[t]);
    if (previous >= 0 && lane == 0) barrier_arrive(stages.empty + previous);
  }
}

}  // namespace ternarize
