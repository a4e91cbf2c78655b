// y = (q · Wᵀ) · scale + bias for a few tokens on Hopper, from the packed trits as they lie in memory
// (ternarize/packing.py). The structure is that of linear_decode.cuh; the operands are 8 bits wide.
//
// Fragments. A row's group is 32 bytes, and byte c holds the weights k = c, c + 32, c + 64, c + 96. In mma.m16n8k32,
// where W is the operand A, the four lanes of a quad share a row, and each has eight of the 32 columns. The sum over k
// may run in any order, as long as q is read in the same one: lane l of a quad loads bytes 8l .. 8l + 7 of its row, as
// the words (w0, w1), and its columns in one mma are those bytes, all of one plane j of the byte: k = 32j + byte. A code
// is a number once it lies in the top two bits of a byte: 00 is 0, 01 is 0x40 = 64, 11 is 0xC0 = -64. So
//     (w << (6 - 2j)) & 0xC0C0C0C0
// is a register of A: one shift and one AND for four trits.
//
// Numbers. The sums of a group are integers, in units of 1/64. They start from the bits of 1.5 · 2^17, of which one unit
// in the last place is 1/64: read as float32 they are 1.5 · 2^17 plus the sum, which subtracting makes exact. 2^E is
// kept below the range of float32 by SHIFT, so that no sum overflows for any E, and at E = -126 is still exact.
//
// Work. A thread block cluster owns consecutive row blocks. K is split over its blocks, and within a block over its
// K_WARPS, each of which keeps its accumulators until its part of K is summed and leaves them in the shared memory of
// the block that will add the parts, in an order that does not depend on time: results are the same bits every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ternarize {

// Primitives.

// Weights are read once: past L1, and with their neighbours into L2.
__device__ __forceinline__ uint2 load_once(const uint8_t* address) {
  uint2 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(address));
  return value;
}

// Activations are read by every block, and not before wait_for_previous_kernel: volatile, and not as constants, which a
// compiler may read earlier.
__device__ __forceinline__ uint4 load_activations(const int8_t* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ float load_scale(const float* address) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

// d = A · B + c, with A [16, 32], B [32, 8] in int8 and c, d [16, 8] in int32.
__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Stores to the same variable of another block of the cluster.
__device__ __forceinline__ void store_to_rank(float* variable, int rank, float value) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(variable))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// The first says only that the block runs, so that others may write to its shared memory: nothing to release.
__device__ __forceinline__ void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Programmatic dependent launch; no effect if the launch does not ask for it.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void store(__nv_bfloat16* variable, float value) { *variable = __float2bfloat16(value); }
__device__ __forceinline__ void store(__half* variable, float value) { *variable = __float2half(value); }

// The kernel.

constexpr int GROUP = 128;
constexpr int GROUP_BYTES = GROUP / 4;

constexpr int ORIGIN_BITS = 0x48400000;
constexpr float ORIGIN = 196608.0f;

constexpr int SHIFT = 21;

// 2^(E - SHIFT) for byte ``index`` of a word of exponents; subnormal for the least of them.
__device__ __forceinline__ float shifted_scale(uint32_t exponents, int index) {
  const int E = static_cast<int8_t>(exponents >> (8 * index));
  return __int_as_float(E > SHIFT - 127 ? (E - SHIFT + 127) << 23 : 1 << (E - SHIFT + 149));
}

