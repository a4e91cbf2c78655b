// y = x · Wᵀ + bias for a few tokens on Hopper, from the packed trits as they lie in memory (ternarize/packing.py).
//
// For a few tokens, reading the weight is all the time, so all is arranged for many bytes in flight, whole cache lines,
// and few instructions a trit. Letters as in ternarize/packing.py.
//
// A chunk is 32 packed bytes of a row, four planes of 32 weights each; a step is 4 chunks, one line of 128 bytes. Every
// warp copies its lines into a ring in shared memory, STAGES steps ahead, and no other warp waits for them.
//
// Fragments. In mma.m16n8k16, where W is the operand A, the four lanes of a quad share a row, and each has four of the
// 16 columns. The sum over k may run in any order, as long as x is read in the same one, so the order is chosen for the
// bytes to need no shuffle. Of groups of 128 and more, lane q of a quad has bytes 8q .. 8q + 7 of a chunk, as the words
// (w0, w1), and the column pairs that it has in one mma are
//     bytes 8q + b and 8q + b + 2 (of w0),  bytes 8q + b + 4 and 8q + b + 6 (of w1),  b = 0 or 1,
// all of one plane j of the byte. Their codes are 16 bits apart in a word, and the code is a number once it lies in the
// top two bits of a 16-bit float: 00 is 0, 01 is 0x4000 = 2.0, 11 is 0xC000 = -2.0. So
//     (w << shift) & 0xC000C000
// is a register of A: one shift and one AND for two trits. The factor 2 is taken back by the scale, 2^(E - 1). A chunk
// of two groups of 64 is two words of a lane, one of each group, and b tells the groups apart.
//
// Activations in int8 take mma.m16n8k32, which has four trits a register: 64 T, the code in the top two bits of a byte.
// Their scale, one a token, goes onto the finished sum. They come rounded, or as floats that are rounded here
// (linear_decode_round.cuh). Floats of one or two tokens take it too, as three digits in base 256 (linear_decode_x.cuh),
// if there are many rows: the mma has eight columns anyway, and to make operands of trits is most of the work.
//
// Work. A thread block cluster owns consecutive row blocks. K is split over its blocks, and within a block over its
// K_WARPS, each of which keeps its accumulators until its part of K is summed and leaves them in the shared memory of
// the block that will add the parts, in an order that does not depend on time: results are the same bits every run.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

constexpr int LINE_BYTES = 128;  // of a row and a step

// Arguments: x [M, K] of X, scale float32 [M] of x in int8 and null otherwise, and the layers; x, T_packed, E,
// E_mantissa and norm_weight 16-byte aligned, M from 1 to TOKENS, K a multiple of 64. ``shared``:
// DecodeTile.shared_bytes (linear_decode.py).
//
// Y: __nv_bfloat16 or __half. X: the same, or int8_t. TOKENS: 1, 2, 4, 8 or 16. TILES: mma tiles of 16 rows in a row
// block. STAGES, WARPS, K_WARPS, CLUSTER: above. CLUSTERS: how many clusters there are. DIGITS: of floats, 3, 1 if they
// are rounded to int8, or 0 if they are multiplied as they are. GROUP: 64, a multiple of 128, or K. PLANES,
// MANTISSA_BYTES: trit planes and bytes of an E_mantissa, for int8 and digits 1 and 0.
template <typename X, typename Y, int TOKENS, int TILES, int STAGES, int WARPS, int K_WARPS, int CLUSTER, int CLUSTERS,
          int DIGITS, int K, int GROUP, int PLANES, int MANTISSA_BYTES, bool GUARDED, typename... Layers>
