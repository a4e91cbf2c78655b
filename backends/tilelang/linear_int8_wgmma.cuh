// Parts of linear_int8_wgmma.py that are shorter in CUDA: packed trits and exponents to the int8 operand A of wgmma, and
// its int32 sums to float32. Letters and packed layout as in ternarize/packing.py.
//
// The exponent of a group is folded into the operand: a trit becomes T · (64 >> (base - E)), where the base of a row is
// its largest exponent. So one int32 sum, in units of 2^(base - 6), runs over all of K, and groups cost nothing. Where E
// is more than 6 below the base, the base moves: the sums so far are added to others in float64, in local memory, and
// start again. That is slow, rare (scales of one row that differ by more than 2^6) and exact for every exponent.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// Exponents below the base that an operand of 8 bits holds.
constexpr int WINDOW = 6;

// What a thread knows of its two rows, r and r + 8, as it goes through the groups; the lanes of a quad know the same.
struct RowExponents {
  int base[2];     // of the sums
  int largest[2];  // of the row
  int E[2];        // of the next group
  int moved;       // whether sums of the warp are in float64
};
static_assert(sizeof(RowExponents) == 7 * sizeof(int32_t));

// The exponents of row ``row`` from group ``first``; of the last row if that is past it.
template <int N, int GROUPS>
__device__ __forceinline__ const int8_t* row_exponents(const void* E, int row, int first) {
  return static_cast<const int8_t*>(E) + static_cast<int64_t>(min(row, N - 1)) * GROUPS + first;
}

// Sums of zero, before the first of the groups ``first`` to ``first + COUNT - 1``.
template <int SUMS, int N, int GROUPS, int COUNT>
__device__ __forceinline__ void start_rows(void* sums, void* state, const void* E, int row, int first) {
  RowExponents& rows = *static_cast<RowExponents*>(state);
#pragma unroll
  for (int i = 0; i < SUMS; ++i) static_cast<int32_t*>(sums)[i] = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int8_t* const e = row_exponents<N, GROUPS>(E, row + 8 * half, first);
    int largest = -128;
#pragma unroll 8
    for (int i = threadIdx.x % 4; i < COUNT; i += 4) largest = max(largest, static_cast<int>(__ldg(e + i)));
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    rows.largest[half] = rows.base[half] = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    rows.E[half] = __ldg(e);
  }
  rows.moved = 0;
}

// Variables of local memory that stay there: the compiler would rather spill others than these, which are seldom used.
__device__ __forceinline__ double load_local(const double* variable) {
  double value;
  asm volatile("ld.local.f64 %0, [%1];" : "=d"(value) : "l"(__cvta_generic_to_local(variable)) : "memory");
  return value;
}
__device__ __forceinline__ void store_local(double* variable, double value) {
  asm volatile("st.local.f64 [%0], %1;" ::"l"(__cvta_generic_to_local(variable)), "d"(value) : "memory");
}

// Adds the sums, in units of 2^(base - 6), to those in float64, and clears them. Sums are in the order of wgmma's
// accumulators: two tokens of row r, two of row r + 8.
template <int SUMS>
__device__ __forceinline__ void move_to_float64(RowExponents& rows, int32_t* sums, double* exact) {
  double unit[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) unit[half] = __hiloint2double((rows.base[half] - WINDOW + 1023) << 20, 0);
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    double sum = sums[i] * unit[i / 2 % 2];
    if (rows.moved) sum += load_local(exact + i);
    store_local(exact + i, sum);
    sums[i] = 0;
  }
  rows.moved = 1;
}

