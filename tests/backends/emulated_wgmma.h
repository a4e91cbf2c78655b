// wgmma.cuh for the CPU, on emulated_hopper.h.
//
// A load empties the place it goes to when it begins, and arrives when nothing else can happen: what is read too early, or
// overwritten too early, is not a number. Products are formed, and stores read shared memory, when they are waited for.
// Fragments, descriptors and the places of swizzled bytes are those of the PTX manual.
#include "emulated_hopper.h"

// Of a row-major tensor, the last of whose dimensions TMA counts first.
struct CUtensorMap {
  uint8_t* data;
  int64_t extents[3];
  int box[3];
  int element_bytes;
  int swizzle;  // bytes
  int written_by_previous_kernel;

  int row_bytes() const { return box[0] * element_bytes; }
  int bytes() const { return row_bytes() * box[1] * box[2]; }
};

namespace emulated {

struct Mbarrier {
  uint8_t arrivals, pending, phase, unused;
  int bytes;  // that are to come in this phase

  bool ready() const { return phase <= 1; }
  void end_phase() {
    if (pending > 0 || bytes > 0) return;
    pending = arrivals;
    phase ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
inline Mbarrier& mbarrier(uint64_t* barrier) {
  require_shared(barrier, 8);
  return *reinterpret_cast<Mbarrier*>(barrier);
}
inline void arrive(uint64_t* barrier, int bytes) {
  Mbarrier& b = mbarrier(barrier);
  require(b.phase <= 1, "arrives at a barrier before barrier_init");
  require(b.pending > 0, "arrives at a barrier once more than its phase expects");
  --b.pending;
  b.bytes += bytes;
  b.end_phase();
}

// The place of a byte: of its address in shared memory, the bits from 4 on are flipped by those from 7 on.
inline uint8_t* swizzled(Block& block, uint8_t* address, int swizzle) {
  const size_t offset = address - block.memory;
  return block.memory + (offset ^ (offset >> 3 & (swizzle - 16)));
}

// Calls copy(byte in memory, byte in shared memory), with nullptr for memory outside the tensor.
template <typename Copy>
void for_each_byte(const CUtensorMap& map, Block& block, uint8_t* shared, int column, int row, Copy copy) {
  const int64_t row_bytes = map.extents[0] * map.element_bytes;
  for (int plane = 0; plane < map.box[2]; ++plane)
    for (int r = 0; r < map.box[1]; ++r)
      for (int i = 0; i < map.row_bytes(); ++i, ++shared) {
        const int64_t at = static_cast<int64_t>(column) * map.element_bytes + i;
        const bool inside = at < row_bytes && row + r < map.extents[1] && plane < map.extents[2];
        copy(inside ? map.data + (plane * map.extents[1] + row + r) * row_bytes + at : nullptr,
             swizzled(block, shared, map.swizzle));
      }
}
inline void require_box(const CUtensorMap& map, const void* shared) {
  require(reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.extents[0] * map.element_bytes % 16 == 0,
          "TMA needs rows of multiples of 16 bytes");
  require(map.row_bytes() == map.swizzle, "a row of a box is not as long as its swizzle");
  require((static_cast<const uint8_t*>(shared) - block().memory) % (8 * map.swizzle) == 0,
          "a box does not start where its swizzle does");
  require_shared(shared, map.bytes());
}
inline void load(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  require(current->waited_for_previous_kernel || !map->written_by_previous_kernel,
          "loads x before the previous kernel has written it");
  require_box(*map, to);
  std::memset(to, 0xFF, map->bytes());
  cluster->arrivals.push_back([=, block = &block(), shared = static_cast<uint8_t*>(to)] {
    for_each_byte(*map, *block, shared, column, row,
                  [](const uint8_t* from, uint8_t* to) { *to = from == nullptr ? 0 : *from; });
    auto& b = *reinterpret_cast<Mbarrier*>(barrier);
    b.bytes -= map->bytes();
    b.end_phase();
  });
}

template <typename Float>
float number(uint32_t word, int i) {
  return std::bit_cast<float>(ternarize::float_bits<Float>(word >> 16 * i & 0xFFFF));
}

// Of what a descriptor has above an address in units of 16 bytes: the swizzle; below it, of transposed matrices, the bytes
// from 64 columns to the next.
constexpr int DESCRIPTOR_SWIZZLE = 60, DESCRIPTOR_STRIDE = 44;
inline uint8_t* matrix_of(uint64_t descriptor) {
  return reinterpret_cast<uint8_t*>((descriptor & ((1ull << DESCRIPTOR_STRIDE) - 1)) << 4);
}

// Both rows of a column of d.
template <typename Sum, int K>
void add_products(Sum* d, const Sum (&a)[2][K], const Sum (&b)[K], bool add) {
  for (int half = 0; half < 2; ++half) {
    Sum sum = 0;
    for (int k = 0; k < K; ++k) sum += a[half][k] * b[k];
    Sum& to = d[half * 2];
    to = add ? to + sum : sum;
  }
}

// The fragment of this lane, d = A · B or d += A · B, of its product ``index`` in the warp, for operands with ``PER_WORD``
// values in a register, which decode(word, place) takes from it.
template <int PER_WORD, int N, typename Sum, typename Decode>
void multiply(Sum* d, size_t index, uint64_t descriptor, bool add, Decode decode) {
  const int swizzle = descriptor >> DESCRIPTOR_SWIZZLE << 4;
  uint8_t* const matrix = matrix_of(descriptor);
  constexpr int K = 8 * PER_WORD;
  Sum a[2][K];
  for (int q = 0; q < 4; ++q) {
    const auto& registers = block().threads[current->index.x / 4 * 4 + q]->operands[index];
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < PER_WORD; ++i) a[r % 2][r / 2 * K / 2 + PER_WORD * q + i] = decode(registers[r], i);
  }
  for (int n8 = 0; n8 < N; n8 += 8)
    for (int i = 0; i < 2; ++i) {
      Sum b[K];
      for (int k = 0; k < K; ++k) {
        uint32_t word;
        std::memcpy(&word, swizzled(block(), matrix + (n8 + lane() % 4 * 2 + i) * swizzle + k / PER_WORD * 4, swizzle),
                    4);
        b[k] = decode(word, k % PER_WORD);
      }
      add_products(d + n8 / 2 + i, a, b, add);
    }
}

// 16 rows of a column of a transposed matrix.
template <typename Float>
void read_transposed(uint64_t descriptor, int column, float (&to)[16]) {
  const uint64_t stride = (descriptor >> DESCRIPTOR_STRIDE & 0xFFFF) << 4;
  uint8_t* const box = matrix_of(descriptor) + column / 64 * stride;
  for (int k = 0; k < 16; ++k) {
    uint16_t bits;
    std::memcpy(&bits, swizzled(block(), box + k * 128 + column % 64 * 2, 128), 2);
    to[k] = number<Float>(bits, 0);
  }
}
// The same of d = Aᵀ · B or d += Aᵀ · B.
template <typename Float, int N>
void multiply_transposed(float* d, uint64_t a_descriptor, uint64_t b_descriptor, bool add) {
  float a[2][16], b[16];
  for (int half = 0; half < 2; ++half)
    read_transposed<Float>(a_descriptor, current->index.x % 128 / 32 * 16 + lane() / 4 + half * 8, a[half]);
  for (int n8 = 0; n8 < N; n8 += 8)
    for (int i = 0; i < 2; ++i) {
      read_transposed<Float>(b_descriptor, n8 + lane() % 4 * 2 + i, b);
      add_products(d + n8 / 2 + i, a, b, add);
    }
}

// Gives an operand of this thread to its warpgroup; multiplied(index) forms the product.
template <typename Product>
void begin_product(const uint32_t* a, Product product) {
  auto* const thread = current;
  require(thread->may_multiply, "wgmma without wgmma_fence");
  const size_t index = thread->operands.size();
  thread->operands.push_back({a[0], a[1], a[2], a[3]});
  thread->products.begin([=] { product(index); });
}

}  // namespace emulated

namespace ternarize {

inline void barrier_init(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  emulated::mbarrier(barrier) = {count, count, 0, 0, 0};
}
inline void barriers_ready() {}
inline void barrier_arrive(uint64_t* barrier) { emulated::arrive(barrier, 0); }
inline void barrier_expect(uint64_t* barrier, int bytes) { emulated::arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const auto& b = emulated::mbarrier(barrier);
  emulated::require(b.phase <= 1, "waits at a barrier before barrier_init");
  emulated::wait_until("barrier_wait", [&b, parity] { return b.phase != parity; });
}

inline void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  emulated::require(map->box[2] == 1, "load_box of a map with three dimensions");
  emulated::load(to, map, column, row, barrier);
}
inline void load_box_of_planes(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  emulated::require(map->box[2] > 1, "load_box_of_planes of a map with two dimensions");
  emulated::load(to, map, column, row, barrier);
}
inline void store_box(const CUtensorMap* map, const void* from, int column, int row) {
  emulated::require_box(*map, from);
  const int warpgroup = emulated::current->index.x / 128;
  for (int i = 0; i < 128; ++i)
    emulated::require(!emulated::block().threads[warpgroup * 128 + i]->must_fence_for_tma,
                      "stores a box before all that wrote it fenced");
  auto* const shared = static_cast<uint8_t*>(const_cast<void*>(from));
  emulated::current->stores.begin([=] {
    emulated::for_each_byte(*map, emulated::block(), shared, column, row, [](uint8_t* to, const uint8_t* from) {
      if (to != nullptr) *to = *from;
    });
  });
  emulated::current->stores.commit();
}
template <int PENDING>
void stores_read() {
  emulated::current->stores.wait(PENDING);
}
inline void fence_for_tma() { emulated::current->must_fence_for_tma = false; }

inline void named_barrier(int id, int threads) {
  auto& barrier = emulated::block().named_barriers[id];
  barrier.threads = threads;
  barrier.arrive_and_wait("named_barrier");
}
inline void named_barrier_arrive(int id, int threads) {
  auto& barrier = emulated::block().named_barriers[id];
  barrier.threads = threads;
  barrier.arrive();
}

inline bool any_of(int id, int threads, bool condition) {
  auto& block = emulated::block();
  // The answer stands until all have read it.
  if (condition) block.any[id] = true;
  named_barrier(id, threads);
  const bool any = block.any[id];
  named_barrier(id, threads);
  block.any[id] = false;
  named_barrier(id, threads);
  return any;
}

inline double load_local(const double* variable) { return *variable; }
inline void store_local(double* variable, double value) { *variable = value; }

template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

inline void store_to_rank(float4* place, int rank, const float* value) {
  emulated::require_shared(place, 16);
  const auto offset = reinterpret_cast<uint8_t*>(place) - emulated::block().memory;
  std::memcpy(emulated::cluster->blocks[rank].memory + offset, value, 16);
}

inline void store_transposed(void* row, const uint32_t (&values)[4]) {
  emulated::require_shared(row, 16);
  uint32_t all[32][4];
  emulated::exchange(values, all);
  const int matrix = emulated::lane() / 8, r = emulated::lane() % 8;
  for (int column = 0; column < 8; ++column)
    static_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(all[column * 4 + r / 2][matrix] >> r % 2 * 16);
  emulated::current->must_fence_for_tma = true;
}

// As wgmma has it, in units of 16 bytes; above the address, the swizzle.
template <int ROW_BYTES>
uint64_t matrix_descriptor(const void* matrix) {
  return reinterpret_cast<uint64_t>(matrix) >> 4 | ROW_BYTES / 16ull << emulated::DESCRIPTOR_SWIZZLE;
}
template <int ROWS>
uint64_t transposed_descriptor(const void* matrix) {
  return reinterpret_cast<uint64_t>(matrix) >> 4 | static_cast<uint64_t>(ROWS * 128 >> 4) << emulated::DESCRIPTOR_STRIDE |
         128ull >> 4 << emulated::DESCRIPTOR_SWIZZLE;
}
template <typename Float, int N>
void wgmma(float* d, const uint32_t* a, uint64_t b, bool add) {
  emulated::begin_product(a, [=](size_t index) {
    emulated::multiply<2, N>(d, index, b, add, emulated::number<Float>);
  });
}
template <int N>
void wgmma(int* d, const uint32_t* a, uint64_t b) {
  emulated::begin_product(a, [=](size_t index) {
    emulated::multiply<4, N>(d, index, b, true, [](uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); });
  });
}
template <typename Float, int N>
void wgmma_transposed(float* d, uint64_t a, uint64_t b, bool add) {
  emulated::require(emulated::current->may_multiply, "wgmma without wgmma_fence");
  emulated::current->products.begin([=] { emulated::multiply_transposed<Float, N>(d, a, b, add); });
}
inline void wgmma_fence() { emulated::current->may_multiply = true; }
inline void wgmma_commit() {
  emulated::current->may_multiply = false;
  emulated::current->products.commit();
}
// Waits for its warp, not for the other warps of the warpgroup: no more is promised.
template <int PENDING>
void wgmma_wait() {
  __syncwarp();
  emulated::current->products.wait(PENDING);
  __syncwarp();
}
template <typename Registers>
void keep(Registers&) {}

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
inline uint32_t multiply_bfloat16(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 2; ++i) {
    const float value = emulated::number<__nv_bfloat16>(a, i) * emulated::number<__nv_bfloat16>(b, i);
    product |= static_cast<uint32_t>(rounded<__nv_bfloat16>(value).bits) << 16 * i;
  }
  return product;
}
template <typename Float>
uint32_t rounded_pair(float low, float high) {
  const uint32_t bits = std::bit_cast<uint16_t>(rounded<Float>(high));
  return bits << 16 | std::bit_cast<uint16_t>(rounded<Float>(low));
}
template <typename Float>
bool is_finite_pair(uint32_t pair) {
  return isfinite(emulated::number<Float>(pair, 0)) && isfinite(emulated::number<Float>(pair, 1));
}

}  // namespace ternarize