__device__ __forceinline__ void linear_decode(const void* x, const void* scale, void* shared, int M, Fused fused,
                                              Layers... layers) {
  constexpr int ROWS = 16 * TILES;
  using Inputs = Activations<X, DIGITS, TOKENS, K, GROUP>;
  constexpr int COLUMN_TILES = Inputs::COLUMN_TILES;
  constexpr int ROW_BYTES = K / 4;
  constexpr int STEPS = (ROW_BYTES + LINE_BYTES - 1) / LINE_BYTES;
  constexpr int ROW_WARPS = WARPS / K_WARPS;
  constexpr int PARTS = CLUSTER * K_WARPS;
  // Parts of sums that a lane leaves of a row block: its accumulators, of which those of a token's digits are added up.
  constexpr int VALUES = TILES * (DIGITS == 3 ? 2 : COLUMN_TILES * 4);
  using Exponents = GroupValues<1, K, GROUP>;
  using Mantissas = GroupValues<MANTISSA_BYTES ? MANTISSA_BYTES : 4, K, GROUP>;
  constexpr int SCALES = Exponents::PER_CHUNK;
  constexpr int E_AT = PLANES * ROWS * LINE_BYTES;
  constexpr int MANTISSA_AT = E_AT + ROWS * Exponents::WORDS * 4;
  constexpr int STAGE_BYTES = MANTISSA_AT + (MANTISSA_BYTES ? ROWS * Mantissas::WORDS * 4 : 0);
  // Of the operands of mma; and of x, with a scale a token.
  constexpr bool INT8 = DIGITS != 0 || std::is_same_v<X, int8_t>, INT8_X = INT8 && DIGITS != 3;
  using Accumulator = std::conditional_t<INT8, int, float>;
  static_assert(STEPS >= PARTS && K % 64 == 0 && (!INT8 || (PLANES == 1 && MANTISSA_BYTES == 0)));
  static_assert(!INT8_X || K < 1 << 17);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_in_tile = lane / 4, quad_lane = lane % 4;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER;
  const int row_warp = warp / K_WARPS, part = rank * K_WARPS + warp % K_WARPS;

  constexpr int LAYERS = sizeof...(Layers);
  const bool gated = LAYERS == 2 && fused.has(Fused::GATED);
  const RowBlocks<ROWS, CLUSTERS, LAYERS> row_blocks(cluster, gated, layers...);
  const int blocks = row_blocks.blocks;
  const int first_step = part * STEPS / PARTS;
  const int steps = (part + 1) * STEPS / PARTS - first_step;
  // The steps of K that this block's warps share out.
  const int block_step = rank * K_WARPS * STEPS / PARTS;
  const int block_steps = (rank + 1) * K_WARPS * STEPS / PARTS - block_step;

  let_next_kernel_start();
  if (CLUSTER > 1) cluster_started();

  // The ring of this warp, and what it copies next: a row block, counted within the cluster, and a step of its part.
  // The next row block is most often of the same layer.
  uint8_t* const ring = static_cast<uint8_t*>(shared) + warp * STAGES * STAGE_BYTES;
  int load_block = row_warp, load_step = 0, load_n0 = 0, load_end = 0;
  Layer load_layer;
  if (load_block < blocks) load_n0 = row_blocks.locate(load_block, load_layer, load_end);
  // A lane copies 16 bytes of every fourth row. The halves of a row's 8 pieces lie where the mma reads them without
  // bank conflicts: chunk c of row r at c ^ (r % 4).
  const int piece = lane % 8, copy_row = lane / 8;
  const int copy_at = copy_row * LINE_BYTES + (piece / 2 ^ copy_row) * 32 + piece % 2 * 16;
  auto copy = [&](int stage) {
    if (load_block < blocks) {
      uint8_t* const to = ring + stage * STAGE_BYTES;
      const int step = first_step + load_step;
      const int byte = step * LINE_BYTES + piece * 16;
      const bool past_end = ROW_BYTES % LINE_BYTES != 0 && byte >= ROW_BYTES;
      const int n0 = row_blocks.first_row(load_layer, load_n0);
      const int64_t n = n0 + copy_row;
      const uint8_t* const from = load_layer.T_packed + n * ROW_BYTES + (past_end ? 0 : byte);
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
        for (int row = 0; row < ROWS; row += 4) {
          const int64_t rows = static_cast<int64_t>(plane) * load_layer.N +
                               (row_blocks.is_short ? row_blocks.row_of(load_layer, n0, row + copy_row) - n : row);
          copy_16_async(to + (plane * ROWS + row) * LINE_BYTES + copy_at, from + rows * ROW_BYTES, past_end);
        }
#pragma unroll
      for (int i = lane; i < ROWS * Exponents::WORDS; i += 32)
        Exponents::copy_async(to + E_AT, i % ROWS, row_blocks.row_of(load_layer, n0, i % ROWS), step, i / ROWS,
                              load_layer.E, load_layer.N);
      if constexpr (MANTISSA_BYTES != 0)
#pragma unroll
        for (int i = lane; i < ROWS * Mantissas::WORDS; i += 32)
          Mantissas::copy_async(to + MANTISSA_AT, i % ROWS, row_blocks.row_of(load_layer, n0, i % ROWS), step, i / ROWS,
                                load_layer.E_mantissa, load_layer.N);
      if (++load_step == steps) {
        load_step = 0;
        load_block += ROW_WARPS;
        load_n0 += ROW_WARPS * ROWS;
        if (load_n0 >= load_end && load_block < blocks) load_n0 = row_blocks.locate(load_block, load_layer, load_end);
      }
    }
    commit_copies();
  };

  // Weights are constants, so their first copies need not wait for the kernel that writes x. Those of a norm come first:
  // they are the first that are needed.
  const Inputs inputs{static_cast<const X*>(x), M};
  using Norm = RootMeanSquare<Inputs, WARPS>;
  const bool normalise = CLUSTER == 1 && fused.has(Fused::NORM);
  Norm norm;
  if (normalise) norm.load_weight(static_cast<const X*>(fused.norm_weight));
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) copy(stage);
  wait_for_previous_kernel();

  // This block's part of x; the scales of what it rounds; and the parts of the sums of the row blocks that it forms:
  // [slot][part][value][lane].
  uint8_t* const s_x = static_cast<uint8_t*>(shared) + WARPS * STAGES * STAGE_BYTES;
  constexpr int MOST_CHUNKS = (STEPS + CLUSTER - 1) / CLUSTER * CHUNKS;
  using Scales = TokenScales<X, TOKENS, WARPS>;
  const Scales token_scales{reinterpret_cast<float*>(s_x + MOST_CHUNKS * Inputs::CHUNK_BYTES)};
  float* const s_parts = token_scales.scales + (Inputs::ROUNDS ? Scales::BYTES / 4 : 0);
  static_assert(PARTS * VALUES * 32 >= WARPS * TOKENS);

  // y of this block: row blocks rank, rank + CLUSTER, ... of the cluster, of gated layers of the first one.
  const int my_blocks = ((gated ? blocks / 2 : blocks) - rank + CLUSTER - 1) / CLUSTER;
  auto output = [&](int i, Layer& layer, int& n, int& m) {
    int end;
    const int n0 = row_blocks.locate(i / (ROWS * TOKENS) * CLUSTER + rank, layer, end);
    n = row_blocks.first_row(layer, n0) + i % ROWS;
    m = i / ROWS % TOKENS;
    return i < my_blocks * ROWS * TOKENS && m < M && !(row_blocks.is_short && n >= layer.N);
  };
  const bool adds = LAYERS == 1 && fused.has(Fused::RESIDUAL);
  auto residual_of = [&](int n, int m) {
    return static_cast<const Y*>(fused.residual)[static_cast<int64_t>(m) * row_blocks.all[0].N + n];
  };

  if (normalise) {
    norm.stage(inputs, s_x, s_parts, fused.norm_eps, token_scales);
  } else {
    float factor = 0;
    if constexpr (Inputs::ROUNDS) factor = token_scales.set(inputs.template largest_of<WARPS * 32>(STEPS * CHUNKS));
    inputs.template stage<WARPS * 32>(s_x, block_step * CHUNKS, block_steps * CHUNKS, factor);
  }
  if (CLUSTER > 1) cluster_wait();
  __syncthreads();

  // Of the first output of this thread, which it thus need not wait for at the end.
  Y residual = rounded<Y>(0);
  if (adds) {
    Layer layer;
    int n, m;
    if (output(threadIdx.x, layer, n, m)) residual = residual_of(n, m);
  }

  // Where in a row's line this lane's bytes of each chunk lie.
  int line_at[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    line_at[c] = row_in_tile * LINE_BYTES + (c ^ row_in_tile % 4) * 32 + quad_lane * (SCALES == 1 ? 8 : 4);

  int stage = 0;
  const int part_chunk = (first_step - block_step) * CHUNKS;
  for (int block = row_warp; block < blocks; block += ROW_WARPS) {
    Layer here;
    int end;
    const int first_n0 = row_blocks.locate(block, here, end), n0 = row_blocks.first_row(here, first_n0);
    float sum[TILES][COLUMN_TILES][4] = {};
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<STAGES - 1>();
      __syncwarp();
      const uint8_t* const from = ring + stage * STAGE_BYTES;
      uint2 words[PLANES][TILES][2][CHUNKS];
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
              const uint8_t* const at =
                  from + (plane * ROWS + tile * 16 + half * 8) * LINE_BYTES + line_at[c];
              words[plane][tile][half][c] =
                  SCALES == 1
                      ? *reinterpret_cast<const uint2*>(at)
                      : uint2{*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 16)};
            }
      // Lane q of a quad has the scales of chunk q.
      float scales[TILES][2][SCALES];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int s = 0; s < SCALES; ++s) {
            const int row = tile * 16 + half * 8 + row_in_tile, n = row_blocks.row_of(here, n0, row);
            const int group = quad_lane * SCALES + s;
            const int E = static_cast<int8_t>(Exponents::read(from + E_AT, row, n, first_step + step, group));
            scales[tile][half][s] = INT8_X ? int8_scale(E) : INT8 ? exp2_int(E) : half_scale(E);
            if constexpr (MANTISSA_BYTES != 0) {
              const int mantissa = Mantissas::read(from + MANTISSA_AT, row, n, first_step + step, group);
              scales[tile][half][s] *= static_cast<float>(mantissa);
            }
          }
      __syncwarp();
      copy(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;

#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int chunk = part_chunk + step * CHUNKS + c;
        const uint8_t* const x_chunk = s_x + chunk * Inputs::CHUNK_BYTES + quad_lane * 16;
        // What the digits of this lane's columns stand for.
        float units[COLUMN_TILES][2];
        if constexpr (DIGITS == 3)
#pragma unroll
          for (int t = 0; t < COLUMN_TILES; ++t) {
            const float2 of_tile = *reinterpret_cast<const float2*>(s_x + chunk * Inputs::CHUNK_BYTES +
                                                                    Inputs::UNITS_AT + (t * 8 + quad_lane * 2) * 4);
            units[t][0] = of_tile.x;
            units[t][1] = of_tile.y;
          }
        Accumulator group_sum[SCALES][TILES][COLUMN_TILES][4];
#pragma unroll
        for (int i = 0; i < SCALES * TILES * COLUMN_TILES * 4; ++i)
          group_sum[i / (TILES * COLUMN_TILES * 4)][i / (COLUMN_TILES * 4) % TILES][i / 4 % COLUMN_TILES][i % 4] =
              ORIGIN<Accumulator>;
        // Of int8 and groups of 64, planes 0 and 1 stand for two mma of the first group, with two planes each.
#pragma unroll
        for (int plane = 0; plane < 4; ++plane) {
          uint4 x_fragment[COLUMN_TILES];
#pragma unroll
          for (int t = 0; t < COLUMN_TILES; ++t) {
            // Columns of B past the last repeat it; nobody reads their sums.
            const int column = min(t * 8 + row_in_tile, Inputs::COLUMNS - 1);
            x_fragment[t] =
                *reinterpret_cast<const uint4*>(x_chunk + ((INT8 ? plane / 2 : plane) * Inputs::COLUMNS + column) * 64);
          }
#pragma unroll
          for (int b = 0; b < (INT8 ? 1 : 2); ++b)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
              uint32_t a[4];
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                // Registers 0 and 1 are of the first column pair, rows r and r + 8; 2 and 3 of the second.
                const bool second_word = SCALES == 1 ? r / 2 : INT8 ? plane / 2 : b;
                const int shift = INT8 ? 6 - 2 * (SCALES == 1 ? plane : plane % 2 * 2 + r / 2)
                                       : 14 - 8 * (SCALES == 1 ? b : r / 2) - 2 * plane;
#pragma unroll
                for (int p = 0; p < PLANES; ++p) {
                  const uint2 w = words[p][tile][r % 2][c];
                  const uint32_t trits = ((second_word ? w.y : w.x) << shift) & (INT8 ? 0xC0C0C0C0u : 0xC000C000u);
                  if (p == 0)
                    a[r] = trits;
                  else if constexpr (PLANES > 1)
                    a[r] = three_times_plus<X>(a[r], trits);
                }
              }
#pragma unroll
              for (int t = 0; t < COLUMN_TILES; ++t) {
                const uint4 v = x_fragment[t];
                const bool upper = INT8 ? plane % 2 : b;
                Accumulator(&d)[4] = group_sum[SCALES == 1 ? 0 : INT8 ? plane / 2 : b][tile][t];
                if constexpr (INT8)
                  mma(d, a, upper ? v.z : v.x, upper ? v.w : v.y);
                else
                  mma<X>(d, a, upper ? v.z : v.x, upper ? v.w : v.y);
              }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int s = 0; s < SCALES; ++s) {
              const float group_scale = __shfl_sync(0xFFFFFFFF, scales[tile][half][s], c, 4);
#pragma unroll
              for (int t = 0; t < COLUMN_TILES; ++t)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                  // A unit first: alone the scale may lead out of range.
                  const float value = group_value(group_sum[s][tile][t][i]);
                  sum[tile][t][i] += group_scale * (DIGITS == 3 ? value * units[t][i % 2] : value);
                }
            }
      }
    }
    // Of gated layers the second one's row blocks have the slots after those of the first.
    const int pair = gated && block >= blocks / 2 ? block - blocks / 2 : block;
    const int slot = pair / CLUSTER + (pair == block ? 0 : (blocks / 2 - pair % CLUSTER + CLUSTER - 1) / CLUSTER);
    float* const parts = s_parts + (slot * PARTS + part) * VALUES * 32 + lane;
