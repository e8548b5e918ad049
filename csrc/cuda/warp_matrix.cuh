// The product of a warp's tensor cores: sums (16 x 8, float32) += A (16 x 16) * B (16 x 8), both in
// bfloat16, as mma.sync.aligned.m16n8k16.row.col lays them out over the lanes (PTX manual, "Matrix
// Fragments for mma.m16n8k16 with floating point type"). With g = lane / 4 and t = lane % 4 a lane
// holds
//   of A: rows g and g + 8, in each columns 2t, 2t + 1, 2t + 8 and 2t + 9;
//   of B: column g, rows 2t, 2t + 1, 2t + 8 and 2t + 9;
//   of the sums: rows g and g + 8, in each columns 2t and 2t + 1.
// Every lane of the warp must take part in each call here.
//
// Beside the instructions stands what a host computes in their place, for an emulated device:
// products, which float32 holds exactly, are added to the sum in the order of k, each addition
// rounded. A GPU adds them in an order of its own, so its last bits may differ; but an element of
// the sums depends on its row of A and its column of B alone, on either.
#pragma once

#include <cstdint>
#include <cstring>

#include "coopflow/macros.h"
#include "coopflow/scalar_types.h"

namespace coopflow {

constexpr int kFragmentRows = 16;    // of A and of the sums
constexpr int kFragmentColumns = 8;  // of B and of the sums
constexpr int kFragmentLength = 16;  // of a row of A and of a column of B

// Two neighbours a word: rows g and g + 8 of the first eight columns, then of the others.
struct MatrixA {
  uint32_t words[4];
};

// Rows 2t and 2t + 1, then 2t + 8 and 2t + 9.
struct MatrixB {
  uint32_t words[2];
};

// Row g columns 2t and 2t + 1, then row g + 8.
using MatrixSums = float[4];

// --- instructions --------------------------------------------------------------------------------
// load_quarters: four matrices of 8 x 8. Lane l gives the address, on 16 bytes, of row l % 8 of
// matrix l / 8, and receives of each matrix columns 2t and 2t + 1 of row g; of the transposed
// matrices where kTransposed.
#if defined(__CUDACC__)
template <bool kTransposed>
__device__ __forceinline__ void load_quarters(const bfloat16* row, uint32_t (&words)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

__device__ __forceinline__ void multiply_accumulate(const MatrixA& a, const MatrixB& b,
                                                    MatrixSums& sums) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
        "r"(b.words[1]));
}
#else
template <bool kTransposed>
void load_quarters(const bfloat16* row, uint32_t (&words)[4],
                   cuda_emulation::Place place = cuda_emulation::Place::here()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    cuda_emulation::fail_thread("ldmatrix reads a row that does not begin on 16 bytes", place);
  }
  const uint64_t* const addresses =
      cuda_emulation::meet_in_warp("ldmatrix", 0xFFFFFFFFu, reinterpret_cast<uint64_t>(row), place);
  const int g = cuda_emulation::lane() / 4, t = cuda_emulation::lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto entry = [&](int i, int k) {
      return reinterpret_cast<const bfloat16*>(addresses[8 * matrix + i])[k];
    };
    const bfloat16 pair[2] = {kTransposed ? entry(2 * t, g) : entry(g, 2 * t),
                              kTransposed ? entry(2 * t + 1, g) : entry(g, 2 * t + 1)};
    std::memcpy(&words[matrix], pair, sizeof(pair));
  }
}

