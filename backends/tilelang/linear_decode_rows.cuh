// Which rows of which layers a thread block cluster of linear_decode.cuh has. Letters and names as there.
#include <stdint.h>

namespace ternarize {

// The row blocks of one cluster, counted from 0: of layers that are gated the same of both, else consecutive ones of
// all.
template <int ROWS, int CLUSTERS, int LAYERS>
struct RowBlocks {
  Layer all[LAYERS];
  int first_of[LAYERS], blocks_of[LAYERS], blocks = 0;
  // Layers with fewer rows than a row block read their last row several times.
  bool is_short = false;

  template <typename... Layers>
  __device__ __forceinline__ RowBlocks(int cluster, bool gated, Layers... layers) : all{layers...} {
    int row_blocks = 0;
#pragma unroll
    for (const Layer& each : all) {
      row_blocks += (each.N + ROWS - 1) / ROWS;
      is_short |= each.N < ROWS;
    }
    const int shared_out = gated ? row_blocks / 2 : row_blocks;
    const int first_block = cluster * shared_out / CLUSTERS, end_block = (cluster + 1) * shared_out / CLUSTERS;
#pragma unroll
    for (int i = 0, before = 0; i < LAYERS; ++i) {
      const int all_of = (all[i].N + ROWS - 1) / ROWS;
      first_of[i] = max(first_block - before, 0);
      blocks_of[i] = max(min(end_block - before, all_of) - first_of[i], 0);
      blocks += blocks_of[i];
      if (!gated) before += all_of;
    }
  }

  // The layer of a row block, which of its rows would be the first if there were as many as its row blocks have, and
  // the same of the first row block after those of this cluster.
  __device__ __forceinline__ int locate(int block, Layer& layer, int& end) const {
    int n0 = 0, before = 0;
#pragma unroll
    for (int i = 0; i < LAYERS; ++i) {
      if (block >= before) {
        layer = all[i];
        n0 = (first_of[i] + block - before) * ROWS;
        end = (first_of[i] + blocks_of[i]) * ROWS;
      }
      before += blocks_of[i];
    }
    return n0;
  }
  // The last row block of a layer ends with its last row: it may compute rows of the one before it a second time.
  static __device__ __forceinline__ int first_row(const Layer& layer, int n0) {
    return max(min(n0, layer.N - ROWS), 0);
  }
  __device__ __forceinline__ int row_of(const Layer& layer, int n0, int row) const {
    return n0 + (is_short ? min(row, layer.N - 1) : row);
  }
};

}  // namespace ternarize
