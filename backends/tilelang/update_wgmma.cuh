// The stage of the rule `factored` on wgmma, for any number of tokens: G = grad_yᵀ · x [N, K] is summed in registers,
// turned into integers there and added to the stage (ternarize/backends/torch/update.py, whose letters are used here). No
// float [N, K] is ever written to memory.
//
// Work. A tile of G is 128 x 256. One warpgroup loads, ahead by STAGES steps of 64 tokens, of which TMA fills those that
// do not exist with zeros; two others have 64 rows of the tile each. The second waits before its last SKEW steps until the
// first has begun all of its own: it multiplies while the first rounds, and then the first multiplies again, what is loaded
// for the next tile, while the second rounds. Blocks stay, and take tile after tile.
//
// Integers. Of 32 columns of its rows r and r + 8, a lane sums four pairs of neighbours each, which share a block of random
// bits. Most of what rounding costs is drawing these: DRAWN of the 16 blocks of a tile are drawn while the first of its
// products are formed, and wait in registers. Then lanes exchange bytes to have 8 neighbours to add to and to store.
#include <stdint.h>

namespace ternarize {

// Sums over the 8 lanes of a warp that have the same column, of 8 columns: each lane gives half of its sums for half of
// another's, until it has one, that of column ``group``, the place of the lane among the 8.
__device__ __forceinline__ float sum_over_groups(float (&sums)[8], int group) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool high = group & half;
      const float given = high ? sums[i] : sums[i + half], kept = high ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, half * 4);
    }
  return sums[0];
}

