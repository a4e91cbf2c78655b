// hopper.cuh for the CPU: what linear_decode.cuh needs of CUDA, with a thread of the machine for each of a cluster.
//
// Every asynchronous copy is checked: aligned, into the block's shared memory, out of a tensor that the host has named.
// Fragments of mma are those of the PTX manual.
#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __device__
#define __forceinline__ inline

using std::isfinite, std::max, std::min;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
using __half = _Float16;

namespace emulated {

struct Copy {
  uint8_t* to;
  std::vector<uint8_t> bytes;
};

struct Warp {
  std::barrier<> barrier{32};
  uint32_t words[32][6];
};

struct Block {
  Block(int threads, size_t shared_bytes)
      : barrier(threads), warps(threads / 32), memory(new(std::align_val_t(128)) uint8_t[shared_bytes]),
        shared_bytes(shared_bytes) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
    std::memset(memory, 0xFF, shared_bytes);  // NaN, if it is read before it is written
  }
  ~Block() { operator delete[](memory, std::align_val_t(128)); }

  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  uint8_t* memory;
  size_t shared_bytes;
};

struct Cluster {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Range {
  const uint8_t *begin, *end;
};
inline std::vector<Range> tensors;

struct Index {
  int x;
};
inline thread_local Index thread_index, block_index;
inline thread_local Cluster* cluster;
inline thread_local Block* block;
inline thread_local std::vector<Copy> copies;
inline thread_local std::deque<std::vector<Copy>> commits;

inline Warp& warp() { return *block->warps[thread_index.x / 32]; }
inline int lane() { return thread_index.x % 32; }

inline void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "thread %d of block %d: %s\n", thread_index.x, block_index.x, message);
  std::abort();
}
inline void require_readable(const void* from, int bytes) {
  const auto* const begin = static_cast<const uint8_t*>(from);
  require(std::ranges::any_of(tensors, [&](Range r) { return r.begin <= begin && begin + bytes <= r.end; }),
          "reads past the end of a tensor");
}
inline void copy_async(void* to, const void* from, int bytes, int size) {
  const auto* const memory = block->memory;
  auto* const begin = static_cast<uint8_t*>(to);
  require(reinterpret_cast<uintptr_t>(to) % size == 0 && reinterpret_cast<uintptr_t>(from) % size == 0, "misaligned");
  require(memory <= begin && begin + size <= memory + block->shared_bytes, "writes past the end of shared memory");
  require(0 <= bytes && bytes <= size, "copies more than there is room for");
  std::vector<uint8_t> value(size);
  if (bytes > 0) {
    require_readable(from, bytes);
    std::memcpy(value.data(), from, bytes);
  }
  copies.push_back({begin, std::move(value)});
}

// The words that the lanes of a warp give, as all of them then see them.
template <int WORDS>
void exchange(const uint32_t (&mine)[WORDS], uint32_t (&all)[32][WORDS]) {
  for (int i = 0; i < WORDS; ++i) warp().words[lane()][i] = mine[i];
  warp().barrier.arrive_and_wait();
  for (int i = 0; i < 32; ++i) std::copy_n(warp().words[i], WORDS, all[i]);
  warp().barrier.arrive_and_wait();
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

template <typename Function>
void run(int clusters, int cluster_size, int threads, size_t shared_bytes, Function function) {
  for (int c = 0; c < clusters; ++c) {
    Cluster this_cluster{std::barrier<>(cluster_size * threads), {}};
    for (int rank = 0; rank < cluster_size; ++rank)
      this_cluster.blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
    std::vector<std::jthread> running;
    for (int i = 0; i < cluster_size * threads; ++i)
      running.emplace_back([&, i] {
        thread_index = {i % threads}, block_index = {c * cluster_size + i / threads};
        cluster = &this_cluster, block = this_cluster.blocks[i / threads].get();
        function(block->memory);
      });
  }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index

inline void __syncthreads() { emulated::block->barrier.arrive_and_wait(); }
inline void __syncwarp() { emulated::warp().barrier.arrive_and_wait(); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline float __shfl_sync(uint32_t, float value, int lane, int width) {
  uint32_t all[32][1];
  emulated::exchange({std::bit_cast<uint32_t>(value)}, all);
  return std::bit_cast<float>(all[emulated::lane() / width * width + lane][0]);
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  uint32_t all[32][1];
  emulated::exchange({value}, all);
  for (const auto& each : all) value = max(value, each[0]);
  return value;
}
inline void atomicOr(int* variable, int bits) { __atomic_fetch_or(variable, bits, __ATOMIC_RELAXED); }

namespace ternarize {

inline void copy_16_async(void* to, const void* from, int bytes) { emulated::copy_async(to, from, bytes, 16); }
inline void copy_4_async(void* to, const void* from, int bytes) { emulated::copy_async(to, from, bytes, 4); }
inline void commit_copies() {
  emulated::commits.push_back(std::move(emulated::copies));
  emulated::copies.clear();
}
// Nothing arrives before it is waited for: the latest that the hardware could be.
template <int COMMITS>
void wait_for_copies() {
  for (; emulated::commits.size() > COMMITS; emulated::commits.pop_front())
    for (const auto& copy : emulated::commits.front()) std::copy(copy.bytes.begin(), copy.bytes.end(), copy.to);
}
inline uint2 load_activations(const void* address) {
  emulated::require(reinterpret_cast<uintptr_t>(address) % 8 == 0, "misaligned");
  emulated::require_readable(address, 8);
  return *static_cast<const uint2*>(address);
}
inline float load_scale(const float* address) {
  emulated::require_readable(address, 4);
  return *address;
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
  const auto offset = reinterpret_cast<uint8_t*>(variable) - emulated::block->memory;
  *reinterpret_cast<float*>(emulated::cluster->blocks[rank]->memory + offset) = value;
}
inline void cluster_started() {}
inline void cluster_arrive() {}
inline void cluster_wait() { emulated::cluster->barrier.arrive_and_wait(); }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

}  // namespace ternarize
