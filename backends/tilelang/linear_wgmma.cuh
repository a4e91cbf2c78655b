// y = x · Wᵀ + bias on wgmma, for any number of tokens, from the packed trits as they lie in memory
// (ternarize/packing.py, whose letters are used here). It computes yᵀ = W · xᵀ: the trits are decoded in registers,
// straight into the operand A, so no decoded weight is ever written to memory.
//
// Steps. One step along K is 32 packed bytes a row, 128 weights. In a group of 128 weights or more, byte c holds the
// weights c, c + q, c + 2q and c + 3q, q a quarter of the group, so the 32 bytes are four runs of 32 columns of x, q
// columns apart. The last bytes of a row may be fewer: TMA fills what lies beyond the row with zeros, which is the code
// of zero, and whatever columns of x they meet count nothing. Groups of 32 and 64 lie in 128 columns one after another.
//
// Work. A tile of y is BLOCK_N outputs x BLOCK_M tokens. One warpgroup loads, ahead by STAGES; the others each have 64
// ROW_TILES outputs of the tile. Blocks stay, and take tile after tile; of the tiles that are left when no full round
// is, each is split along K among the blocks of a cluster, which add up their sums in shared memory, in the order of
// their ranks: results are the same bits every run.
//
// Scales. bfloat16 holds T · 2^E for every E, so there 2^E is multiplied into the operand, and one sum runs over all of
// K. Where it does not fit the operand (float16, mantissas) the operand is the trit, and the sum of each group is scaled
// in float32, which takes twice the registers.
#include <stdint.h>

#include <type_traits>

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

// Register A of wgmma for 16 columns: j of the four that 16 packed bytes hold, from the bytes of a row and of the row 8
// below (``words``: [row][plane], the most significant trit first).
//
// In each 16 columns a thread has the pairs (2q, 2q + 1) and (2q + 8, 2q + 9), q its place in its quad. 16 packed bytes
// are four planes of 16 columns, so it needs the byte pairs 2q and 2q + 8. With their bytes dealt to the word
// (2q + 8, 2q, 2q + 9, 2q + 1), lowest first, the codes of a pair are 16 bits apart, and the code is a number once it
// lies in the top two bits of a 16-bit float: 00 is 0, 01 is 0x4000 = 2.0, 11 is 0xC000 = -2.0, in bfloat16 and in
// float16. So (word << shift) & 0xC000C000 is a register of A. Groups of 32 are 8 bytes of four planes of 8 columns:
// two planes make 16 columns, and the two byte pairs belong to two groups.
//
// scales: [row][byte pair], two bfloat16 each that are multiplied in if SCALED: 2^(E - 1), which takes back the 2.
template <typename Float, int GROUP, int PLANES, bool SCALED>
__device__ __forceinline__ void decode(const uint32_t (&words)[2][PLANES], const uint32_t (&scales)[2][2], int j,
                                       uint32_t* registers) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = r % 2, pair = GROUP == 32 ? j / 2 : r / 2, field = GROUP == 32 ? j % 2 * 2 + r / 2 : j;
    const int shift = (pair ? 14 : 6) - 2 * field;
    uint32_t level = (words[row][0] << shift) & 0xC000C000u;
#pragma unroll
    for (int p = 1; p < PLANES; ++p) level = three_times_plus<Float>(level, (words[row][p] << shift) & 0xC000C000u);
    registers[r] = SCALED ? multiply_bfloat16(level, scales[row][pair]) : level;
  }
}

// The exponents of four groups of a row, from a multiple of four on, loaded four groups before they are needed. Rows need
// not start at a whole word.
template <int G>
struct Exponents {
  static constexpr bool ALIGNED = G % 4 == 0;
  uint32_t window, low, next;
  uint32_t first;

