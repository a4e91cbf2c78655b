// What linear_wgmma.cuh keeps in shared memory, and the warpgroup that fills it.
#include <stdint.h>

namespace ternarize {

// The smallest divisor of a number that is no less than ``least``.
constexpr int smallest_divisor(int number, int least) {
  while (number % least != 0) ++least;
  return least;
}

// All that is known when a call is compiled; the parameters are those of linear_wgmma.
template <typename X, int K, int GROUP_SIZE_, int PLANES_, int BLOCK_M_, int ROW_TILES_, int WARPGROUPS_, int STAGES_,
          int CLUSTER_>
struct Sizes {
  static constexpr int GROUP_SIZE = GROUP_SIZE_, PLANES = PLANES_, BLOCK_M = BLOCK_M_, ROW_TILES = ROW_TILES_,
                       WARPGROUPS = WARPGROUPS_, STAGES = STAGES_, CLUSTER = CLUSTER_;
  static constexpr int BLOCK_N = 64 * ROW_TILES * WARPGROUPS;
  static constexpr int THREADS = 128 * WARPGROUPS;  // that compute
  static constexpr int SUMS = BLOCK_M / 2;          // of a thread and row tile
  static_assert(WARPGROUPS >= 2 && WARPGROUPS <= 4);

  static constexpr int GROUP = GROUP_SIZE >= 128 ? 128 : GROUP_SIZE;  // weights of a step that share a scale
  static constexpr int GROUPS_PER_STEP = 128 / GROUP;
  static constexpr int G = (K + GROUP_SIZE - 1) / GROUP_SIZE;

  // Steps of the whole groups, and of the last group if it is smaller.
  static constexpr int WHOLE = K / GROUP_SIZE, TAIL = K % GROUP_SIZE;
  static constexpr int STEPS_PER_GROUP = (GROUP_SIZE + 127) / 128;
  static constexpr int STEPS = GROUP == 128 ? WHOLE * STEPS_PER_GROUP + (TAIL + 127) / 128 : (K + 127) / 128;
  static_assert(GROUP == 128 || TAIL == 0);
  // The first group of a step.
  static __device__ __forceinline__ int group_of(int step) {
    return GROUP == 128 ? step / STEPS_PER_GROUP : step * GROUPS_PER_STEP;
  }

  // x in shared memory: boxes of BLOCK_M rows of 128 bytes where the 128 columns of a step are neighbours, else of 32
  // columns.
  static constexpr int X_ROW_BYTES = GROUP_SIZE <= 128 && TAIL == 0 ? 128 : 32 * sizeof(X);
  static constexpr int X_ROW_COLUMNS = X_ROW_BYTES / sizeof(X);
  static constexpr int X_BYTES = BLOCK_M * 128 * sizeof(X);
  // Where the columns from ``column`` of a step on begin.
  static __device__ __forceinline__ constexpr int x_offset(int column) {
    return column / X_ROW_COLUMNS * (BLOCK_M * X_ROW_BYTES) + column % X_ROW_COLUMNS * static_cast<int>(sizeof(X));
  }

  static constexpr int PACKED_ROW_BYTES = 32;
  static constexpr int PLANE_BYTES = 64 * ROW_TILES * PACKED_ROW_BYTES;  // of a warpgroup
  static constexpr int PACKED_BYTES = WARPGROUPS * PLANES * PLANE_BYTES;
  static constexpr int STAGE_BYTES = X_BYTES + PACKED_BYTES;

  static constexpr int UNITS = ROW_TILES * BLOCK_M / 8;  // of 8 tokens and 64 outputs a warpgroup: 4 sums a thread
  // Of a tile that is split, those that a block adds up and stores, as many as any other; the last ranks may have none.
  static constexpr int OWN = smallest_divisor(UNITS, (UNITS + CLUSTER - 1) / CLUSTER);
  // Units that are stored at once: 32 tokens, or as many as there are.
  static constexpr int STORED = OWN % 4 == 0 && BLOCK_M % 32 == 0 ? 4 : OWN % 2 == 0 ? 2 : 1;
  static constexpr int STORE_BYTES = STORED * 8 * 128;

  // Scales of the tokens of a tile, for each warpgroup, of a call that has them.
  static constexpr int SCALE_BYTES = sizeof(X) == 1 ? WARPGROUPS * BLOCK_M * 4 : 0;
};

// The shared memory of a block, and its stages in their turn: [x], [packed], y [warpgroup][2], scales [warpgroup],
// barriers. A stage is full when TMA has filled it, and empty when every warp that computes is through with it.
template <typename S>
struct Stages {
  uint8_t *x, *packed, *y;
  float* scales;
  uint64_t *full, *empty;
  int stage = 0;
  uint32_t phase = 0;

