// CUDA C++ for the CPU: clusters of blocks of threads, each thread a coroutine.
//
// A thread runs until it waits, and then another that can, in random order, the same at every run. What the hardware does
// in the background happens late: when it is waited for, or when no thread can run but those of warps that sleep. If then
// nothing is left to happen, the kernel hangs, and ``run`` says what its threads wait for.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
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
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
using __half = _Float16;

namespace emulated {

struct Index {
  int x;
};
struct Block;

// What a thread has begun, in groups; it happens when it is waited for.
struct Groups {
  using Operation = std::function<void()>;
  std::vector<Operation> begun;
  std::deque<std::vector<Operation>> committed;

  void begin(Operation operation) { begun.push_back(std::move(operation)); }
  void commit() { committed.push_back(std::exchange(begun, {})); }
  void wait(size_t pending) {
    for (; committed.size() > pending; committed.pop_front())
      for (const auto& operation : committed.front()) operation();
  }
};

struct Thread {
  static constexpr size_t STACK_BYTES = 128 * 1024;

  Index index, block_index;
  int warp;  // of its cluster
  Block* block;
  std::function<bool()> ready;  // whether what it waits for has happened
  const char* waits_for = nullptr;
  bool done = false;
  Groups copies, stores, products;
  std::vector<std::array<uint32_t, 4>> operands;  // of wgmma, all that it ever gave
  bool waited_for_previous_kernel = false, may_multiply = false, must_fence_for_tma = false;

  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack = std::make_unique_for_overwrite<uint8_t[]>(STACK_BYTES);
};

inline Thread* current;
inline ucontext_t scheduler;
inline std::string failure;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void wait_until(const char* what, std::function<bool()> ready) {
  current->waits_for = what;
  current->ready = std::move(ready);
  if (!current->ready()) yield();
}
inline void require(bool condition, const char* message) {
  if (condition) return;
  failure = "thread " + std::to_string(current->index.x) + " of block " + std::to_string(current->block_index.x) +
            ": " + message;
  yield();
}

struct Barrier {
  explicit Barrier(int threads) : threads(threads) {}
  void arrive_and_wait(const char* what = "a barrier") {
    const int mine = phase;
    arrive();
    if (phase == mine) wait_until(what, [this, mine] { return phase != mine; });
  }
  void arrive() {
    if (++arrived < threads) return;
    arrived = 0;
    ++phase;
  }
  int threads, arrived = 0, phase = 0;
};

struct Warp {
  Barrier barrier{32};
  uint32_t words[32][6];
};

struct Block {
  Block(int count, size_t shared_bytes)
      : barrier(count), warps(count / 32), memory(new(std::align_val_t(1024)) uint8_t[shared_bytes]),
        shared_bytes(shared_bytes) {
    std::memset(memory, 0xFF, shared_bytes);  // NaN, if it is read before it is written
  }
  Block(const Block&) = delete;
  ~Block() { operator delete[](memory, std::align_val_t(1024)); }

