// Layers of a call of linear_wgmma.cuh, and which tiles of their outputs a block computes.
#include <stdint.h>

namespace ternarize {

// The layers of a call. Pointers are null where a layer has no such tensor.
struct Layer {
  const CUtensorMap* T_packed;  // boxes of 32 bytes x 64 ROW_TILES rows (x PLANES), swizzled by 32 bytes
  const CUtensorMap* y_boxes;   // boxes of 64 outputs x STORE_TOKENS tokens, swizzled by 128 bytes
  int N;
  const int8_t* E;         // [N, G]
  const void* E_mantissa;  // [N, G] of MANTISSA_BYTES each
  const int* bias;         // [N]
  const int8_t* bias_exponent;
  int* status;  // [2], of a guarded call
  uint16_t* y;  // [M, N]
};
__device__ __forceinline__ const CUtensorMap* address_of(const CUtensorMap& map) { return &map; }
// TMA cannot store rows of y that are no multiple of 16 bytes: there is no map.
__device__ __forceinline__ const CUtensorMap* address_of(int) { return nullptr; }
template <typename Map>
__device__ __forceinline__ Layer layer(const CUtensorMap& T_packed, const Map& y_boxes, int N, const void* E,
                                       const void* E_mantissa, const void* bias, const void* bias_exponent,
                                       void* status, void* y) {
  return {&T_packed,
          address_of(y_boxes),
          N,
          static_cast<const int8_t*>(E),
          E_mantissa,
          static_cast<const int*>(bias),
          static_cast<const int8_t*>(bias_exponent),
          static_cast<int*>(status),
          static_cast<uint16_t*>(y)};
}

// What a block does next.
struct Work {
  Layer layer;
  int n0, m0;       // the first output and token of a tile
  int first, last;  // steps along K
  bool split;       // whether the cluster shares them
};

// Whole rounds first, a tile for each block. Where tiles are left for another round, but too few for all blocks, the
// blocks of a cluster share each of them. Tiles of PANEL blocks of tokens go together, so that what they share of x and W
// is read from the cache.
template <int BLOCK_M, int BLOCK_N, int STEPS, int CLUSTER, int LAYERS>
struct Tiles {
  static constexpr int PANEL = 8;

  const Layer (&layers)[LAYERS];
  int blocks_n, blocks_m, rounds;

  __device__ __forceinline__ Tiles(const Layer (&given)[LAYERS], int M) : layers(given) {
    blocks_n = 0;
#pragma unroll
    for (int i = 0; i < LAYERS; ++i) blocks_n += (layers[i].N + BLOCK_N - 1) / BLOCK_N;
    blocks_m = (M + BLOCK_M - 1) / BLOCK_M;
    const int tiles = blocks_n * blocks_m, blocks = gridDim.x;
    rounds = tiles / blocks;
    if (tiles - rounds * blocks > (CLUSTER - 1) * (blocks / CLUSTER)) ++rounds;
  }

  // The work of this block that comes after ``item`` others; false if there is none.
  __device__ __forceinline__ bool at(int item, Work& work) const {
    const int rank = blockIdx.x % CLUSTER, blocks = gridDim.x;
    work.split = CLUSTER > 1 && item >= rounds;
    const int tile =
        work.split ? rounds * blocks + ((item - rounds) * blocks + blockIdx.x) / CLUSTER : item * blocks + blockIdx.x;
    if (tile >= blocks_n * blocks_m) return false;
    const int panel = tile / (PANEL * blocks_n), in_panel = tile - panel * (PANEL * blocks_n);
    const int width = min(PANEL, blocks_m - panel * PANEL);
    int block_n = in_panel / width;
    work.m0 = (panel * PANEL + in_panel % width) * BLOCK_M;
    work.layer = layers[0];
#pragma unroll
    for (int i = 1; i < LAYERS; ++i) {
      const int before = (layers[i - 1].N + BLOCK_N - 1) / BLOCK_N;
      if (block_n < before) break;
      block_n -= before;
      work.layer = layers[i];
    }
    work.n0 = block_n * BLOCK_N;
    work.first = work.split ? rank * STEPS / CLUSTER : 0;
    work.last = work.split ? (rank + 1) * STEPS / CLUSTER : STEPS;
    return true;
  }
};

}  // namespace ternarize
