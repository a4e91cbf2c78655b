// y = x · Wᵀ + bias on wgmma, for any number of tokens, from the packed trits as they lie in memory
// (ternarize/packing.py, whose letters are used here). It computes yᵀ = W · xᵀ: the trits are decoded in registers,
// straight into the operand A, so no decoded weight is ever written to memory.
//
// Steps. One step along K is 32 packed bytes a row, 128 weights. In a group of 128 weights or more, byte c holds the
// weights c, c + q, c + 2q and c + 3q, q a quarter of the group, so the 32 bytes are four slices of 32 columns of x, q
// columns apart. The last bytes of a row may be fewer: TMA fills what lies beyond the row with zeros, which is the code
// of zero, and whatever columns of x they meet count nothing. Groups of 32 and 64 lie in 128 columns one after another.
//
// Work. A tile of y is BLOCK_N outputs x BLOCK_M tokens. One warpgroup loads, ahead by STAGES; the others each have 64
// ROW_TILES outputs of the tile. Blocks stay, and take tile after tile; of the tiles that are left when no full round
// is, each is split along K among the blocks of a cluster, which add up their sums in shared memory, in the order of
// their ranks: results are the same bits every run.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <tl_templates/cuda/instruction/wgmma.h>

namespace ternarize {

// Primitives.

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, int plane,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(plane), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(shared_address(from))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but PENDING stores have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// What ordinary stores wrote to shared memory can be read by TMA, after a barrier among the threads that wrote.
__device__ __forceinline__ void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_to_rank(float4* place, int rank, const float* value) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value[0]), "f"(value[1]),
               "f"(value[2]), "f"(value[3])
               : "memory");
}