  __device__ __forceinline__ uint32_t load(const int8_t* E, uint32_t N, uint32_t place) const {
    return __ldg(reinterpret_cast<const uint32_t*>(E) + min(place / 4, (N * G - 1) / 4));
  }
  __device__ __forceinline__ void start(const int8_t* E, uint32_t N, uint32_t row, uint32_t group) {
    first = min(row, N - 1) * G;
    const uint32_t place = first + group / 4 * 4;
    window = load(E, N, place);
    next = load(E, N, place + 4);
    if (!ALIGNED) {
      window = __funnelshift_r(window, next, first % 4 * 8);
      low = next;
      next = load(E, N, place + 8);
    }
  }
  // To the four groups from ``group`` on.
  __device__ __forceinline__ void advance(const int8_t* E, uint32_t N, uint32_t group) {
    window = ALIGNED ? next : __funnelshift_r(low, next, first % 4 * 8);
    low = next;
    next = load(E, N, first + group + (ALIGNED ? 4 : 8));
  }
  __device__ __forceinline__ int at(uint32_t group) const {
    return static_cast<int>(window << (24 - group % 4 * 8)) >> 24;
  }
};

// A mantissa of a row and group; groups past the last have the last one's.
template <int BYTES, int G>
__device__ __forceinline__ float mantissa_at(const void* E_mantissa, int N, int row, int group) {
  const int64_t place = static_cast<int64_t>(min(row, N - 1)) * G + min(group, G - 1);
  if constexpr (BYTES == 1) return __ldg(static_cast<const uint8_t*>(E_mantissa) + place);
  if constexpr (BYTES == 2) return __ldg(static_cast<const int16_t*>(E_mantissa) + place);
  if constexpr (BYTES == 4) return static_cast<float>(__ldg(static_cast<const int*>(E_mantissa) + place));
  return 1;
}

// Float: __nv_bfloat16 or __half, of x and y. GROUP_SIZE: weights a group. MANTISSA_BYTES: of an E_mantissa, or 0.
// The others: Tile of linear_wgmma.py.
template <typename Float, int K, int GROUP_SIZE, int PLANES, int MANTISSA_BYTES, bool GUARDED, int BLOCK_M,
          int ROW_TILES, int WARPGROUPS, int STAGES, int CLUSTER, int SHARED_BYTES, typename... Layers>
