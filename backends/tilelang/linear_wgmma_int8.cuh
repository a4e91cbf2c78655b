// Sums of linear_wgmma.cuh for int8 activations, exact in int32.
//
// Scales. The exponent of a group is folded into the operand: a trit becomes T · (64 >> (base - E)), where the base of a
// row is its largest exponent. So one int32 sum, in units of 2^(base - 6), runs over all of K, and groups cost nothing.
// Where E is more than 6 below the base, the base moves: the sums so far are added to others in float64, in local memory,
// and start again. That is slow, rare (scales of one row that differ by more than 2^6) and exact for every exponent.
#include <stdint.h>

namespace ternarize {

// Exponents below the base that an operand of 8 bits holds.
constexpr int WINDOW = 6;

// Of E (ternarize/packing.py). A block that is left without steps of a tile has the least one as its base.
constexpr int LEAST_EXPONENT = -126, LARGEST_EXPONENT = 127;

// The operand A of wgmma for one product, 32 columns of a group: T · (64 >> shift[row]), for the rows r and r + 8.
//
// In each 16 columns a thread has the four from 4q, q its place in its quad. They are the same plane of four neighbouring
// bytes, a word of T_packed: 16 packed bytes are four planes of 16 columns each. Two planes lie in the nibbles of the
// word, which are selectors of a byte permutation of the four values 0, v, -, -v; a second one deals out the results of
// one plane. Groups from 128 on: the 32 bytes of a step are four products, a plane each. A group of 64 is 16 bytes, and
// two products of two planes. A group of 32 is 8 bytes of four planes of 8 columns: two planes make 16 columns.
//
// words: [row][16 bytes], from byte 4q; of a group of 32, from byte 4 (q % 2) of its 8.
template <int GROUP>
__device__ __forceinline__ void decode_int8(const uint32_t (&words)[2][GROUP == 128 ? 2 : 1], const int (&shift)[2],
                                            int product, uint32_t* registers) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = r % 2, upper = r / 2;
    const int plane = GROUP == 128 ? product : GROUP == 64 ? 2 * product + upper : 2 * upper;
    const int place = GROUP == 32 ? threadIdx.x % 4 / 2 * 2 : plane % 2 * 2;
    // Bytes 0, 64, 0 and -64, whose bits stay within their bytes in shifts up to 6.
    const uint32_t values = static_cast<int>(0xC0004000) >> shift[row];
    const uint32_t nibbles = words[row][GROUP == 128 ? upper : 0] >> place & 0x33333333u;
    registers[r] =
        permute(permute(values, 0, nibbles), permute(values, 0, nibbles >> 16), plane < 2 ? 0x6420 : 0x7531);
  }
}

// The largest and the least exponent of rows, of the groups from ``first`` to ``last - 1``. The lanes of a quad ask for the
// same rows, and read a share each.
template <int G, int ROWS>
__device__ __forceinline__ void exponent_range(const int8_t* E, int N, const int (&rows)[ROWS], int first, int last,
                                               int (&largest)[ROWS], int (&least)[ROWS]) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    largest[row] = LEAST_EXPONENT;
    least[row] = LARGEST_EXPONENT;
  }
  // Rows need not start at a whole word: one more may be touched.
  for (int i = threadIdx.x % 4; i < (last - first + 3) / 4 + 1; i += 4) {
    uint32_t words[ROWS];
    int places[ROWS];  // of the first of the word's exponents, from ``first`` on
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int begin = min(rows[row], N - 1) * G + first;
      places[row] = i * 4 - begin % 4;
      words[row] = exponent_word<G>(E, N, begin / 4 + i);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int exponent = static_cast<int>(words[row] << (24 - 8 * j)) >> 24;
        const bool inside = static_cast<unsigned>(places[row] + j) < static_cast<unsigned>(last - first);
        if (inside) largest[row] = max(largest[row], exponent);
        if (inside) least[row] = min(least[row], exponent);
      }
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      largest[row] = max(largest[row], __shfl_xor_sync(0xFFFFFFFFu, largest[row], lanes));
      least[row] = min(least[row], __shfl_xor_sync(0xFFFFFFFFu, least[row], lanes));
    }
}