// 2^exponent for exponents from -126 to 127.
__device__ __forceinline__ float exp2_int(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Arguments: q int8 [M, K], scale float32 [M], T_packed uint8 [N, K / 4], E int8 [N, K / 128], y of type Y [M, N], bias
// int32 [N], bias_exponent int8 [1]; q, T_packed and E 16-byte aligned, M from 1 to TOKENS, N at least ROWS.
// ``shared``: Int8DecodeTile.shared_bytes (linear_int8_decode.py).
//
// TOKENS: 8 or 16. TILES: mma tiles of 16 rows in a row block. STEP: groups of K a warp loads at once, a divisor of
// K / 128 and 1, 2 or 4. WARPS, K_WARPS, CLUSTER: above. CLUSTERS: how many clusters there are.
template <typename Y, int TOKENS, int TILES, int STEP, int WARPS, int K_WARPS, int CLUSTER, int CLUSTERS, int N, int K>
__device__ __forceinline__ void linear_int8_decode(const void* q, const void* scale, const void* T_packed,
                                                   const void* E, void* y, void* shared, int M,
                                                   const void* bias = nullptr, const void* bias_exponent = nullptr) {
  constexpr int ROWS = 16 * TILES;
  constexpr int TOKEN_TILES = TOKENS / 8;
  constexpr int GROUPS = K / GROUP;
  constexpr int STEPS = GROUPS / STEP;
  constexpr int ROW_WARPS = WARPS / K_WARPS;
  constexpr int PARTS = CLUSTER * K_WARPS;
  constexpr int ROW_BLOCKS = (N + ROWS - 1) / ROWS;
  constexpr int VALUES = TILES * TOKEN_TILES * 4;  // accumulators a lane
  static_assert(GROUPS % STEP == 0 && STEPS >= PARTS && N >= ROWS);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_in_tile = lane / 4, quad_lane = lane % 4;
  const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER;
  const int row_warp = warp / K_WARPS, part = rank * K_WARPS + warp % K_WARPS;

  const int first_block = cluster * ROW_BLOCKS / CLUSTERS;
  const int blocks = (cluster + 1) * ROW_BLOCKS / CLUSTERS - first_block;
  const int first_step = part * STEPS / PARTS;
  const int steps = (part + 1) * STEPS / PARTS - first_step;
  // The groups of K that this block's warps share out.
  const int first_group = rank * K_WARPS * STEPS / PARTS * STEP;
  const int groups = (rank + 1) * K_WARPS * STEPS / PARTS * STEP - first_group;

  let_next_kernel_start();
  if (CLUSTER > 1) cluster_started();

  // What a warp loads at once: [tile][row, row + 8][group].
  struct Weights {
    uint2 words[TILES][2][STEP];
    uint32_t exponents[TILES][2];
  };

  // The next load: a row block of this warp, counted within the cluster, and a step of its part of K.
  int load_block = row_warp, load_step = 0;
  auto load = [&](Weights& weights) {
    // The last row block ends with the last row: it may compute rows of the one before it a second time.
    const int n0 = min((first_block + load_block) * ROWS, N - ROWS) + row_in_tile;
    const int64_t first = static_cast<int64_t>(n0) * GROUPS + (first_step + load_step) * STEP;
    const uint8_t* packed = static_cast<const uint8_t*>(T_packed) + first * GROUP_BYTES + quad_lane * 8;
    const int8_t* exponents = static_cast<const int8_t*>(E) + first;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + half * 8;
#pragma unroll
        for (int g = 0; g < STEP; ++g)
          weights.words[tile][half][g] = load_once(packed + (row * GROUPS + g) * GROUP_BYTES);
        const int8_t* e = exponents + row * GROUPS;
        if (STEP == 4) weights.exponents[tile][half] = __ldg(reinterpret_cast<const uint32_t*>(e));
        if (STEP == 2) weights.exponents[tile][half] = __ldg(reinterpret_cast<const uint16_t*>(e));
        if (STEP == 1) weights.exponents[tile][half] = __ldg(reinterpret_cast<const uint8_t*>(e));
      }
    if (++load_step == steps) {
      load_step = 0;
      load_block += ROW_WARPS;
    }
  };

  // Weights are constants, so their first loads need not wait for the kernel that writes q.
  Weights weights;
  if (load_block < blocks) load(weights);
  wait_for_previous_kernel();

  // This block's part of q, in the order of the fragments: 16 bytes for each [group][two planes][TOKENS][lane of a quad],
  // eight k of each plane.
  uint2* const s_q = static_cast<uint2*>(shared);
  for (int i = threadIdx.x; i < groups * 8 * M; i += WARPS * 32) {
    const int chunk = i % 8, m = i / 8 % M, group = i / 8 / M, plane = chunk / 2;
    const uint4 v = load_activations(static_cast<const int8_t*>(q) + static_cast<int64_t>(m) * K +
                                     (first_group + group) * GROUP + chunk * 16);
    uint2* const lanes = s_q + ((group * 2 + plane / 2) * TOKENS + m) * 8 + chunk % 2 * 4 + plane % 2;
    lanes[0] = make_uint2(v.x, v.y);
    lanes[2] = make_uint2(v.z, v.w);
  }
  if (CLUSTER > 1) cluster_wait();
  __syncthreads();

  // Columns of B past the last token repeat it; they are never stored.
  int token[TOKEN_TILES];
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) token[t] = min(t * 8 + row_in_tile, M - 1);

  // The parts of the row blocks whose sums this block forms: [row block][part][value][lane].
  constexpr int MOST_GROUPS = (STEPS + CLUSTER - 1) / CLUSTER * STEP;
  float* const s_parts = reinterpret_cast<float*>(s_q + MOST_GROUPS * 16 * TOKENS);

  const int origin[4] = {ORIGIN_BITS, ORIGIN_BITS, ORIGIN_BITS, ORIGIN_BITS};
  const int part_group = first_step * STEP - first_group;
  for (int block = row_warp; block < blocks; block += ROW_WARPS) {
    float sum[TILES][TOKEN_TILES][4] = {};
    for (int step = 0; step < steps; ++step) {
      Weights next;
      if (load_block < blocks) load(next);
#pragma unroll
      for (int g = 0; g < STEP; ++g) {
        const uint4* const q_group =
            reinterpret_cast<const uint4*>(s_q) + (part_group + step * STEP + g) * 8 * TOKENS + quad_lane;
        int group_sum[TILES][TOKEN_TILES][4];
#pragma unroll
        for (int plane = 0; plane < 4; ++plane) {
          uint4 q_fragment[TOKEN_TILES];
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t) q_fragment[t] = q_group[(plane / 2 * TOKENS + token[t]) * 4];
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const int shift = 6 - 2 * plane;
            const uint2 w = weights.words[tile][0][g], w8 = weights.words[tile][1][g];
            const uint32_t a[4] = {(w.x << shift) & 0xC0C0C0C0u, (w8.x << shift) & 0xC0C0C0C0u,
                                   (w.y << shift) & 0xC0C0C0C0u, (w8.y << shift) & 0xC0C0C0C0u};
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t) {
              const uint4 v = q_fragment[t];
              int(&d)[4] = group_sum[tile][t];
              const uint32_t b0 = plane % 2 ? v.z : v.x, b1 = plane % 2 ? v.w : v.y;
              if (plane == 0)
                mma(d, a, b0, b1, origin);
              else
                mma(d, a, b0, b1, d);
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float unit = shifted_scale(weights.exponents[tile][half], g);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
              for (int i = half * 2; i < half * 2 + 2; ++i)
                sum[tile][t][i] += unit * (__int_as_float(group_sum[tile][t][i]) - ORIGIN);
          }
      }
      weights = next;
    }
    float* const parts = s_parts + ((block / CLUSTER * PARTS + part) * VALUES) * 32 + lane;
