// Sums of linear_wgmma.cuh to y: those of a tile that is split are added up first.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// Rounds COUNT units, from first_unit on, and stores them. A thread has the outputs row and row + 8 of pairs of tokens:
// value(i) is number i of its 4 COUNT.
//
// stores: so many buffers of y this warpgroup has filled before.
template <int COUNT, typename Y, bool GUARDED, typename S, typename Value>
__device__ __forceinline__ void store_units(const Work& work, const Stages<S>& stages, int M, Value value,
                                            int first_unit, int& stores) {
  constexpr int STORED = S::STORED;
  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128, warp = thread / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
#pragma unroll
  for (int c = 0; c < COUNT / STORED; ++c) {
    const int unit = first_unit + c * STORED;
    const int t = unit / (S::BLOCK_M / 8), m = work.m0 + unit % (S::BLOCK_M / 8) * 8;
    const int n = work.n0 + (warpgroup * S::ROW_TILES + t) * 64;
    uint8_t* const buffer = stages.y + (warpgroup * 2 + stores++ % 2) * S::STORE_BYTES;
    float bias[2] = {};
    if (work.layer.bias != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        bias[half] =
            bias_value(work.layer.bias[min(n + row + half * 8, work.layer.N - 1)], *work.layer.bias_exponent);
    }
    // The store before this one may be reading the other buffer. If this is none of TMA, that one may be the last group
    // even when this buffer's turn comes again, so it ends here.
    if (thread == 0) {
      if (work.layer.y_boxes != nullptr)
        stores_read<1>();
      else
        stores_read<0>();
    }
    named_barrier(1 + warpgroup, 128);
#pragma unroll
    for (int u = 0; u < STORED; u += 2) {
      uint32_t matrices[4];
      bool finite = true;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = (c * STORED + min(u + k / 2, STORED - 1)) * 4 + k % 2 * 2;
        matrices[k] = rounded_pair<Y>(value(i) + bias[k % 2], value(i + 1) + bias[k % 2]);
        finite &= is_finite_pair<Y>(matrices[k]);
      }
      if (GUARDED && !finite) report_nonfinite(work.layer.status);
      const int to = min(u + lane / 16, STORED - 1) * 8 + lane % 8;
      const int column = warp * 2 + lane / 8 % 2;
      store_transposed(buffer + to * 128 + (column ^ (lane % 8)) * 16, matrices);
    }
    if (work.layer.y_boxes != nullptr) {
      fence_for_tma();
      named_barrier(1 + warpgroup, 128);
      if (thread == 0) store_box(work.layer.y_boxes, buffer, n, m);
    } else {
      named_barrier(1 + warpgroup, 128);
      for (int i = thread; i < STORED * 8 * 64; i += 128) {
        const int token = i / 64, output = i % 64;
        const int at = token * 128 + (output / 8 ^ token % 8) * 16 + output % 8 * 2;
        if (m + token < M && n + output < work.layer.N)
          work.layer.y[static_cast<int64_t>(m + token) * work.layer.N + n + output] =
              *reinterpret_cast<const uint16_t*>(buffer + at);
      }
    }
  }
}

// Stores the sums of a tile, in the order of wgmma's accumulators.
template <typename Y, bool GUARDED, typename S>
__device__ __forceinline__ void store_tile(const Work& work, const Stages<S>& stages, int M,
                                           const float (&sums)[S::ROW_TILES][S::SUMS], int& stores) {
  constexpr int UNITS = S::UNITS, OWN = S::OWN;
  if (!work.split) {
    store_units<UNITS, Y, GUARDED>(
        work, stages, M, [&](int i) { return sums[i / S::SUMS][i % S::SUMS]; }, 0, stores);
    return;
  }
  // The parts of the sums, once the stages are free: [rank][unit][thread].
  float4* const parts = reinterpret_cast<float4*>(stages.x);
  static_assert(S::CLUSTER == 1 || S::CLUSTER * OWN * S::THREADS * 16 <= S::STAGES * S::STAGE_BYTES);
  const int rank = blockIdx.x % S::CLUSTER;
  // Every block of the cluster is through with its stages.
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int unit = 0; unit < UNITS; ++unit)
    store_to_rank(parts + (rank * OWN + unit % OWN) * S::THREADS + threadIdx.x, unit / OWN,
                  sums[unit / (S::BLOCK_M / 8)] + unit % (S::BLOCK_M / 8) * 4);
  cluster_arrive();
  cluster_wait();
  float own[OWN * 4];
#pragma unroll
  for (int unit = 0; unit < OWN; ++unit) {
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < S::CLUSTER; ++r) {
      const float4 part = parts[(r * OWN + unit) * S::THREADS + threadIdx.x];
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    own[unit * 4] = sum.x;
    own[unit * 4 + 1] = sum.y;
    own[unit * 4 + 2] = sum.z;
    own[unit * 4 + 3] = sum.w;
  }
  // The next tile's loads overwrite the parts.
  fence_for_tma();
  __syncthreads();
  if (rank * OWN < UNITS)
    store_units<OWN, Y, GUARDED>(work, stages, M, [&](int i) { return own[i]; }, rank * OWN, stores);
}

}  // namespace ternarize