// Adds sums in units of 2^(base - 6), with a base for row r and one for row r + 8, to ``exact``, and clears them.
template <int COUNT>
__device__ __forceinline__ void move_to_float64(int (&sums)[COUNT], int base, int base_below, double* exact) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const double unit = exp2_int(i / 2 % 2 ? base_below : base) * (1.0 / (1 << WINDOW));
    store_local(exact + i, load_local(exact + i) + sums[i] * unit);
    sums[i] = 0;
  }
}

// The sums of this thread for a tile, times the scales of their tokens.
template <typename S>
__device__ __forceinline__ void sum_up_int8(const Work& work, Stages<S>& stages, const float* scale, int M,
                                            float (&sums)[S::ROW_TILES][S::SUMS]) {
  constexpr int ROW_TILES = S::ROW_TILES, GROUP = S::GROUP, GROUPS_PER_STEP = S::GROUPS_PER_STEP;
  constexpr int WORDS = GROUP == 128 ? 2 : 1;  // of a row and group

  // wgmma are issued in batches: while the tensor cores work on one, the operand of the next is decoded, in the registers
  // of the one before. So the loop needs an even number of them. Of one row tile, a group of 32 is one product.
  constexpr int BATCHES_PER_TILE = GROUP == 32 ? 1 : 2, BATCHES = BATCHES_PER_TILE * ROW_TILES;
  constexpr int PRODUCTS = GROUP == 128 ? 2 : 1;  // of a batch
  constexpr int IN_FLIGHT = BATCHES % 2 == 0 ? 1 : 0;

  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  // Rows row and row + 8 of each 64; 16 bytes are swapped in every other four rows. Where a row's words lie, in the first
  // 16 bytes and in the last, is kept: the compiler would rather find it out at each step.
  const int row = thread / 32 * 16 + lane / 4;
  int places[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    places[i] = row * S::PACKED_ROW_BYTES + (i ^ lane / 16) * 16 + lane % (GROUP == 32 ? 2 : 4) * 4;
  keep(places);
  int rows[2 * ROW_TILES];
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) rows[r] = work.n0 + (warpgroup * ROW_TILES + r / 2) * 64 + row + r % 2 * 8;

  // The loop goes from group to group; through one of more than 128 weights step by step. Past the last there are only
  // zeros.
  auto group_of = [](int part) { return GROUP == 128 ? part / S::STEPS_PER_GROUP : min(part, S::G - 1); };
  const int first = work.first * GROUPS_PER_STEP, last = work.last * GROUPS_PER_STEP;

  Exponents<S::G> exponents[2 * ROW_TILES];
  int base[2 * ROW_TILES], least[2 * ROW_TILES];
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) exponents[r].start(work.layer.E, work.layer.N, rows[r], group_of(first));
  exponent_range<S::G>(work.layer.E, work.layer.N, rows, group_of(first), group_of(last - 1) + 1, base, least);
  bool differ = false;
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) differ |= base[r] - least[r] > WINDOW;
  // The scales of the tokens come from the kernel before this one, as x does.
  float* const token_scales = stages.scales + warpgroup * S::BLOCK_M;
  wait_for_previous_kernel();
  for (int i = thread; i < S::BLOCK_M; i += 128) token_scales[i] = load_scale(scale + min(work.m0 + i, M - 1));
  const bool bases_move = any_of(1 + warpgroup, 128, differ);

  int integers[ROW_TILES][S::SUMS] = {};
  int previous = -1;
  // Adds the products of a group and of a step.
  auto multiply = [&](int part) {
    const int group = group_of(part), index = part % GROUPS_PER_STEP;
    if (index == 0) barrier_wait(stages.full + stages.stage, stages.phase);
    const uint8_t* const packed = stages.stage_packed(warpgroup);
    // A group of less than 128 weights is part of a row of x in shared memory.
    const uint64_t x = matrix_descriptor<S::X_ROW_BYTES>(stages.stage_x()) + index * GROUP % 128 / 16;
    uint32_t words[2][WORDS];
#pragma unroll
    for (int batch = 0; batch < BATCHES; ++batch) {
      const int t = batch / BATCHES_PER_TILE;
      if (batch % BATCHES_PER_TILE == 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < WORDS; ++i) {
            const int byte = index * (GROUP / 4) + i * 16;
            words[half][i] = *reinterpret_cast<const uint32_t*>(
                packed + (byte < 16 ? places[0] : places[1]) + byte % 16 + (t * 64 + half * 8) * S::PACKED_ROW_BYTES);
          }
      const int shift[2] = {base[2 * t] - exponents[2 * t].at(group), base[2 * t + 1] - exponents[2 * t + 1].at(group)};
      // Products of one word's two planes go together.
      auto product = [&](int p) { return batch % BATCHES_PER_TILE + 2 * p; };
      uint32_t a[PRODUCTS * 4];
#pragma unroll
      for (int p = 0; p < PRODUCTS; ++p) decode_int8<GROUP>(words, shift, product(p), a + p * 4);
      keep(a);
      wgmma_fence();
#pragma unroll
      for (int p = 0; p < PRODUCTS; ++p)
        wgmma<S::BLOCK_M>(integers[t], a + p * 4, x + S::x_offset(product(p) * 32) / 16);
      wgmma_commit();
      wgmma_wait<IN_FLIGHT>();
      if (batch == 0 && index == 0 && previous >= 0 && lane == 0) barrier_arrive(stages.empty + previous);
    }
    if (index == GROUPS_PER_STEP - 1) {
      previous = stages.stage;
      stages.advance();
    }
    const int next = group_of(part + 1);
    if (next % 4 == 0 && next != group && part + 1 < last)
#pragma unroll
      for (int r = 0; r < 2 * ROW_TILES; ++r) exponents[r].advance(work.layer.E, work.layer.N, next);
  };
  auto finish = [&] {
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) keep(integers[t]);
  };
  auto token_scale = [&](int i) { return token_scales[i / 4 * 8 + lane % 4 * 2 + i % 2]; };

  if (!bases_move) {
    for (int part = first; part < last; ++part) multiply(part);
    finish();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      const float unit[2] = {exp2_int(base[2 * t]), exp2_int(base[2 * t + 1])};
#pragma unroll
      for (int i = 0; i < S::SUMS; ++i)
        sums[t][i] = integers[t][i] * (token_scale(i) * (1.0f / (1 << WINDOW))) * unit[i / 2 % 2];
    }
  } else {
    double exact[ROW_TILES][S::SUMS];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
      for (int i = 0; i < S::SUMS; ++i) store_local(exact[t] + i, 0);
    for (int part = first; part < last; ++part) {
      // Just as far as it takes.
      int moved[2 * ROW_TILES];
      bool move = false;
#pragma unroll
      for (int r = 0; r < 2 * ROW_TILES; ++r) {
        const int E = exponents[r].at(group_of(part));
        moved[r] = max(E, min(base[r], E + WINDOW));
        move |= moved[r] != base[r];
      }
      if (any_of(1 + warpgroup, 128, move))
#pragma unroll
        for (int t = 0; t < ROW_TILES; ++t) {
          move_to_float64(integers[t], base[2 * t], base[2 * t + 1], exact[t]);
          base[2 * t] = moved[2 * t];
          base[2 * t + 1] = moved[2 * t + 1];
        }
      multiply(part);
      finish();
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
      move_to_float64(integers[t], base[2 * t], base[2 * t + 1], exact[t]);
#pragma unroll
      for (int i = 0; i < S::SUMS; ++i) sums[t][i] = load_local(exact[t] + i) * token_scale(i);
    }
  }
  if (previous >= 0 && lane == 0) barrier_arrive(stages.empty + previous);
}

}  // namespace ternarize