  template <int SHARED_BYTES>
  __device__ __forceinline__ void start(void* shared) {
    x = static_cast<uint8_t*>(shared);
    packed = x + S::STAGES * S::X_BYTES;
    y = packed + S::STAGES * S::PACKED_BYTES;
    scales = reinterpret_cast<float*>(y + S::WARPGROUPS * 2 * S::STORE_BYTES);
    full = reinterpret_cast<uint64_t*>(y + S::WARPGROUPS * 2 * S::STORE_BYTES + S::SCALE_BYTES);
    empty = full + S::STAGES;
    static_assert(S::STAGES * (S::STAGE_BYTES + 16) + S::WARPGROUPS * 2 * S::STORE_BYTES + S::SCALE_BYTES <=
                  SHARED_BYTES);
    if (threadIdx.x == 0) {
      for (int i = 0; i < S::STAGES; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, 4 * S::WARPGROUPS);
      }
      barriers_ready();
    }
    __syncthreads();
  }
  __device__ __forceinline__ void advance() {
    if (++stage == S::STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ uint8_t* stage_x() const { return x + stage * S::X_BYTES; }
  __device__ __forceinline__ uint8_t* stage_packed(int warpgroup) const {
    return packed + stage * S::PACKED_BYTES + warpgroup * S::PLANES * S::PLANE_BYTES;
  }
};

// Begins to fill a stage with the packed trits of a step, and with its columns of x.
template <typename S>
__device__ __forceinline__ void load_packed(const Stages<S>& stages, const Work& work, int step) {
  barrier_expect(stages.full + stages.stage, S::STAGE_BYTES);
#pragma unroll
  for (int i = 0; i < S::WARPGROUPS; ++i) {
    const int n = work.n0 + i * 64 * S::ROW_TILES;
    if (S::PLANES == 1)
      load_box(stages.stage_packed(i), work.layer.T_packed, step * S::PACKED_ROW_BYTES, n, stages.full + stages.stage);
    else
      load_box_of_planes(stages.stage_packed(i), work.layer.T_packed, step * S::PACKED_ROW_BYTES, n,
                         stages.full + stages.stage);
  }
}
template <typename S>
__device__ __forceinline__ void load_x(const Stages<S>& stages, const CUtensorMap& x, const Work& work, int step) {
  const int group = step / S::STEPS_PER_GROUP;
  // Columns from run to run.
  const int quarter = ((S::TAIL == 0 || group < S::WHOLE ? S::GROUP_SIZE : S::TAIL) + 3) / 4;
  const int column = S::GROUP == 128 ? group * S::GROUP_SIZE + step % S::STEPS_PER_GROUP * 32 : step * 128;
#pragma unroll
  for (int i = 0; i < 128 / S::X_ROW_COLUMNS; ++i)
    load_box(stages.stage_x() + i * S::BLOCK_M * S::X_ROW_BYTES, &x,
             column + (S::X_ROW_BYTES == 128 ? S::X_ROW_COLUMNS : quarter) * i, work.m0, stages.full + stages.stage);
}

// The work of the warpgroup that loads: its first thread does it all.
template <typename S, typename Tiles>
__device__ __forceinline__ void load_tiles(Stages<S>& stages, const CUtensorMap& x, const Tiles& tiles) {
  Work work;
  for (int item = 0; tiles.at(item, work); ++item) {
    if (threadIdx.x % 128 == 0) {
      int step = work.first;
      if (item == 0) {
        // Weights are constants: their first loads need not wait for the kernel that writes x.
        const int ahead = min(S::STAGES, work.last - work.first);
        for (int i = 0; i < ahead; ++i, stages.advance()) load_packed(stages, work, step + i);
        wait_for_previous_kernel();
        stages.stage = 0;
        stages.phase = 0;
        for (int i = 0; i < ahead; ++i, stages.advance()) load_x(stages, x, work, step + i);
        step += ahead;
      }
      for (; step < work.last; ++step, stages.advance()) {
        barrier_wait(stages.empty + stages.stage, stages.phase ^ 1);
        load_packed(stages, work, step);
        load_x(stages, x, work, step);
      }
    }
    __syncwarp();
    if (work.split) {
      // store_tile
      cluster_arrive();
      cluster_wait();
      cluster_arrive();
      cluster_wait();
      __syncthreads();
    }
  }
}

}  // namespace ternarize