// Stores four 8 x 8 matrices of 16-bit values transposed; lane i has the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(const void* row, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing that computes the registers moves behind this, nothing that reads them before.
template <int COUNT>
__device__ __forceinline__ void keep(uint32_t (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void keep(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Programmatic dependent launch; no effect if the launch does not ask for it.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// 2^exponent for exponents from -126 to 127.
__device__ __forceinline__ float exp2_int(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Arithmetic of pairs of the 16-bit operands.
struct BFloat16 {
  static constexpr tl::DataType WGMMA = tl::DataType::kBFloat16;
  static constexpr uint32_t THREE = 0x40404040u;

  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
};

struct Float16 {
  static constexpr tl::DataType WGMMA = tl::DataType::kFloat16;
  static constexpr uint32_t THREE = 0x42004200u;

  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
};

// The layers of a call. Pointers are null where a layer has no such tensor.
struct Layer {
  const CUtensorMap* T_packed;  // boxes of 32 bytes x BLOCK_N rows, swizzled by 32 bytes
  const CUtensorMap* y;         // boxes of 64 outputs x STORE_TOKENS tokens, swizzled by 128 bytes
  const int8_t* E;
  const int* bias;
  const int8_t* bias_exponent;
  int N;
};

__device__ __forceinline__ Layer layer(const CUtensorMap& T_packed, const CUtensorMap& y, const void* E, int N,
                                       const void* bias = nullptr, const void* bias_exponent = nullptr) {
  return {&T_packed,
          &y,
          static_cast<const int8_t*>(E),
          static_cast<const int*>(bias),
          static_cast<const int8_t*>(bias_exponent),
          N};
}

// The operand A of four wgmma of 16 columns, from 16 packed bytes of a row (``half`` 0) and of the row 8 below (1).
//
// In each 16 columns a thread has the pairs (2q, 2q + 1) and (2q + 8, 2q + 9), q its place in its quad. 16 packed bytes
// are four planes of 16 columns, so it needs the byte pairs 2q and 2q + 8. With their bytes dealt to the word
// (2q + 8, 2q, 2q + 9, 2q + 1), lowest first, the codes of a pair are 16 bits apart, and the code is a number once it
// lies in the top two bits of a 16-bit float: 00 is 0, 01 is 0x4000 = 2.0, 11 is 0xC000 = -2.0, in bfloat16 and in
// float16. So (word << shift) & 0xC000C000 is a register of A. Groups of 32 are 8 bytes of four planes of 8 columns:
// two planes make 16 columns, and the two byte pairs belong to two groups.
//
// scale: 2^(E - 1) for each of the two byte pairs, which takes back the factor 2. words: [plane], the most significant
// trit first.
template <class Operand, int GROUP, int PLANES, bool SCALED>
__device__ __forceinline__ void decode(const uint32_t (&words)[PLANES], const uint32_t (&scale)[2], int half,
                                       uint32_t* registers) {
  auto value = [&](int pair, int field) {
    const int shift = (pair ? 14 : 6) - 2 * field;
    uint32_t level = (words[0] << shift) & 0xC000C000u;
#pragma unroll
    for (int p = 1; p < PLANES; ++p)
      level = Operand::multiply_add(level, Operand::THREE, (words[p] << shift) & 0xC000C000u);
    return SCALED ? Operand::multiply(level, scale[pair]) : level;
  };
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    registers[j * 4 + half] = GROUP == 32 ? value(j / 2, j % 2 * 2) : value(0, j);
    registers[j * 4 + 2 + half] = GROUP == 32 ? value(j / 2, j % 2 * 2 + 1) : value(1, j);
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
  __device__ __forceinline__ int at(uint32_t group) const { return static_cast<int>(window << (24 - group % 4 * 8)) >> 24; }
};

// The kernel.

// OPERAND: BFloat16 or Float16. GROUP: 32, 64, or 128 for all larger ones. g: weights a group. SLICE: columns of x a
// row of shared memory, 32 or 64.
template <class Operand, int K, int g, int PLANES, int BLOCK_M, int ROW_TILES, int WARPGROUPS, int STAGES, int CLUSTER,
          int SLICE, int SHARED_BYTES, class... Layers>
__device__ __forceinline__ void linear_wgmma(const CUtensorMap& x, int M, void* shared, Layers... given) {
  constexpr bool SCALED = true;
  constexpr int GROUP = g >= 128 ? 128 : g;
  constexpr int BLOCK_N = 64 * ROW_TILES * WARPGROUPS;
  constexpr int THREADS = 128 * WARPGROUPS;  // that compute
  constexpr int G = (K + g - 1) / g;

  // Steps of the whole groups, and of the last group if it is smaller.
  constexpr int WHOLE = K / g, TAIL = K % g;
  constexpr int STEPS_PER_GROUP = GROUP == 128 ? (g + 127) / 128 : 1;
  constexpr int STEPS = GROUP == 128 ? WHOLE * STEPS_PER_GROUP + (TAIL + 127) / 128 : (K + 127) / 128;
  static_assert(GROUP == 128 || TAIL == 0);
  static_assert(SLICE == 32 || (g <= 128 && TAIL == 0));

  constexpr int X_BYTES = BLOCK_M * 256, PACKED_BYTES = PLANES * BLOCK_N * 32;
  constexpr int UNITS = ROW_TILES * BLOCK_M / 8;  // of 8 tokens and 64 outputs a warpgroup: 4 sums a thread
  constexpr int CHUNK = UNITS / CLUSTER % 4 == 0 && BLOCK_M % 32 == 0 ? 4 : UNITS / CLUSTER % 2 == 0 && BLOCK_M % 16 == 0 ? 2 : 1;
  constexpr int STORE_BYTES = CHUNK * 8 * 128;
  static_assert(UNITS % CLUSTER == 0);

  uint8_t* const s_x = static_cast<uint8_t*>(shared);
  uint8_t* const s_y = s_x + STAGES * X_BYTES;  // [warpgroup][2]
  uint8_t* const s_packed = s_y + WARPGROUPS * 2 * STORE_BYTES;
  uint64_t* const full = reinterpret_cast<uint64_t*>(s_packed + STAGES * PACKED_BYTES);
  uint64_t* const empty = full + STAGES;
  constexpr int USED = STAGES * (X_BYTES + PACKED_BYTES + 16) + WARPGROUPS * 2 * STORE_BYTES;
  static_assert(USED <= SHARED_BYTES);
  // The sums of a tile that is split, once its stages are free: [rank][unit][thread].
  float4* const s_parts = static_cast<float4*>(shared);
  static_assert(CLUSTER == 1 || UNITS * THREADS * 16 <= STAGES * X_BYTES);

  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  const int warp = thread / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 4 * WARPGROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
    work.split = item >= rounds;
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

  auto group_of = [](int step) { return GROUP == 128 ? step / STEPS_PER_GROUP : step * (128 / GROUP); };

  int stage = 0;
  uint32_t phase = 0;
  auto advance = [&] {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == WARPGROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    Work work;
    for (int item = 0; work_at(item, work); ++item) {
      if (warp == 0 && lane == 0) {
        auto load_packed = [&](int step) {
          barrier_expect(full + stage, X_BYTES + PACKED_BYTES);
          const int byte = step / STEPS_PER_GROUP * (STEPS_PER_GROUP * 32) + step % STEPS_PER_GROUP * 32;
          uint8_t* const to = s_packed + stage * PACKED_BYTES;
          if (PLANES == 1)
            load_box(to, work.layer.T_packed, byte, work.n0, full + stage);
          else
            load_box(to, work.layer.T_packed, byte, work.n0, 0, full + stage);
        };
        auto load_x = [&](int step) {
          const int group = step / STEPS_PER_GROUP;
          // Columns from slice to slice.
          const int quarter = GROUP == 128 ? ((TAIL == 0 || group < WHOLE ? g : TAIL) + 3) / 4 : 32;
          const int column = GROUP == 128 ? group * g + step % STEPS_PER_GROUP * 32 : step * 128;
#pragma unroll
          for (int i = 0; i < 128 / SLICE; ++i)
            load_box(s_x + stage * X_BYTES + i * BLOCK_M * SLICE * 2, &x, column + (SLICE == 64 ? 64 : quarter) * i,
                     work.m0, full + stage);
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
      if (work.split && CLUSTER > 1) {
        cluster_barrier();
        cluster_barrier();
        __syncthreads();
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  // Rows row and row + 8 of each of its 64; 16 bytes are swapped in every other four rows.
  const int row = warp * 16 + lane / 4;
  const int row0 = warpgroup * ROW_TILES * 64 + row;
  const int swizzle = (lane / 16) * 16;
  int stores = 0;

  Work work;
  for (int item = 0; work_at(item, work); ++item) {
    float sums[ROW_TILES][BLOCK_M / 2];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int i = 0; i < BLOCK_M / 2; ++i) sums[t][i] = 0;
    Exponents<G> exponents[ROW_TILES][2];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        exponents[t][half].start(work.layer.E, work.layer.N, work.n0 + row0 + t * 64 + half * 8, group_of(work.first));

    int previous = -1;
    for (int step = work.first; step < work.last; ++step, advance()) {
      barrier_wait(full + stage, phase);
      const uint8_t* const packed = s_packed + stage * PACKED_BYTES + row0 * 32 + lane % 4 * 2;
      const uint32_t group = group_of(step);
      if (group % 4 == 0 && step % STEPS_PER_GROUP == 0 && step > work.first) {
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) exponents[t][half].advance(work.layer.E, work.layer.N, group);
      }
      uint32_t words[ROW_TILES][2][2][PLANES];
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = t * 64 + half * 8;
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int p = 0; p < PLANES; ++p) {
              const uint8_t* const bytes = packed + (p * BLOCK_N + r) * 32 + ((i * 16) ^ swizzle);
              words[t][half][i][p] = __byte_perm(*reinterpret_cast<const uint16_t*>(bytes),
                                                 *reinterpret_cast<const uint16_t*>(bytes + 8), 0x1504);
            }
        }

      // K-major, rows of SLICE columns swizzled by their size; 8 rows from one to the next core matrix.
      const uint64_t descriptor = (shared_address(s_x + stage * X_BYTES) >> 4) | 1ull << 16 |
                                  static_cast<uint64_t>(SLICE) << 32 | (SLICE == 64 ? 1ull : 2ull) << 62;
      // Two halves of the step: the operand of one is decoded while the tensor cores work on the other. They are the
      // row tiles, or of one row tile the first and the second 16 bytes.
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        constexpr int PARTS = ROW_TILES;
        const int t = ROW_TILES == 2 ? unit : 0;
        uint32_t a[PARTS * 16];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int i = ROW_TILES == 2 ? part : unit;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t scale[2];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              const int index = GROUP == 128 ? 0 : GROUP == 64 ? i : 2 * i + pair;
              // The bits of 2^(E - 1). At E = -126 it is 2^-127, which is subnormal.
              scale[pair] = static_cast<uint32_t>(max((exponents[t][half].at(group + index) + 126) << 7, 0x0040)) * 0x00010001u;
            }
            decode<Operand, GROUP, PLANES, SCALED>(words[t][half][i], scale, half, a + part * 16);
          }
        }
        keep(a);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int i = ROW_TILES == 2 ? part : unit;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int columns = (GROUP == 128 ? 2 * j + i : 4 * i + j) * 16;
            const int bytes = columns / SLICE * (BLOCK_M * SLICE * 2) + columns % SLICE * 2;
            tl::wgmma_rs<Operand::WGMMA, Operand::WGMMA, tl::DataType::kFloat32, 64, BLOCK_M, 16, false, false, 1, 1>(
                a + part * 16 + j * 4, descriptor + bytes / 16, reinterpret_cast<uint32_t*>(sums[t]), true);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (unit == 0 && previous >= 0 && lane == 0) barrier_arrive(empty + previous);
      }
      previous = stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) keep(sums[t]);
    if (previous >= 0 && lane == 0) barrier_arrive(empty + previous);

    constexpr int OWN = UNITS / CLUSTER;
    // Rounds ``count`` units, from first_unit on, and stores them. A thread has the outputs row and row + 8 of pairs of
    // tokens.
    auto store_units = [&](auto&& value, int first_unit, auto count) {
      constexpr int COUNT = decltype(count)::value;
#pragma unroll
      for (int c = 0; c < COUNT / CHUNK; ++c) {
        const int unit = first_unit + c * CHUNK;
        const int t = unit / (BLOCK_M / 8), token = unit % (BLOCK_M / 8) * 8;
        const int n = work.n0 + (warpgroup * ROW_TILES + t) * 64;
        uint8_t* const buffer = s_y + (warpgroup * 2 + stores++ % 2) * STORE_BYTES;
        float bias[2] = {};
        if (work.layer.bias != nullptr) {
          // bias_exponent reaches -128, where 2^bias_exponent is subnormal: two normal factors instead.
          const int exponent = *work.layer.bias_exponent, part = exponent >> 1;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            bias[half] = static_cast<float>(work.layer.bias[min(n + row + half * 8, work.layer.N - 1)]) *
                         exp2_int(part) * exp2_int(exponent - part);
        }
        if (thread == 0) stores_read<1>();
        named_barrier(1 + warpgroup, 128);
#pragma unroll
        for (int u = 0; u < CHUNK; u += 2) {
          uint32_t matrices[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int i = ((c * CHUNK + min(u + m / 2, CHUNK - 1)) * 4) + m % 2 * 2;
            matrices[m] = Operand::round(value(i) + bias[m % 2], value(i + 1) + bias[m % 2]);
          }
          const int to = min(u + lane / 16, CHUNK - 1) * 8 + lane % 8;
          const int column = warp * 2 + lane / 8 % 2;
          store_transposed(buffer + to * 128 + (column ^ (lane % 8)) * 16, matrices);
        }
        fence_for_tma();
        named_barrier(1 + warpgroup, 128);
        if (thread == 0) store_box(work.layer.y, buffer, n, work.m0 + token);
      }
    };

    if (CLUSTER > 1 && work.split) {
      // Every block of the cluster is through with its stages.
      cluster_barrier();
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        const int to = unit / OWN;
        store_to_rank(s_parts + (rank * OWN + unit % OWN) * THREADS + threadIdx.x, to,
                      sums[unit / (BLOCK_M / 8)] + unit % (BLOCK_M / 8) * 4);
      }
      cluster_barrier();
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
      store_units([&](int i) { return own[i]; }, rank * OWN, std::integral_constant<int, OWN>());
    } else {
      store_units([&](int i) { return sums[i / (BLOCK_M / 2)][i % (BLOCK_M / 2)]; }, 0,
                  std::integral_constant<int, UNITS>());
    }
  }
  if (thread == 0) stores_read<0>();
}

}  // namespace ternarize
