// y = x · Wᵀ + bias for a few tokens on Hopper, from the packed trits as they lie in memory (ternarize/packing.py).
//
// For a few tokens, reading the weight is all the time, so all is arranged for many loads in flight and few
// instructions a trit. Letters as in ternarize/packing.py; bfloat16, one trit plane, groups of 128.
//
// Fragments. A row's group is 32 bytes, and byte c holds the weights k = c, c + 32, c + 64, c + 96. In
// mma.m16n8k16, where W is the operand A, the four lanes of a quad share a row, and each has four of the 16 columns.
// The sum over k may run in any order, as long as x is read in the same one, so the order is chosen for the bytes to
// need no shuffle: lane q of a quad loads bytes 8q .. 8q + 7 of its row, as the words (w0, w1), and the column pairs
// that it has in one mma are
//     bytes 8q + b and 8q + b + 2 (of w0),  bytes 8q + b + 4 and 8q + b + 6 (of w1),  b = 0 or 1,
// all of one plane j of the byte: k = 32j + byte. Their codes are 16 bits apart in a word, and the code is a number
// once it lies in the top two bits of a bfloat16: 00 is 0, 01 is 0x4000 = 2.0, 11 is 0xC000 = -2.0. So
//     (w << shift) & 0xC000C000
// is a register of A: one shift and one AND for two trits. The factor 2 is taken back by the scale, 2^(E - 1).
//
// Work. A thread block cluster owns consecutive row blocks. K is split over its blocks, and within a block over its
// K_WARPS, each of which keeps its accumulators until its part of K is summed and leaves them in the shared memory of
// the block that will add the parts, in an order that does not depend on time: results are the same bits every run.
#include <cuda_bf16.h>
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
__device__ __forceinline__ uint4 load_activations(const __nv_bfloat16* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// d += A · B, with A [16, 16], B [16, 8] in bfloat16 and d [16, 8] in float32.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

// The kernel.

constexpr int GROUP = 128;
constexpr int GROUP_BYTES = GROUP / 4;

// 2^(E - 1) for byte ``index`` of a word of exponents. At E = -126 it is 2^-127, which is subnormal.
__device__ __forceinline__ float half_scale(uint32_t exponents, int index) {
  const int E = static_cast<int8_t>(exponents >> (8 * index));
  return __int_as_float(max((E + 126) << 23, 0x00400000));
}

// 2^exponent for exponents from -126 to 127.
__device__ __forceinline__ float exp2_int(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Arguments: x bfloat16 [M, K], T_packed uint8 [N, K / 4], E int8 [N, K / 128], y bfloat16 [M, N], bias int32 [N],
// bias_exponent int8 [1]; x, T_packed and E 16-byte aligned, M from 1 to TOKENS, N at least ROWS. ``shared``:
// DecodeTile.shared_bytes (linear_decode.py).
//
// TOKENS: 8 or 16. TILES: mma tiles of 16 rows in a row block. STEP: groups of K a warp loads at once, a divisor of
// K / 128 and 1, 2 or 4. WARPS, K_WARPS, CLUSTER: above. CLUSTERS: how many clusters there are.
template <int TOKENS, int TILES, int STEP, int WARPS, int K_WARPS, int CLUSTER, int CLUSTERS, int N, int K>
__device__ __forceinline__ void linear_decode(const void* x, const void* T_packed, const void* E, void* y, void* shared,
                                              int M, const void* bias = nullptr, const void* bias_exponent = nullptr) {
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
    const int group = (first_step + load_step) * STEP;
    const int64_t first = static_cast<int64_t>(n0) * GROUPS + group;
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

  // Weights are constants, so their first loads need not wait for the kernel that writes x.
  Weights weights;
  if (load_block < blocks) load(weights);
  wait_for_previous_kernel();

  // This block's part of x, in the order of the fragments: 16 bytes for each [group][plane][TOKENS][lane of a quad],
  // the eight k of that lane, even ones (b = 0) first.
  uint4* const s_x = static_cast<uint4*>(shared);
  for (int i = threadIdx.x; i < groups * 16 * M; i += WARPS * 32) {
    const int q = i % 4, m = i / 4 % M, plane = i / 4 / M;
    const uint4 v = load_activations(static_cast<const __nv_bfloat16*>(x) + static_cast<int64_t>(m) * K +
                                     first_group * GROUP + plane * 32 + q * 8);
    s_x[(plane * TOKENS + m) * 4 + q] = make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410),
                                                   __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632));
  }
  if (CLUSTER > 1) cluster_wait();
  __syncthreads();

  // Columns of B past the last token repeat it; they are never stored.
  int token[TOKEN_TILES];
#pragma unroll
  for (int t = 0; t < TOKEN_TILES; ++t) token[t] = min(t * 8 + row_in_tile, M - 1);

  // The parts of the row blocks whose sums this block forms: [row block][part][value][lane].
  constexpr int MOST_GROUPS = (STEPS + CLUSTER - 1) / CLUSTER * STEP;
  float* const s_parts = reinterpret_cast<float*>(s_x + MOST_GROUPS * 16 * TOKENS);

  const int part_group = first_step * STEP - first_group;
  for (int block = row_warp; block < blocks; block += ROW_WARPS) {
    float sum[TILES][TOKEN_TILES][4] = {};
    for (int step = 0; step < steps; ++step) {
      Weights next;
      if (load_block < blocks) load(next);
#pragma unroll
      for (int g = 0; g < STEP; ++g) {
        const uint4* const x_group = s_x + (part_group + step * STEP + g) * 16 * TOKENS + quad_lane;
        float group_sum[TILES][TOKEN_TILES][4] = {};
#pragma unroll
        for (int plane = 0; plane < 4; ++plane) {
          uint4 x_fragment[TOKEN_TILES];
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t) x_fragment[t] = x_group[(plane * TOKENS + token[t]) * 4];
#pragma unroll
          for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
              const int shift = 14 - 8 * b - 2 * plane;
              const uint2 w = weights.words[tile][0][g], w8 = weights.words[tile][1][g];
              const uint32_t a[4] = {(w.x << shift) & 0xC000C000u, (w8.x << shift) & 0xC000C000u,
                                     (w.y << shift) & 0xC000C000u, (w8.y << shift) & 0xC000C000u};
#pragma unroll
              for (int t = 0; t < TOKEN_TILES; ++t) {
                const uint4 v = x_fragment[t];
                mma(group_sum[tile][t], a, b ? v.z : v.x, b ? v.w : v.y);
              }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float scale = half_scale(weights.exponents[tile][half], g);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t) {
              sum[tile][t][half * 2] += scale * group_sum[tile][t][half * 2];
              sum[tile][t][half * 2 + 1] += scale * group_sum[tile][t][half * 2 + 1];
            }
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
    if (bias != nullptr) {
      // bias_exponent reaches -128, where 2^bias_exponent is subnormal: two normal factors instead.
      const int exponent = *static_cast<const int8_t*>(bias_exponent), half = exponent >> 1;
      sum += static_cast<float>(static_cast<const int*>(bias)[n]) * exp2_int(half) * exp2_int(exponent - half);
    }
    static_cast<__nv_bfloat16*>(y)[static_cast<int64_t>(m) * N + n] = __float2bfloat16(sum);
  }
}

}  // namespace ternarize
