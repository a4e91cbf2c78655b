// x of linear_decode.cuh: in shared memory, in the order in which a lane of mma takes it. Letters and names as there.
//
// Floats lie as [chunk][plane][token][lane of a quad], 16 bytes, which are the column pairs for each b. int8 lies as
// [chunk][two planes][token][lane of a quad][plane], 8 bytes, and of groups of 64 as
// [chunk][group][token][lane of a quad][plane], 4 bytes.
#include <stdint.h>

#include <type_traits>

namespace ternarize {

constexpr int CHUNK = 128;  // weights

template <typename X, int TOKENS, int K, int GROUP>
struct Activations {
  static constexpr int CHUNK_BYTES = CHUNK * TOKENS * sizeof(X);
  static constexpr int SCALES = GROUP < CHUNK ? CHUNK / GROUP : 1;
  // Pieces that a thread loads before it stores the first: x comes from L2, one latency for all of them.
  static constexpr int BATCH = 4;

  const X* x;  // [M, K]
  int M;

  // 8 bytes of a plane, of consecutive bytes of a chunk; zeros past the end.
  __device__ __forceinline__ uint2 load(int m, int chunk, int plane, int byte) const {
    constexpr int GROUP_CHUNKS = (GROUP + CHUNK - 1) / CHUNK;
    const int group = GROUP < CHUNK ? chunk * SCALES + byte / 16 : chunk / GROUP_CHUNKS;
    const int size = min(GROUP, K - group * GROUP);
    const int place = GROUP < CHUNK ? byte % 16 : chunk % GROUP_CHUNKS * 32 + byte;
    if (m >= M || place >= size / 4) return uint2{0, 0};
    return load_activations(x + static_cast<int64_t>(m) * K + group * GROUP + plane * (size / 4) + place);
  }

  // Writes so many chunks from ``first`` to s_x. By THREADS threads.
  template <int THREADS>
  __device__ __forceinline__ void stage(uint8_t* s_x, int first, int chunks) const {
    const int pieces = chunks * 16 * TOKENS;
    for (int i = threadIdx.x; i < pieces; i += BATCH * THREADS) {
      uint2 values[BATCH][2];
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (i + b * THREADS < pieces) load_piece(values[b], i + b * THREADS, first);
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
        if (i + b * THREADS < pieces) store_piece(s_x, i + b * THREADS, values[b]);
    }
  }

  // 16 bytes of floats, in the order of s_x; or 8 of int8, in the order of x.
  __device__ __forceinline__ void load_piece(uint2 (&v)[2], int i, int first) const {
    if constexpr (std::is_same_v<X, int8_t>) {
      const int eight = i % 4, plane = i / 4 % 4, m = i / 16 % TOKENS, chunk = i / 16 / TOKENS;
      v[0] = load(m, first + chunk, plane, eight * 8);
    } else {
      const int q = i % 4, m = i / 4 % TOKENS, plane = i / 4 / TOKENS % 4, chunk = i / 16 / TOKENS;
      v[0] = load(m, first + chunk, plane, SCALES == 1 ? 8 * q : 4 * q);
      v[1] = load(m, first + chunk, plane, SCALES == 1 ? 8 * q + 4 : 16 + 4 * q);
    }
  }

  __device__ __forceinline__ void store_piece(uint8_t* s_x, int i, const uint2 (&v)[2]) const {
    if constexpr (!std::is_same_v<X, int8_t>) {
      const uint32_t even_v = __byte_perm(v[0].x, v[0].y, 0x5410), odd_v = __byte_perm(v[0].x, v[0].y, 0x7632);
      const uint32_t even_w = __byte_perm(v[1].x, v[1].y, 0x5410), odd_w = __byte_perm(v[1].x, v[1].y, 0x7632);
      reinterpret_cast<uint4*>(s_x)[i] =
          SCALES == 1 ? uint4{even_v, even_w, odd_v, odd_w} : uint4{even_v, odd_v, even_w, odd_w};
      return;
    }
    const int eight = i % 4, plane = i / 4 % 4, m = i / 16 % TOKENS, chunk = i / 16 / TOKENS;
    if constexpr (SCALES == 1) {
      reinterpret_cast<uint2*>(s_x)[((chunk * 2 + plane / 2) * TOKENS + m) * 8 + eight * 2 + plane % 2] = v[0];
    } else {
      // Of two lanes of a quad.
      uint32_t* const to =
          reinterpret_cast<uint32_t*>(s_x) + ((chunk * 2 + eight / 2) * TOKENS + m) * 16 + eight % 2 * 8 + plane;
      to[0] = v[0].x;
      to[4] = v[0].y;
    }
  }
};

}  // namespace ternarize