// Float: __nv_bfloat16 or __half, of grad_y and x. The others: UpdateTile of update_wgmma.py.
template <typename Float, int STAGES, int PANEL, int SKEW, int DRAWN, int SHARED_BYTES>
__device__ __forceinline__ void update_wgmma(const CUtensorMap& grad_y, const CUtensorMap& x, int M, int N, int K,
                                             void* shared, const void* row_factors, const void* col_factors,
                                             const void* rng, void* stage_bytes, void* row_sums, void* col_sums,
                                             void* status_words) {
  constexpr int BLOCK_N = 128, BLOCK_K = 256, BLOCK_M = 64;
  constexpr int BOX_BYTES = BLOCK_M * 128;  // 64 columns
  constexpr int GRAD_BYTES = BLOCK_N / 64 * BOX_BYTES, X_BYTES = BLOCK_K / 64 * BOX_BYTES;
  // CLIP, GRADIENT_STREAM and NONFINITE_GRADIENT of the reference.
  constexpr int CLIP = 4, GRADIENT_STREAM = 1, NONFINITE_GRADIENT = 2;
  // Named barriers: 1 and 2 are those of the warpgroups.
  constexpr int FIRST_IS_DONE = 3;
  constexpr float FLOAT32_MAX = 3.402823466e+38f;

  uint8_t* const s_grad = static_cast<uint8_t*>(shared);
  uint8_t* const s_x = s_grad + STAGES * GRAD_BYTES;
  float* const s_sums = reinterpret_cast<float*>(s_x + STAGES * X_BYTES);  // [warpgroup][warp][column]
  float* const s_factors = s_sums + 2 * 4 * BLOCK_K;                       // [warpgroup][column]
  uint64_t* const full = reinterpret_cast<uint64_t*>(s_factors + 2 * BLOCK_K);
  uint64_t* const empty = full + STAGES;
  static_assert(STAGES * (GRAD_BYTES + X_BYTES + 16) + 2 * 5 * BLOCK_K * 4 <= SHARED_BYTES);
  static_assert(SKEW <= STAGES && 0 <= DRAWN && DRAWN <= BLOCK_K / 16);

  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  const int warp = thread / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 2 * 4);
    }
    barriers_ready();
  }
  __syncthreads();

  // Tiles, in panels of rows that are taken column by column: those that run together share operands in L2.
  const int rows = (N + BLOCK_N - 1) / BLOCK_N, columns = (K + BLOCK_K - 1) / BLOCK_K;
  const int steps = (M + BLOCK_M - 1) / BLOCK_M;
  int n0, k0;
  auto locate = [&](int tile) {
    if (tile >= rows * columns) return false;
    const int panel = tile / (PANEL * columns), in_panel = tile - panel * (PANEL * columns);
    const int height = min(PANEL, rows - panel * PANEL);
    n0 = (panel * PANEL + in_panel % height) * BLOCK_N;
    k0 = in_panel / height * BLOCK_K;
    return true;
  };
  int stage = 0;
  uint32_t phase = 0;
  auto advance = [&] {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == 2) {
    give_registers<24>();
    if (thread == 0) {
      for (int tile = blockIdx.x; locate(tile); tile += gridDim.x)
#pragma unroll 1
        for (int step = 0; step < steps; ++step, advance()) {
          barrier_wait(empty + stage, phase ^ 1);
          barrier_expect(full + stage, GRAD_BYTES + X_BYTES);
#pragma unroll
          for (int i = 0; i < BLOCK_N / 64; ++i)
            load_box(s_grad + stage * GRAD_BYTES + i * BOX_BYTES, &grad_y, n0 + i * 64, step * BLOCK_M, full + stage);
#pragma unroll
          for (int i = 0; i < BLOCK_K / 64; ++i)
            load_box(s_x + stage * X_BYTES + i * BOX_BYTES, &x, k0 + i * 64, step * BLOCK_M, full + stage);
        }
    }
    __syncwarp();
  } else {
    take_registers<240>();
    const auto* const row_factor = static_cast<const float*>(row_factors);
    const auto* const col_factor = static_cast<const float*>(col_factors);
    const auto* const seed_layer_step = static_cast<const int64_t*>(rng);
    auto* const staged = static_cast<int8_t*>(stage_bytes);
    auto* const status = static_cast<int*>(status_words);
    const int count = status[1];
    const Philox philox = {static_cast<uint32_t>(seed_layer_step[0]), static_cast<uint32_t>(seed_layer_step[1]),
                           static_cast<uint32_t>(seed_layer_step[2]), static_cast<uint32_t>(count + GRADIENT_STREAM)};

    // Of a tile with fewer steps the first warpgroup could be at the end of the next before the second waits for it.
    const bool skewed = steps > STAGES;
    const int quad = lane % 4, group = lane / 4;
    const QuadTranspose transpose(quad);
    auto release = [&](int used) {
      if (lane == 0) barrier_arrive(empty + used);
    };

    for (int tile = blockIdx.x; locate(tile); tile += gridDim.x) {
      // The rows of this lane, and the first of its blocks of random bits.
      const int n[2] = {n0 + warpgroup * 64 + warp * 16 + group, n0 + warpgroup * 64 + warp * 16 + group + 8};
      auto draw = [&](int half, int run, uint32_t (&words)[4]) {
        philox.block(static_cast<uint64_t>(n[half]) * (4 * ((K + 31) / 32)) + (k0 / 32 + run) * 4 + quad, words);
      };
      // What it will add to is in L2 by then: of the lanes that share two rows, each asks for a half of one.
      const int asked_n = quad % 2 == 0 ? n[0] : n[1], asked_k = k0 + quad / 2 * 128;
      if (count > 0 && asked_n < N && asked_k < K)
        prefetch_to_l2(staged + static_cast<int64_t>(asked_n) * K + asked_k);
      float G[BLOCK_K / 2] = {};
      keep(G);
      uint32_t drawn[DRAWN > 0 ? DRAWN : 1][4];
      int previous = -1;
      auto begin = [&](int step) {
        if (SKEW > 0 && warpgroup == 1 && step == steps - SKEW && skewed) {
          wgmma_wait<0>();
          release(previous);
          previous = -1;
          named_barrier(FIRST_IS_DONE, 256);
        }
        barrier_wait(full + stage, phase);
        const uint64_t a = transposed_descriptor<BLOCK_M>(s_grad + stage * GRAD_BYTES + warpgroup * BOX_BYTES);
        const uint64_t b = transposed_descriptor<BLOCK_M>(s_x + stage * X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < BLOCK_M; m += 16) wgmma_transposed<Float, BLOCK_K>(G, a + m * 8, b + m * 8, true);
        wgmma_commit();
      };
      auto finish = [&] {
        wgmma_wait<1>();
        if (previous >= 0) release(previous);
        previous = stage;
        advance();
      };
#pragma unroll
      for (int i = 0; i < DRAWN; ++i) {
        if (i < steps) begin(i);
        draw(i % 2, i / 2, drawn[i]);
        // Now, not where they are used.
        keep(drawn[i]);
        if (i < steps) finish();
      }
#pragma unroll 1
      for (int step = DRAWN; step < steps; ++step) {
        begin(step);
        finish();
      }
      if (SKEW > 0 && warpgroup == 0 && skewed) named_barrier_arrive(FIRST_IS_DONE, 256);

      // Where this lane stages 8 columns of a run of 32, and how many there are from there on.
      uint2* places[2];
      int left[2];
      float factors[2], squares[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        places[half] = reinterpret_cast<uint2*>(staged + static_cast<int64_t>(n[half]) * K + k0 + quad * 8);
        left[half] = n[half] < N ? K - k0 - quad * 8 : 0;
        factors[half] = n[half] < N ? row_factor[n[half]] * (1.0f / CLIP) : 0.0f;
      }
      // To the first micro-batch there is nothing to add: what is there belongs to an earlier step.
      auto load_staged = [&](int run, uint2 (&to)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (count > 0 && left[half] > run * 32) to[half] = places[half][run * 4];
      };
      uint2 old[2] = {};
      load_staged(0, old);
      float* const column_factors = s_factors + warpgroup * BLOCK_K;
      for (int c = thread; c < BLOCK_K; c += 128) column_factors[c] = k0 + c < K ? col_factor[k0 + c] : 0.0f;
      named_barrier(1 + warpgroup, 128);
      wgmma_wait<0>();
      keep(G);
      release(previous);

      float* const column_sums = s_sums + (warpgroup * 4 + warp) * BLOCK_K;
#pragma unroll
      for (int run = 0; run < BLOCK_K / 32; ++run) {
        const float* const g = G + run * 16;
        uint2 next[2] = {};
        if (run + 1 < BLOCK_K / 32) load_staged(run + 1, next);
        float sums[8], columns[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = *reinterpret_cast<const float2*>(column_factors + run * 32 + j * 8 + quad * 2);
          columns[2 * j] = pair.x;
          columns[2 * j + 1] = pair.y;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float g0 = g[4 * j + i], g1 = g[4 * j + 2 + i];
            squares[0] = __fmaf_rn(g0, g0, squares[0]);
            squares[1] = __fmaf_rn(g1, g1, squares[1]);
            sums[2 * j + i] = __fmaf_rn(g1, g1, g0 * g0);
          }
        }
        column_sums[run * 32 + group / 2 * 8 + quad * 2 + group % 2] = sum_over_groups(sums, group);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int index = run * 2 + half;
          uint32_t late[4], pairs[4];
          if (index >= DRAWN) draw(half, run, late);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t fixed[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
              fixed[i] = clamped_fixed<CLIP>(g[4 * j + 2 * half + i] * factors[half], columns[2 * j + i]);
            pairs[j] = round_off_pair(fixed[0], fixed[1], index < DRAWN ? drawn[index < DRAWN ? index : 0][j] : late[j]);
          }
          uint2 u = transpose(pairs);
          if (count > 0) u = {add_saturating(old[half].x, u.x), add_saturating(old[half].y, u.y)};
          if (left[half] > run * 32) places[half][run * 4] = u;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) old[half] = next[half];
      }

      // Comparisons with NaN are false. A sum that is not finite may still be one of large squares.
      if (!(squares[0] <= FLOAT32_MAX && squares[1] <= FLOAT32_MAX)) {
        bool finite = true;
#pragma unroll
        for (int i = 0; i < BLOCK_K / 2; ++i) finite &= fabsf(G[i]) <= FLOAT32_MAX;
        if (!finite) atomicOr(status, NONFINITE_GRADIENT);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 1);
        squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 2);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (quad == half && n[half] < N)
          static_cast<float*>(row_sums)[static_cast<int64_t>(k0 / BLOCK_K) * N + n[half]] = squares[half];
      // Of the four warps, in the order of their rows.
      named_barrier(1 + warpgroup, 128);
      const int part = n0 / 64 + warpgroup;
      for (int c = thread; c < BLOCK_K; c += 128) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += s_sums[(warpgroup * 4 + w) * BLOCK_K + c];
        if (k0 + c < K && part * 64 < N) static_cast<float*>(col_sums)[static_cast<int64_t>(part) * K + k0 + c] = sum;
      }
      named_barrier(1 + warpgroup, 128);
    }
  }
}

}  // namespace ternarize