#pragma unroll
    for (int value = 0; value < VALUES; ++value) {
      const float v = sum[value / (TOKEN_TILES * 4)][value / 4 % TOKEN_TILES][value % 4];
      if (CLUSTER > 1)
        store_to_rank(parts + value * 32, block % CLUSTER, v);
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

  // The row blocks rank, rank + CLUSTER, ... of the cluster.
  const int my_blocks = (blocks - rank + CLUSTER - 1) / CLUSTER;
  for (int i = threadIdx.x; i < my_blocks * ROWS * M; i += WARPS * 32) {
    const int row = i % ROWS, m = i / ROWS % M, block = i / ROWS / M;
    const int n = min((first_block + block * CLUSTER + rank) * ROWS, N - ROWS) + row;
    const int value = (row / 16 * TOKEN_TILES + m / 8) * 4 + row / 8 % 2 * 2 + m % 2;
    const float* const parts = s_parts + (block * PARTS * VALUES + value) * 32 + row % 8 * 4 + m % 8 / 2;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) sum += parts[p * VALUES * 32];
    // In float64, which neither 2^SHIFT nor the scale leads out of range.
    float result = static_cast<float>(static_cast<double>(sum) * load_scale(static_cast<const float*>(scale) + m) *
                                      (1 << SHIFT));
    if (bias != nullptr) {
      // bias_exponent reaches -128, where 2^bias_exponent is subnormal: two normal factors instead.
      const int exponent = *static_cast<const int8_t*>(bias_exponent), half = exponent >> 1;
      result += static_cast<float>(static_cast<const int*>(bias)[n]) * exp2_int(half) * exp2_int(exponent - half);
    }
    store(static_cast<Y*>(y) + static_cast<int64_t>(m) * N + n, result);
  }
}

}  // namespace ternarize
