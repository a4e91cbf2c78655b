// What the kernels need of Hopper beyond CUDA C++: one instruction each, or two.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace ternarize {

// 16 bytes, or zeros in their place: past L1, and with their neighbours into L2.
__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool zeros) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(zeros ? 0 : 16)
               : "memory");
}
__device__ __forceinline__ void copy_4_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last COMMITS groups of this lane's copies have arrived.
template <int COMMITS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COMMITS) : "memory");
}

// Has the 128 bytes that hold an address brought from memory into L2.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Activations are read by every block, and not before wait_for_previous_kernel: volatile, and not as constants, which a
// compiler may read earlier.
__device__ __forceinline__ uint2 load_activations(const void* address) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ float load_scale(const float* address) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

// d += A · B, with A [16, 16] and B [16, 8] in bfloat16 or float16 and d [16, 8] in float32.
template <typename Float>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Float, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d += A · B, with A [16, 32] and B [32, 8] in int8 and d [16, 8] in int32.
__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 3 a + b of two 16-bit floats.
template <typename Float>
__device__ __forceinline__ uint32_t three_times_plus(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<Float, __half>)
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(0x42004200u), "r"(b));
  else
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(0x40404040u), "r"(b));
  return a;
}

// a · b, clamped to 0 and 1.
__device__ __forceinline__ float multiply_clamped(float a, float b) {
  float d;
  asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// Two bytes of a word, sign-extended to int16: those that 0xA280 or 0xB391 select, even or odd. __byte_perm does not know
// the bit of a selector that stands for eight times the sign of a byte.
template <uint32_t SELECTOR>
__device__ __forceinline__ uint32_t sign_extended(uint32_t word) {
  uint32_t d;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(word), "n"(SELECTOR));
  return d;
}

// The low 16 bits, a 16-bit float, as the bits of a float32.
template <typename Float>
__device__ __forceinline__ uint32_t float_bits(uint32_t word) {
  if constexpr (std::is_same_v<Float, __half>)
    return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(word))));
  else
    return word << 16;
}

template <typename Float>
__device__ __forceinline__ Float rounded(float value) {
  if constexpr (std::is_same_v<Float, __half>)
    return __float2half(value);
  else
    return __float2bfloat16(value);
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

}  // namespace ternarize
