// hopper.cuh for the CPU, on emulated_cuda.h.
//
// Every asynchronous copy is checked: aligned, into the block's shared memory, out of a tensor that the host has named.
// Fragments of mma are those of the PTX manual.
#include "emulated_cuda.h"

namespace emulated {

inline void copy_async(void* to, const void* from, int size, bool zeros) {
  require(reinterpret_cast<uintptr_t>(to) % size == 0 && reinterpret_cast<uintptr_t>(from) % size == 0, "misaligned");
  require_shared(to, size);
  // compute-sanitizer looks at the address of what is not read, too.
  require_readable(from, size);
  std::vector<uint8_t> value(size);
  if (!zeros) std::memcpy(value.data(), from, size);
  std::memset(to, 0xFF, size);
  current->copies.begin([=] { std::ranges::copy(value, static_cast<uint8_t*>(to)); });
}

// d += A · B of a warp, for operands with ``PER_WORD`` values in a register.
template <typename Value, int PER_WORD, typename Sum, typename Decode>
void mma(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  uint32_t all[32][6];
  exchange({a[0], a[1], a[2], a[3], b0, b1}, all);
  constexpr int HALF = 4 * PER_WORD;  // columns of a register's quad
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 2 * HALF; ++k) {
      const int quad_lane = k % HALF / PER_WORD, upper = k / HALF;
      const Value w = decode(all[row % 8 * 4 + quad_lane][row / 8 + 2 * upper], k % PER_WORD);
      const Value x = decode(all[column * 4 + quad_lane][4 + upper], k % PER_WORD);
      d[i] += static_cast<Sum>(w) * static_cast<Sum>(x);
    }
  }
}

}  // namespace emulated

namespace ternarize {

inline void copy_16_async(void* to, const void* from, bool zeros) { emulated::copy_async(to, from, 16, zeros); }
inline void copy_4_async(void* to, const void* from) { emulated::copy_async(to, from, 4, false); }
inline void commit_copies() { emulated::current->copies.commit(); }
template <int COMMITS>
void wait_for_copies() {
  emulated::current->copies.wait(COMMITS);
}
inline void prefetch_to_l2(const void* address) { emulated::require_readable(address, 1); }
inline uint2 load_activations(const void* address) {
  emulated::require(emulated::current->waited_for_previous_kernel, "reads x before the previous kernel has written it");
  emulated::require(reinterpret_cast<uintptr_t>(address) % 8 == 0, "misaligned");
  emulated::require_readable(address, 8);
  return *static_cast<const uint2*>(address);
}
inline float load_scale(const float* address) {
  emulated::require(emulated::current->waited_for_previous_kernel, "reads scale before the previous kernel wrote it");
  emulated::require_readable(address, 4);
  return *address;
}

inline float multiply_clamped(float a, float b) {
  const float product = a * b;
  return product > 0 ? min(product, 1.0f) : 0;
}

template <uint32_t SELECTOR>
uint32_t sign_extended(uint32_t word) {
  static_assert(SELECTOR == 0xA280 || SELECTOR == 0xB391);
  const int first = SELECTOR & 1;
  const auto half = [&](int i) { return static_cast<uint16_t>(static_cast<int8_t>(word >> 8 * (first + 2 * i))); };
  return static_cast<uint32_t>(half(1)) << 16 | half(0);
}

template <typename Float>
uint32_t float_bits(uint32_t word) {
  return std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<Float>(static_cast<uint16_t>(word))));
}
template <typename Float>
Float rounded(float value) {
  if constexpr (std::is_same_v<Float, __half>) {
    return static_cast<__half>(value);
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t up = std::isnan(value) ? 0 : 0x7FFF + (bits >> 16 & 1);
    return {static_cast<uint16_t>((bits + up) >> 16)};
  }
}
template <typename Float>
uint32_t three_times_plus(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift : {0, 16}) {
    const float value = 3 * std::bit_cast<float>(float_bits<Float>(a >> shift)) +
                        std::bit_cast<float>(float_bits<Float>(b >> shift));
    result |= static_cast<uint32_t>(std::bit_cast<uint16_t>(rounded<Float>(value))) << shift;
  }
  return result;
}

template <typename Float>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<float, 2>(d, a, b0, b1, [](uint32_t word, int i) {
    return std::bit_cast<float>(float_bits<Float>(word >> 16 * i));
  });
}
inline void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<int, 4>(d, a, b0, b1, [](uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); });
}

inline void store_to_rank(float* variable, int rank, float value) {
  const auto offset = reinterpret_cast<uint8_t*>(variable) - emulated::block().memory;
  *reinterpret_cast<float*>(emulated::cluster->blocks[rank].memory + offset) = value;
}
inline void cluster_started() {}
inline void cluster_arrive() {}
inline void cluster_wait() { emulated::cluster->barrier.arrive_and_wait("its cluster"); }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() { emulated::current->waited_for_previous_kernel = true; }

}  // namespace ternarize