__device__ __forceinline__ void linear_wgmma(const CUtensorMap& x, int M, void* shared, Layers... given) {
  constexpr bool SCALED = std::is_same_v<Float, __nv_bfloat16> && MANTISSA_BYTES == 0;
  constexpr int GROUP = GROUP_SIZE >= 128 ? 128 : GROUP_SIZE;
  constexpr int GROUPS_PER_STEP = 128 / GROUP;
  constexpr int BLOCK_N = 64 * ROW_TILES * WARPGROUPS;
  constexpr int THREADS = 128 * WARPGROUPS;  // that compute
  constexpr int G = (K + GROUP_SIZE - 1) / GROUP_SIZE;

  // Steps of the whole groups, and of the last group if it is smaller.
  constexpr int WHOLE = K / GROUP_SIZE, TAIL = K % GROUP_SIZE;
  constexpr int STEPS_PER_GROUP = (GROUP_SIZE + 127) / 128;
  constexpr int STEPS = GROUP == 128 ? WHOLE * STEPS_PER_GROUP + (TAIL + 127) / 128 : (K + 127) / 128;
  static_assert(GROUP == 128 || TAIL == 0);
  // Columns of x in a row of shared memory: 64 where the 128 of a step are neighbours.
  constexpr int ROW_COLUMNS = GROUP_SIZE <= 128 && TAIL == 0 ? 64 : 32;

  // wgmma of 16 columns are issued in batches: while the tensor cores work on one, the operand of the next is decoded.
  // What they add to, if scales come after, is the sum of one group.
  constexpr int BATCH = SCALED ? 4 * ROW_TILES : GROUP == 32 ? 2 : 4;
  constexpr int BATCHES = 8 * ROW_TILES / BATCH;
  static_assert(BATCHES % 2 == 0);

  constexpr int X_BYTES = BLOCK_M * 256, ROW_BYTES = 32;
  constexpr int PACKED_BYTES = PLANES * BLOCK_N * ROW_BYTES, PLANE_BYTES = 64 * ROW_TILES * ROW_BYTES;
  constexpr int UNITS = ROW_TILES * BLOCK_M / 8;  // of 8 tokens and 64 outputs a warpgroup: 4 sums a thread
  // Of a tile that is split, those that a block adds up and stores; of small tiles the last ranks have none.
  constexpr int OWN = UNITS > CLUSTER ? UNITS / CLUSTER : 1;
  static_assert(UNITS % OWN == 0 && UNITS <= OWN * CLUSTER);
  // Units that are stored at once: 32 tokens, or as many as there are.
  constexpr int STORED = OWN % 4 == 0 && BLOCK_M % 32 == 0 ? 4 : OWN % 2 == 0 ? 2 : 1;
  constexpr int STORE_BYTES = STORED * 8 * 128;

  uint8_t* const s_x = static_cast<uint8_t*>(shared);
  uint8_t* const s_packed = s_x + STAGES * X_BYTES;
  uint8_t* const s_y = s_packed + STAGES * PACKED_BYTES;  // [warpgroup][2]
  uint64_t* const full = reinterpret_cast<uint64_t*>(s_y + WARPGROUPS * 2 * STORE_BYTES);
  uint64_t* const empty = full + STAGES;
  static_assert(STAGES * (X_BYTES + PACKED_BYTES + 16) + WARPGROUPS * 2 * STORE_BYTES <= SHARED_BYTES);
  // The sums of a tile that is split, once its stages are free: [rank][unit][thread].
  float4* const s_parts = static_cast<float4*>(shared);
  static_assert(CLUSTER == 1 || CLUSTER * OWN * THREADS * 16 <= STAGES * (X_BYTES + PACKED_BYTES));

  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  const int warp = thread / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 4 * WARPGROUPS);
    }
    barriers_ready();
  }
  __syncthreads();

  // Tiles: those of PANEL blocks of tokens go together, so that what they share of x and W is read from the cache.
  const Layer layers[] = {given...};
  constexpr int LAYERS = sizeof...(Layers), PANEL = 8;
  int blocks_n = 0;
