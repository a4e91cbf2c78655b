// y = x · Wᵀ + bias on wgmma, for any number of tokens, from the packed trits as they lie in memory
// (ternarize/packing.py, whose letters are used here). It computes yᵀ = W · xᵀ: the trits are decoded in registers,
// straight into the operand A, so no decoded weight is ever written to memory.
//
// Steps. One step along K is 32 packed bytes a row, 128 weights. In a group of 128 weights or more, byte c holds the
// weights c, c + q, c + 2q and c + 3q, q a quarter of the group, so the 32 bytes are four runs of 32 columns of x, q
// columns apart. The last bytes of a row may be fewer: TMA fills what lies beyond the row with zeros, which is the code
// of zero, and whatever columns of x they meet count nothing. Groups of 32 and 64 lie in 128 columns one after another.
//
// Work. A tile of y is BLOCK_N outputs x BLOCK_M tokens. One warpgroup loads, ahead by STAGES (linear_wgmma_stages.cuh);
// the others each have 64 ROW_TILES outputs of the tile, sum up its products (linear_wgmma_float.cuh for x in 16 bits,
// linear_wgmma_int8.cuh) and store them (linear_wgmma_store.cuh). Blocks stay, and take tile after tile; of the tiles
// that are left when no full round is, each is split along K among the blocks of a cluster, which add up their sums in
// shared memory, in the order of their ranks: results are the same bits every run.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// X: __nv_bfloat16 or __half, of x and y; or int8_t. Y: of y. GROUP_SIZE: weights a group. MANTISSA_BYTES: of an
// E_mantissa, or 0. The others: Tile of linear_wgmma.py.
//
// scale: float32 [M], of int8 tokens, by which their outputs are multiplied; else null.
template <typename X, typename Y, int K, int GROUP_SIZE, int PLANES, int MANTISSA_BYTES, bool GUARDED, int BLOCK_M,
          int ROW_TILES, int WARPGROUPS, int STAGES, int CLUSTER, int SHARED_BYTES, typename... Layers>
__device__ __forceinline__ void linear_wgmma(const CUtensorMap& x, int M, void* shared, const void* scale,
                                             Layers... given) {
  using S = Sizes<X, K, GROUP_SIZE, PLANES, BLOCK_M, ROW_TILES, WARPGROUPS, STAGES, CLUSTER>;

  let_next_kernel_start();
  Stages<S> stages;
  stages.template start<SHARED_BYTES>(shared);

  const Layer layers[] = {given...};
  const Tiles<BLOCK_M, S::BLOCK_N, S::STEPS, CLUSTER, sizeof...(Layers)> tiles(layers, M);

  // Of a thread that computes and of one that loads; together no more than all have at launch, 168, 128 or 96 each.
  constexpr int REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
  constexpr int LOADER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;

  if (threadIdx.x / 128 == WARPGROUPS) {
    give_registers<LOADER_REGISTERS>();
    load_tiles(stages, x, tiles);
    return;
  }

  take_registers<REGISTERS>();
  int stores = 0;
  Work work;
  for (int item = 0; tiles.at(item, work); ++item) {
    float sums[ROW_TILES][S::SUMS];
    if constexpr (std::is_same_v<X, int8_t>)
      sum_up_int8(work, stages, static_cast<const float*>(scale), M, sums);
    else
      sum_up<X, MANTISSA_BYTES>(work, stages, sums);
    store_tile<Y, GUARDED>(work, stages, M, sums, stores);
  }
  if (threadIdx.x % 128 == 0) stores_read<0>();
}

}  // namespace ternarize