#pragma unroll
    for (int value = 0; value < VALUES; ++value) {
      float v;
      if constexpr (DIGITS == 3) {
        // Of a quad, lane 0 has columns 0 and 1, lane 1 columns 2 and 3: token 0 is the first three, and ends up in lane
        // 0; token 1 is the next three, and ends up in lane 2.
        const float even = sum[value / 2][0][value % 2 * 2], odd = sum[value / 2][0][value % 2 * 2 + 1];
        float rest = __shfl_sync(0xFFFFFFFF, even, 1, 4);
        if constexpr (TOKENS == 2) {
          const float of_second = __shfl_sync(0xFFFFFFFF, odd, 1, 4);
          if (quad_lane == 2) rest = of_second;
        }
        v = even + odd + rest;
      } else {
        v = sum[value / (COLUMN_TILES * 4)][value / 4 % COLUMN_TILES][value % 4];
      }
      if (CLUSTER > 1)
        store_to_rank(parts + value * 32, pair % CLUSTER, v);
      else
        parts[value * 32] = v;
    }
  }
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  // y in float32, of a row of a row block, whose parts are in a slot.
  auto finish = [&](int slot, int row, const Layer& here, int n, int m) {
    const int half = row / 8 % 2;
    const int value = DIGITS == 3 ? row / 16 * 2 + half : (row / 16 * COLUMN_TILES + m / 8) * 4 + half * 2 + m % 2;
    const int quad = DIGITS == 3 ? m * 2 : m % 8 / 2;
    const float* const parts = s_parts + (slot * PARTS * VALUES + value) * 32 + row % 8 * 4 + quad;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) sum += parts[p * VALUES * 32];
    // In float64, which neither 2^INT8_SHIFT nor the scale leads out of range.
    if constexpr (INT8_X) {
      const float of_token = Inputs::ROUNDS ? token_scales.scales[m] : load_scale(static_cast<const float*>(scale) + m);
      sum = static_cast<float>(static_cast<double>(sum) * (1 << INT8_SHIFT) * of_token);
    }
    if (here.bias != nullptr) sum += bias_value(here.bias[n], *here.bias_exponent);
    if (GUARDED && !isfinite(static_cast<float>(rounded<Y>(sum)))) report_nonfinite(here.status);
    return sum;
  };
  for (int i = threadIdx.x; i < my_blocks * ROWS * TOKENS; i += WARPS * 32) {
    Layer here;
    int n, m;
    if (!output(i, here, n, m)) continue;
    const int slot = i / (ROWS * TOKENS), row = i % ROWS;
    float y = finish(slot, row, here, n, m);
    if (gated) y = y / (1 + expf(-y)) * finish(my_blocks + slot, row, row_blocks.all[LAYERS - 1], n, m);
    if (adds) y += static_cast<float>(i == threadIdx.x ? residual : residual_of(n, m));
    static_cast<Y*>(here.y)[static_cast<int64_t>(m) * here.N + n] = rounded<Y>(y);
  }
}

}  // namespace ternarize