#pragma unroll
  for (int i = 0; i < LAYERS; ++i) blocks_n += (layers[i].N + BLOCK_N - 1) / BLOCK_N;
  const int blocks_m = (M + BLOCK_M - 1) / BLOCK_M, tiles = blocks_n * blocks_m;

  struct Work {
    Layer layer;
    int n0, m0, first, last;  // steps
    bool split;
  };
  const int blocks = clusters * CLUSTER;
  int rounds = tiles / blocks;
  if (tiles - rounds * blocks > (CLUSTER - 1) * clusters) ++rounds;
  auto work_at = [&](int item, Work& work) {
    work.split = CLUSTER > 1 && item >= rounds;
    const int tile = work.split ? rounds * blocks + (item - rounds) * clusters + cluster
                                : item * blocks + cluster * CLUSTER + rank;
    if (tile >= tiles) return false;
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
  };

  // Of a thread that computes and of one that loads; together no more than all have at launch, 168, 128 or 96 each.
  constexpr int REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
  constexpr int LOADER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static_assert(WARPGROUPS >= 2 && WARPGROUPS <= 4);

  auto group_of = [](int step) { return GROUP == 128 ? step / STEPS_PER_GROUP : step * GROUPS_PER_STEP; };

  int stage = 0;
  uint32_t phase = 0;
  auto advance = [&] {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == WARPGROUPS) {
    give_registers<LOADER_REGISTERS>();
    Work work;
    for (int item = 0; work_at(item, work); ++item) {
      if (warp == 0 && lane == 0) {
        auto load_packed = [&](int step) {
          barrier_expect(full + stage, X_BYTES + PACKED_BYTES);
#pragma unroll
          for (int i = 0; i < WARPGROUPS; ++i) {
            uint8_t* const to = s_packed + stage * PACKED_BYTES + i * PLANES * PLANE_BYTES;
            const int n = work.n0 + i * 64 * ROW_TILES;
            if (PLANES == 1)
              load_box(to, work.layer.T_packed, step * ROW_BYTES, n, full + stage);
            else
              load_box_of_planes(to, work.layer.T_packed, step * ROW_BYTES, n, full + stage);
          }
        };
        auto load_x = [&](int step) {
          const int group = step / STEPS_PER_GROUP;
          // Columns from run to run.
          const int quarter = ((TAIL == 0 || group < WHOLE ? GROUP_SIZE : TAIL) + 3) / 4;
          const int column = GROUP == 128 ? group * GROUP_SIZE + step % STEPS_PER_GROUP * 32 : step * 128;
#pragma unroll
          for (int i = 0; i < 128 / ROW_COLUMNS; ++i)
            load_box(s_x + stage * X_BYTES + i * BLOCK_M * ROW_COLUMNS * 2, &x,
                     column + (ROW_COLUMNS == 64 ? 64 : quarter) * i, work.m0, full + stage);
        };
        int step = work.first;
        if (item == 0) {
          // Weights are constants: their first loads need not wait for the kernel that writes x.
          const int ahead = min(STAGES, work.last - work.first);
          for (int i = 0; i < ahead; ++i, advance()) load_packed(step + i);
          wait_for_previous_kernel();
          stage = 0;
          phase = 0;
          for (int i = 0; i < ahead; ++i, advance()) load_x(step + i);
          step += ahead;
        }
        for (; step < work.last; ++step, advance()) {
          barrier_wait(empty + stage, phase ^ 1);
          load_packed(step);
          load_x(step);
        }
      }
      __syncwarp();
      if (work.split) {
        cluster_arrive();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
        __syncthreads();
      }
    }
    return;
  }

  take_registers<REGISTERS>();
  // Rows row and row + 8 of each of its 64; 16 bytes are swapped in every other four rows.
  const int row = warp * 16 + lane / 4;
  const int row0 = warpgroup * ROW_TILES * 64 + row;
  const int swizzle = lane / 16 * 16;
  int stores = 0;

  Work work;
  for (int item = 0; work_at(item, work); ++item) {
    float sums[ROW_TILES][BLOCK_M / 2] = {};
    Exponents<G> exponents[ROW_TILES][2];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        exponents[t][half].start(work.layer.E, work.layer.N, work.n0 + row0 + t * 64 + half * 8, group_of(work.first));

    int previous = -1;
    for (int step = work.first; step < work.last; ++step, advance()) {
      const int group = group_of(step);
      if (group % 4 == 0 && (GROUP != 128 || step % STEPS_PER_GROUP == 0) && step > work.first) {
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
              mantissas[t][half][i] = mantissa_at<MANTISSA_BYTES, G>(
                  work.layer.E_mantissa, work.layer.N, work.n0 + row0 + t * 64 + half * 8, group + i);

      barrier_wait(full + stage, phase);
      const uint8_t* const packed =
          s_packed + stage * PACKED_BYTES + warpgroup * PLANES * PLANE_BYTES + row * ROW_BYTES + lane % 4 * 2;
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
                  packed + p * PLANE_BYTES + (t * 64 + half * 8) * ROW_BYTES + ((i * 16) ^ swizzle);
              words[t][i][half][p] = __byte_perm(*reinterpret_cast<const uint16_t*>(bytes),
                                                 *reinterpret_cast<const uint16_t*>(bytes + 8), 0x1504);
            }

      // Sums of groups that are not scaled yet, of two batches in turn.
      float group_sums[2][SCALED ? 1 : BLOCK_M / 2];
      auto add_group = [&](int batch) {
        const int t = batch * BATCH / 8, i = batch * BATCH / 4 % 2;
        const int index = GROUP == 128 ? 0 : GROUP == 64 ? i : 2 * i + batch * BATCH / 2 % 2;
        float scales[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scales[half] = half_scale(exponents[t][half].at(group + index));
          if (MANTISSA_BYTES != 0) scales[half] *= mantissas[t][half][index];
        }
        if constexpr (!SCALED) {
          keep(group_sums[batch % 2]);
#pragma unroll
          for (int k = 0; k < BLOCK_M / 2; ++k) sums[t][k] += scales[k / 2 % 2] * group_sums[batch % 2][k];
        }
      };

      const uint64_t descriptor = matrix_descriptor<ROW_COLUMNS>(s_x + stage * X_BYTES);
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
          const int bytes = column / ROW_COLUMNS * (BLOCK_M * ROW_COLUMNS * 2) + column % ROW_COLUMNS * 2;
          wgmma<Float, BLOCK_M>(to, a + b * 4, descriptor + bytes / 16, SCALED || b > 0);
        }
        wgmma_commit();
        if (SCALED || batch > 0) wgmma_wait<1>();
        if (!SCALED && batch > 0) add_group(batch - 1);
        if (SCALED && batch == 0 && previous >= 0 && lane == 0) barrier_arrive(empty + previous);
      }
      if (!SCALED) {
        wgmma_wait<0>();
        add_group(BATCHES - 1);
        if (lane == 0) barrier_arrive(empty + stage);
      }
      previous = stage;
    }
    if (SCALED) {
      wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) keep(sums[t]);
      if (previous >= 0 && lane == 0) barrier_arrive(empty + previous);
    }

    // Rounds ``count`` units, from first_unit on, and stores them. A thread has the outputs row and row + 8 of pairs of
    // tokens.
    auto store_units = [&](auto&& value, int first_unit, auto count) {
      constexpr int COUNT = decltype(count)::value;
#pragma unroll
      for (int c = 0; c < COUNT / STORED; ++c) {
        const int unit = first_unit + c * STORED;
        const int t = unit / (BLOCK_M / 8), m = work.m0 + unit % (BLOCK_M / 8) * 8;
        const int n = work.n0 + (warpgroup * ROW_TILES + t) * 64;
        uint8_t* const buffer = s_y + (warpgroup * 2 + stores++ % 2) * STORE_BYTES;
        float bias[2] = {};
        if (work.layer.bias != nullptr) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            bias[half] = bias_value(work.layer.bias[min(n + row + half * 8, work.layer.N - 1)],
                                    *work.layer.bias_exponent);
        }
        // The store before this one may be reading the other buffer. If this is none of TMA, that one may be the last
        // group even when this buffer's turn comes again, so it ends here.
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
            matrices[k] = rounded_pair<Float>(value(i) + bias[k % 2], value(i + 1) + bias[k % 2]);
            finite &= is_finite_pair<Float>(matrices[k]);
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
    };

    if (work.split) {
      // Every block of the cluster is through with its stages.
      cluster_arrive();
      cluster_wait();
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit)
        store_to_rank(s_parts + (rank * OWN + unit % OWN) * THREADS + threadIdx.x, unit / OWN,
                      sums[unit / (BLOCK_M / 8)] + unit % (BLOCK_M / 8) * 4);
      cluster_arrive();
      cluster_wait();
      float own[OWN * 4];
#pragma unroll
      for (int unit = 0; unit < OWN; ++unit) {
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < CLUSTER; ++r) {
          const float4 part = s_parts[(r * OWN + unit) * THREADS + threadIdx.x];
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
        store_units([&](int i) { return own[i]; }, rank * OWN, std::integral_constant<int, OWN>());
    } else {
      store_units([&](int i) { return sums[i / (BLOCK_M / 2)][i % (BLOCK_M / 2)]; }, 0,
                  std::integral_constant<int, UNITS>());
    }
  }
  if (thread == 0) stores_read<0>();
}

}  // namespace ternarize
