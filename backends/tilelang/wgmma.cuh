// What the kernels on wgmma need of Hopper beyond hopper.cuh: TMA, mbarriers, warpgroup matrix products.
#include <cuda.h>
#include <stdint.h>

#include <tl_templates/cuda/instruction/wgmma.h>

namespace ternarize {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What barrier_init did can be seen by TMA, and by the blocks of the cluster.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase end only when TMA has written ``bytes`` more.
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

// Loads a box of a matrix, and of all planes of an array with three dimensions; zeros for what lies outside.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void load_box_of_planes(void* to, const CUtensorMap* map, int column, int row,
                                                   uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(0), "r"(shared_address(barrier))
      : "memory");
}
// Stores a box, as far as it lies inside the matrix.
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(shared_address(from))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but PENDING of this thread's stores have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// What ordinary stores wrote to shared memory can be read by TMA, after a barrier among the threads that wrote.
__device__ __forceinline__ void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this warp among those that a named_barrier waits for, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// A named_barrier, and whether any of its threads says so. The vote is for the compiler alone: after it knows that all of
// a warp get the same answer, it keeps what depends on it in uniform registers.
__device__ __forceinline__ bool any_of(int id, int threads, bool condition) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred condition, any;\n"
      "setp.ne.s32 condition, %3, 0;\n"
      "barrier.cta.red.or.pred any, %1, %2, condition;\n"
      "vote.sync.any.pred any, any, -1;\n"
      "selp.s32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(condition))
      : "memory");
  return any;
}

// Variables of local memory that stay there, one after the other: the compiler would rather spill others than these,
// which are seldom used.
__device__ __forceinline__ double load_local(const double* variable) {
  double value;
  asm volatile("ld.volatile.f64 %0, [%1];" : "=d"(value) : "l"(variable) : "memory");
  return value;
}
__device__ __forceinline__ void store_local(double* variable, double value) {
  asm volatile("st.volatile.f64 [%0], %1;" ::"l"(variable), "d"(value) : "memory");
}

// Registers of a thread, taken from or given to the others of its block; by all threads of a warpgroup.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
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
__device__ __forceinline__ void store_transposed(void* row, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// What describes a matrix in shared memory to wgmma, whose K lies along rows of 32, 64 or 128 bytes, swizzled by their
// size: 8 rows are a core matrix. Add bytes / 16 to move on.
template <int ROW_BYTES>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* matrix) {
  return shared_address(matrix) >> 4 | 1ull << 16 | static_cast<uint64_t>(ROW_BYTES / 2) << 32 |
         (ROW_BYTES == 128 ? 1ull : ROW_BYTES == 64 ? 2ull : 3ull) << 62;
}
// d = A · B, plus d if ``add``: A [64, 16] of a warpgroup's registers, B [16, N] in shared memory, d [64, N] in float32.
template <typename Float, int N>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, bool add) {
  constexpr tl::DataType TYPE = std::is_same_v<Float, __half> ? tl::DataType::kFloat16 : tl::DataType::kBFloat16;
  tl::wgmma_rs<TYPE, TYPE, tl::DataType::kFloat32, 64, N, 16, false, false, 1, 1>(a, b, reinterpret_cast<uint32_t*>(d),
                                                                                 add);
}
// d += A · B: A [64, 32] in int8 of a warpgroup's registers, B [32, N] in shared memory, d [64, N] in int32.
template <int N>
__device__ __forceinline__ void wgmma(int* d, const uint32_t* a, uint64_t b) {
  tl::wgmma_rs<tl::DataType::kInt8, tl::DataType::kInt8, tl::DataType::kInt32, 64, N, 32, false, false, 1, 1>(
      a, b, reinterpret_cast<uint32_t*>(d), true);
}
// What describes a transposed matrix, whose K lies along columns: boxes of 64 columns of 16 bits and ROWS rows, one after
// the other, swizzled by 128 bytes. 8 rows are a core matrix. Add 8 for each row to move on.
template <int ROWS>
__device__ __forceinline__ uint64_t transposed_descriptor(const void* matrix) {
  // Of an address the 18 bits that the PTX manual takes: above them a descriptor has the stride of boxes.
  return (shared_address(matrix) & 0x3FFFF) >> 4 | static_cast<uint64_t>(ROWS * 128 / 16) << 16 | 64ull << 32 |
         1ull << 62;
}
// d = Aᵀ · B, plus d if ``add``: A [16, 64] and B [16, N] in shared memory, d [64, N] in float32.
template <typename Float, int N>
__device__ __forceinline__ void wgmma_transposed(float* d, uint64_t a, uint64_t b, bool add) {
  constexpr tl::DataType TYPE = std::is_same_v<Float, __half> ? tl::DataType::kFloat16 : tl::DataType::kBFloat16;
  tl::wgmma_ss<TYPE, TYPE, tl::DataType::kFloat32, 64, N, 16, true, true, 1, 1>(a, b, reinterpret_cast<uint32_t*>(d),
                                                                               add);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but PENDING of the committed groups are done.
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
__device__ __forceinline__ void keep(int (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void keep(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// __byte_perm whose operands the compiler leaves as they are.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}
// Products of two pairs of bfloat16.
__device__ __forceinline__ uint32_t multiply_bfloat16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Two float32 as a pair of 16-bit floats.
template <typename Float>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  uint32_t d;
  if constexpr (std::is_same_v<Float, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Whether both are finite: an exponent of ones is not.
template <typename Float>
__device__ __forceinline__ bool is_finite_pair(uint32_t pair) {
  constexpr uint32_t EXPONENT = std::is_same_v<Float, __half> ? 0x7C00u : 0x7F80u;
  return (pair & EXPONENT) != EXPONENT && (pair >> 16 & EXPONENT) != EXPONENT;
}

}  // namespace ternarize