// The operand A of wgmma.m64nNk32 for group ``group``, and its exponents.
//
// A thread has rows r and r + 8, and in each 16 columns of k the four from 4q, q its place in its quad. They are the
// same plane of four neighbouring bytes, a word of T_packed: 16 packed bytes are four planes of 16 columns each. Two
// planes lie in the nibbles of the word, which are selectors of a byte permutation of the four values 0, v, -, -v; a
// second one deals its results out to the planes. A group of 32 is 8 bytes of four planes of 8 columns: two planes make
// 16 columns.
//
// packed: [row r, row r + 8][words in order]. weight: registers [16 columns][row].
template <int GROUP, int SUMS, int N, int GROUPS>
__device__ __forceinline__ void decode_group(const void* packed, void* weight, void* sums, void* exact, void* state,
                                             const void* E, int row, int group) {
  constexpr int WORDS = GROUP < 64 ? 1 : GROUP / 64;
  const uint32_t* const words = static_cast<const uint32_t*>(packed);
  uint32_t* const registers = static_cast<uint32_t*>(weight);
  RowExponents& rows = *static_cast<RowExponents*>(state);
  const bool outside = static_cast<unsigned>(rows.base[0] - rows.E[0]) > WINDOW ||
                       static_cast<unsigned>(rows.base[1] - rows.E[1]) > WINDOW;
  if (__any_sync(0xFFFFFFFFu, outside)) {
    move_to_float64<SUMS>(rows, static_cast<int32_t*>(sums), static_cast<double*>(exact));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows.base[half] = rows.largest[half] - rows.E[half] > WINDOW ? rows.E[half] : rows.largest[half];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t value = 64u >> (rows.base[half] - rows.E[half]);
    const uint32_t values = value << 8 | (0u - value) << 24;
    // Loaded a group ahead of its use.
    rows.E[half] = __ldg(row_exponents<N, GROUPS>(E, row + 8 * half, min(group + 1, GROUPS - 1)));
    auto permute = [&](uint32_t nibbles, uint32_t& low_plane, uint32_t& high_plane) {
      const uint32_t a = __byte_perm(values, 0, nibbles), b = __byte_perm(values, 0, nibbles >> 16);
      low_plane = __byte_perm(a, b, 0x6420);
      high_plane = __byte_perm(a, b, 0x7531);
    };
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint32_t word = words[half * WORDS + i];
      if (GROUP == 32) {
        permute(word >> (threadIdx.x % 4 / 2 * 2) & 0x33333333u, registers[half], registers[2 + half]);
      } else {
        uint32_t* const plane = registers + i * 2 + half;
        permute(word & 0x33333333u, plane[0], plane[2 * WORDS * 2]);
        permute(word >> 2 & 0x33333333u, plane[WORDS * 2], plane[3 * WORDS * 2]);
      }
    }
  }
}

// y of the sums, for the 16 rows and BLOCK_M tokens of a warp, written to memory.

// Whether an exponent of 16 bits is that of Inf and NaN, in any of four numbers.
template <typename Y>
__device__ __forceinline__ bool any_nonfinite(uint32_t low, uint32_t high) {
  constexpr uint32_t EXPONENT = std::is_same_v<Y, __half> ? 0x7C00 : 0x7F80;
  bool any = false;
#pragma unroll
  for (uint32_t place : {EXPONENT, EXPONENT << 16}) any |= (low & place) == place || (high & place) == place;
  return any;
}

// Stores four neighbouring numbers of a row of y, as far as they are there, and returns whether those are finite.
template <typename Y, int N>
__device__ __forceinline__ bool store_rows(Y* y, int n, uint32_t low, uint32_t high) {
  // Rows of y are multiples of 8 bytes.
  if (N % 4 == 0) {
    if (n >= N) return true;
    *reinterpret_cast<uint2*>(y + n) = make_uint2(low, high);
    return !any_nonfinite<Y>(low, high);
  }
  const uint32_t values[4] = {low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16};
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i >= N) continue;
    reinterpret_cast<uint16_t*>(y)[n + i] = static_cast<uint16_t>(values[i]);
    finite &= !any_nonfinite<Y>(values[i], 0);
  }
  return finite;
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half*) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The transpose of an 8x8 matrix of 16 bits whose rows lie in the quads of a warp.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
  return pair;
}