  Barrier barrier;
  std::deque<Barrier> named_barriers = std::deque<Barrier>(16, Barrier(0));
  bool any[16] = {};  // of any_of, by barrier
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
  uint8_t* memory;
  size_t shared_bytes;
};

struct Cluster {
  Barrier barrier;
  std::deque<Block> blocks;
  std::deque<Thread> threads;
  std::vector<std::function<void()>> arrivals;  // loads on their way to shared memory, which signal barriers
};
inline Cluster* cluster;
inline Index grid;
inline std::function<void()> kernel;

struct Range {
  const uint8_t *begin, *end;
};
inline std::vector<Range> tensors;

inline Block& block() { return *current->block; }
inline Warp& warp() { return block().warps[current->index.x / 32]; }
inline int lane() { return current->index.x % 32; }

inline void require_readable(const void* from, size_t bytes) {
  const auto* const begin = static_cast<const uint8_t*>(from);
  require(std::ranges::any_of(tensors, [&](Range r) { return r.begin <= begin && begin + bytes <= r.end; }),
          "reads past the end of a tensor");
}
inline void require_shared(const void* address, size_t bytes) {
  const auto* const begin = static_cast<const uint8_t*>(address);
  require(block().memory <= begin && begin + bytes <= block().memory + block().shared_bytes,
          "leaves the shared memory of its block");
}

// The words that the lanes of a warp give, as all of them then see them.
template <int WORDS>
void exchange(const uint32_t (&mine)[WORDS], uint32_t (&all)[32][WORDS]) {
  std::copy_n(mine, WORDS, warp().words[lane()]);
  warp().barrier.arrive_and_wait();
  for (int i = 0; i < 32; ++i) std::copy_n(warp().words[i], WORDS, all[i]);
  warp().barrier.arrive_and_wait();
}

inline void run_thread() {
  kernel();
  require(current->stores.committed.empty(), "ends before its stores have read shared memory");
  current->done = true;
  yield();
}

inline void start_threads() {
  for (auto& thread : cluster->threads) {
    getcontext(&thread.context);
    thread.context.uc_stack = {.ss_sp = thread.stack.get(), .ss_flags = 0, .ss_size = Thread::STACK_BYTES};
    makecontext(&thread.context, run_thread, 0);
  }
}

// Runs the threads that can run, of the warps whose bit is not set in ``asleep``. Returns whether there were any.
inline bool run_some(std::vector<Thread*>& running, uint64_t asleep, std::mt19937_64& random) {
  std::ranges::shuffle(running, random);
  bool any = false;
  for (Thread* const thread : running) {
    if (asleep >> thread->warp % 64 & 1 || (thread->ready && !thread->ready())) continue;
    any = true;
    thread->ready = nullptr;
    current = thread;
    swapcontext(&scheduler, &thread->context);
    if (!failure.empty()) break;
  }
  std::erase_if(running, [](const Thread* thread) { return thread->done; });
  return any;
}

// Runs the threads of a cluster to their end, or to a failure. Now and then other warps sleep, so that they get apart.
inline void run_cluster(std::mt19937_64& random) {
  start_threads();
  std::vector<Thread*> running;
  for (auto& thread : cluster->threads) running.push_back(&thread);
  uint64_t asleep = 0;
  for (int round = 0; !running.empty() && failure.empty(); ++round) {
    if (round % 16 == 0) asleep = random();
    if (run_some(running, asleep, random)) continue;
    auto& arrivals = cluster->arrivals;
    if ((arrivals.empty() || random() % 2) && run_some(running, 0, random)) continue;
    if (running.empty()) return;
    if (arrivals.empty()) {
      current = running.front();
      failure = std::to_string(running.size()) + " threads wait for ever, thread " + std::to_string(current->index.x) +
                " of block " + std::to_string(current->block_index.x) + " for " + current->waits_for;
      return;
    }
    std::swap(arrivals[random() % arrivals.size()], arrivals.back());
    const auto arrival = std::move(arrivals.back());
    arrivals.pop_back();
    arrival();
  }
}

// Runs a kernel, cluster by cluster, and returns what it did wrong, or nullptr.
template <typename Function>
const char* run(int clusters, int cluster_size, int threads, size_t shared_bytes, Function function) {
  std::mt19937_64 random;
  failure.clear();
  kernel = [&] { function(block().memory); };
  grid = {clusters * cluster_size};
  for (int c = 0; c < clusters && failure.empty(); ++c) {
    Cluster this_cluster{Barrier(cluster_size * threads), {}, {}, {}};
    cluster = &this_cluster;
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block& block = this_cluster.blocks.emplace_back(threads, shared_bytes);
      for (int i = 0; i < threads; ++i) {
        Thread& thread = this_cluster.threads.emplace_back();
        thread.index = {i};
        thread.block_index = {c * cluster_size + rank};
        thread.warp = (rank * threads + i) / 32;
        thread.block = &block;
        block.threads.push_back(&thread);
      }
    }
    run_cluster(random);
  }
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace emulated

#define threadIdx emulated::current->index
#define blockIdx emulated::current->block_index
#define gridDim emulated::grid

inline void __syncthreads() { emulated::block().barrier.arrive_and_wait("__syncthreads"); }
inline void __syncwarp() { emulated::warp().barrier.arrive_and_wait("__syncwarp"); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
// Of two int16 in each word.
template <typename Function>
uint32_t in_halves(Function function, uint32_t a, uint32_t b, uint32_t c = 0) {
  uint32_t result = 0;
  for (int i : {0, 16}) {
    const auto half = [i](uint32_t word) { return static_cast<int16_t>(word >> i); };
    result |= static_cast<uint32_t>(static_cast<uint16_t>(function(half(a), half(b), half(c)))) << i;
  }
  return result;
}
inline uint32_t __vmaxs2(uint32_t a, uint32_t b) {
  return in_halves([](int x, int y, int) { return max(x, y); }, a, b);
}
inline uint32_t __viaddmin_s16x2(uint32_t a, uint32_t b, uint32_t c) {
  return in_halves([](int x, int y, int z) { return min(x + y, z); }, a, b, c);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline float __shfl_sync(uint32_t, float value, int lane, int width) {
  uint32_t all[32][1];
  emulated::exchange({std::bit_cast<uint32_t>(value)}, all);
  return std::bit_cast<float>(all[emulated::lane() / width * width + lane][0]);
}
template <typename Value>
Value __shfl_xor_sync(uint32_t, Value value, int mask) {
  uint32_t all[32][1];
  emulated::exchange({std::bit_cast<uint32_t>(value)}, all);
  return std::bit_cast<Value>(all[emulated::lane() ^ mask][0]);
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  uint32_t all[32][1];
  emulated::exchange({value}, all);
  for (const auto& each : all) value = max(value, each[0]);
  return value;
}
template <typename Value>
Value __ldg(const Value* address) {
  emulated::require(reinterpret_cast<uintptr_t>(address) % sizeof(Value) == 0, "misaligned");
  emulated::require_readable(address, sizeof(Value));
  return *address;
}
inline void atomicOr(int* variable, int bits) { *variable |= bits; }
