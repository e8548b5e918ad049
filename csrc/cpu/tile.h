// Tiles of elements in arithmetic type, for the *_loops.cpp files only, each compiled once per
// instruction set: everything here has internal linkage.
#pragma once

#include <cstdint>
#include <type_traits>

#include "coopflow/reduction.h"
#include "coopflow/scalar_types.h"

// Before a loop over the elements of a tile: they do not depend on one another, which the compiler
// cannot know of tiles that lie in the tensors themselves.
#define COOPFLOW_ELEMENTWISE _Pragma("GCC ivdep")

namespace coopflow {
namespace {

constexpr int64_t kTile = 256;

// Sums run over this many interleaved lanes, which fixes their order for every vector width.
constexpr int64_t kLanes = 16;

template <typename T>
void load(const void* source, int64_t offset, int64_t n, arithmetic_t<T>* values) {
  const T* from = static_cast<const T*>(source) + offset;
  for (int64_t i = 0; i < n; ++i) values[i] = to_arithmetic(from[i]);
}

template <typename T, typename A>
void store(const A* values, int64_t offset, int64_t n, void* destination) {
  T* to = static_cast<T*>(destination) + offset;
  for (int64_t i = 0; i < n; ++i)
    to[i] = from_arithmetic<T>(static_cast<arithmetic_t<T>>(values[i]));
}

// Storage in the arithmetic type is used where it lies: copying it through a buffer takes longer
// than the arithmetic.
template <typename T>
constexpr bool kInPlace = std::is_same_v<T, arithmetic_t<T>>;

// n values to read, in the tensor itself or converted into the buffer.
template <typename T>
const arithmetic_t<T>* view(const void* source, int64_t offset, int64_t n,
                            arithmetic_t<T>* buffer) {
  if constexpr (kInPlace<T>) {
    return static_cast<const T*>(source) + offset;
  } else {
    load<T>(source, offset, n, buffer);
    return buffer;
  }
}

// Where results are to be written: in the tensor itself or in the buffer, which put_back stores.
template <typename T>
arithmetic_t<T>* room(void* destination, int64_t offset, arithmetic_t<T>* buffer) {
  if constexpr (kInPlace<T>) {
    return static_cast<T*>(destination) + offset;
  } else {
    return buffer;
  }
}

template <typename T>
void put_back(const arithmetic_t<T>* values, int64_t offset, int64_t n, void* destination) {
  if constexpr (!kInPlace<T>) store<T>(values, offset, n, destination);
}

// Calls f(first element, n) for the parts of a row: one, where nothing is converted through
// buffers.
template <typename T, typename F>
void for_each_part(int64_t per_row, const F& f) {
  const int64_t most = kInPlace<T> ? per_row : kTile;
  for (int64_t e = 0; e < per_row; e += most) f(e, per_row - e < most ? per_row - e : most);
}

template <typename A>
void add_by_lane(const A* values, int64_t n, A* lanes) {
  A sums[kLanes];  // a copy stays in registers
  for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += values[i + lane];
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += values[i];
}

// By halves, whose additions do not wait for one another.
template <int64_t kCount, typename A>
A sum_by_halves(const A (&lanes)[kCount]) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    constexpr int64_t kHalf = kCount / 2;
    A half[kHalf];
    for (int64_t lane = 0; lane < kHalf; ++lane) half[lane] = lanes[lane] + lanes[lane + kHalf];
    return sum_by_halves(half);
  }
}

// What n values added to the lanes; no more of them are read than so many values reach.
template <typename A>
A sum_lanes(const A* lanes, int64_t n) {
  A total = A(0);
  for (int64_t lane = 0; lane < (n < kLanes ? n : kLanes); ++lane) total += lanes[lane];
  return total;
}

// Calls f(chain, first element, n) for each tile of one chunk, where
// index = chain * chunks_per_chain + chunk.
template <typename F>
void for_each_tile_of_chunk(int64_t per_chain, int64_t index, const F& f) {
  const int64_t chunks = divide_up(per_chain, kReductionChunk);
  const int64_t chain = index / chunks;
  const int64_t begin = (index % chunks) * kReductionChunk;
  const int64_t left = per_chain - begin;
  const int64_t end = begin + (left < kReductionChunk ? left : kReductionChunk);
  for (int64_t e = begin; e < end; e += kTile) f(chain, e, end - e < kTile ? end - e : kTile);
}

}  // namespace
}  // namespace coopflow