// Waits for all blocks of the cluster; what they wrote to shared memory before can be read after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// A float32 variable of shared memory as block ``rank`` of the cluster has it.
__device__ __forceinline__ float of_rank(const float* variable, int rank) {
  uint32_t remote;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(variable))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote));
  return value;
}

// The sums as y, in memory: y = sums · 2^(base - 6) · scale + bias.
//
// Of a cluster among whose CLUSTER blocks K is split, each adds up and stores its share of the tokens; the threads of
// all blocks hold the same places of y, so each reads what its twins left in ``shared``, float32 [SUMS][threads].
//
// scale: float32 [M]. bias, bias_exponent: null for none. status: of the layer, null if nobody asks for it. y: [M, N].
// thread: of those that hold sums, THREADS of them. row, m0: of the thread's first sum.
template <typename Y, int SUMS, int N, int THREADS, int CLUSTER>
__device__ __forceinline__ void store_sums(void* sums, void* exact, void* state, const void* scale, const void* bias,
                                           const void* bias_exponent, void* status, void* y, void* shared, int thread,
                                           int row, int m0, int M, int rank) {
  constexpr int SHARE = SUMS / CLUSTER;
  RowExponents& rows = *static_cast<RowExponents*>(state);
  int32_t* const integers = static_cast<int32_t*>(sums);
  double* const moved = static_cast<double*>(exact);
  const float* const scales = static_cast<const float*>(scale);
  const int quad_lane = threadIdx.x % 4, lane_row = threadIdx.x % 32 / 4;
  if (rows.moved) move_to_float64<SUMS>(rows, integers, moved);
  float unit[2], b[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unit[half] = exp2_int(rows.base[half]);
    if (bias != nullptr)
      b[half] = bias_value(static_cast<const int*>(bias)[min(row + 8 * half, N - 1)],
                           *static_cast<const int8_t*>(bias_exponent));
  }
  // Without the bias. Tokens past the last have sums of zero, and are never stored.
  auto value = [&](int i) {
    const float token_scale = __ldg(scales + min(m0 + i / 4 * 8 + quad_lane * 2 + i % 2, M - 1));
    if (rows.moved) return static_cast<float>(load_local(moved + i) * token_scale);
    return integers[i] * (token_scale * (1.0f / (1 << WINDOW))) * unit[i / 2 % 2];
  };
  float* const parts = static_cast<float*>(shared) + thread;
  bool finite = true;
  if (CLUSTER > 1) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) parts[i * THREADS] = value(i);
    cluster_barrier();
  }
#pragma unroll
  for (int tile = 0; tile < SUMS / 4; ++tile) {
    if (tile * 4 / SHARE != rank && CLUSTER > 1) continue;
    float result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (CLUSTER > 1) {
        result[i] = 0;
#pragma unroll
        for (int part = 0; part < CLUSTER; ++part) result[i] += of_rank(parts + (tile * 4 + i) * THREADS, part);
      } else {
        result[i] = value(tile * 4 + i);
      }
      result[i] += b[i / 2];
    }
    // From two tokens of rows r and r + 8 to two neighbouring rows of token r, of the first and of the last eight.
    Y* const type = nullptr;
    uint32_t first = transpose(pack(result[0], result[1], type)), last = transpose(pack(result[2], result[3], type));
    // And to four neighbouring rows: lanes 0 and 2 of a quad take the first eight, 1 and 3 the last.
    const bool odd = quad_lane % 2;
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : last, 1);
    const int m = m0 + tile * 8 + lane_row;
    if (m < M)
      finite &= store_rows<Y, N>(static_cast<Y*>(y) + static_cast<int64_t>(m) * N,
                                 row - lane_row + (odd ? 8 : 0) + quad_lane / 2 * 4, odd ? other : first,
                                 odd ? last : other);
  }
  if (status != nullptr && !finite) report_nonfinite(static_cast<int*>(status));
  // No block may leave while another reads its shared memory.
  if (CLUSTER > 1) cluster_barrier();
}

}  // namespace ternarize