inline void multiply_accumulate(const MatrixA& a, const MatrixB& b, MatrixSums& sums,
                                cuda_emulation::Place place = cuda_emulation::Place::here()) {
  const int g = cuda_emulation::lane() / 4, t = cuda_emulation::lane() % 4;
  float rows[2][kFragmentLength], columns[2][kFragmentLength];
  // Sets entries k to k + 3 of a row or column, two of each half of it, to those of another lane.
  const auto unpack = [](uint64_t words, int k, float* first, float* second) {
    bfloat16 entries[4];
    std::memcpy(entries, &words, sizeof(entries));
    for (int i = 0; i < 2; ++i) {
      first[k + i] = to_arithmetic(entries[i]);
      second[k + i] = to_arithmetic(entries[2 + i]);
    }
  };
  const auto exchange = [&](uint32_t first, uint32_t second) {
    return cuda_emulation::meet_in_warp("mma", 0xFFFFFFFFu, uint64_t{second} << 32 | first, place);
  };
  for (int half = 0; half < 2; ++half) {
    const uint64_t* const all = exchange(a.words[2 * half], a.words[2 * half + 1]);
    for (int u = 0; u < 4; ++u) unpack(all[4 * g + u], 8 * half + 2 * u, rows[0], rows[1]);
  }
  const uint64_t* const all = exchange(b.words[0], b.words[1]);
  for (int c = 0; c < 2; ++c) {
    for (int u = 0; u < 4; ++u) {
      unpack(all[4 * (2 * t + c) + u], 2 * u, columns[c], columns[c] + 8);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < kFragmentLength; ++k) sums[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}
#endif

// --- fragments -----------------------------------------------------------------------------------
// This lane's place among the sums: rows row and row + 8, columns column and column + 1.
struct FragmentPlace {
  int row, column;
};

__device__ __forceinline__ FragmentPlace fragment_place(int lane) {
  return {lane / 4, 2 * (lane % 4)};
}

// From shared memory, A(i, k) = corner[i * stride + k]; or corner[k * stride + i] where
// kTransposed. stride must be an odd multiple of 8: then the rows of a quarter begin in different
// banks, eight of 16 bytes fill all of them, and either way reads without a conflict.
template <bool kTransposed>
__device__ __forceinline__ MatrixA load_a(const bfloat16* corner, int stride, int lane) {
  // The second quarter has rows 8 to 15 of A, the third columns 8 to 15.
  const int in_quarter = lane % 8, lower = 8 * (lane / 8 % 2), right = 8 * (lane / 16);
  const int row = in_quarter + (kTransposed ? right : lower);  // as they are stored
  const int column = kTransposed ? lower : right;
  MatrixA a;
  load_quarters<kTransposed>(corner + row * stride + column, a.words);
  return a;
}

// From shared memory, B(k, j) = corner[j * stride + k]. With a stride as above, words of lanes are
// 4 * (an odd number) * g + t apart: each in a bank of its own.
__device__ __forceinline__ MatrixB load_b(const bfloat16* corner, int stride, int lane) {
  const FragmentPlace at = fragment_place(lane);
  const bfloat16* const from = corner + at.row * stride + at.column;
  MatrixB b;
  b.words[0] = *reinterpret_cast<const uint32_t*>(from);
  b.words[1] = *reinterpret_cast<const uint32_t*>(from + 8);
  return b;
}

// The same of columns j < 8 and of eight more; or B(k, j) = corner[k * stride + j] where
// kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_b_pair(const bfloat16* corner, int stride, int lane,
                                            MatrixB (&b)[2]) {
  // The second quarter has rows 8 to 15 of B, the third its columns 8 to 15.
  const int in_quarter = lane % 8, lower = 8 * (lane / 8 % 2), right = 8 * (lane / 16);
  const int row = in_quarter + (kTransposed ? lower : right);  // as they are stored
  const int column = kTransposed ? right : lower;
  uint32_t words[4];
  load_quarters<kTransposed>(corner + row * stride + column, words);
  b[0] = {{words[0], words[1]}};
  b[1] = {{words[2], words[3]}};
}

// Sums of 16 columns, rounded, as the factor A of another product.
__device__ __forceinline__ MatrixA round_to_a(const MatrixSums& left, const MatrixSums& right) {
  const auto round = [](float first, float second) {
    bfloat16 pair[2];
    from_arithmetic_pair<bfloat16>(first, second, pair);
    uint32_t word;
    memcpy(&word, pair, sizeof(word));
    return word;
  };
  return {{round(left[0], left[1]), round(left[2], left[3]), round(right[0], right[1]),
           round(right[2], right[3])}};
}

}  // namespace coopflow
