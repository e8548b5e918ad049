// Several neighbouring elements moved to and from memory at once, 16 bytes an access where they
// are enough, and held in arithmetic type.
#pragma once

#include <cstdint>
#include <cstring>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"
#include "coopflow/scalar_types.h"

namespace coopflow {

template <int kBytes>
struct AccessWord;
template <>
struct AccessWord<16> {
  using type = Word16;
};
template <>
struct AccessWord<8> {
  using type = Word8;
};

template <typename T, int kCount>
struct PackedLayout {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kAccess = kBytes >= 16 ? 16 : kBytes;
  using Word = typename AccessWord<kAccess>::type;
  static constexpr int kWords = kBytes / kAccess;
  static_assert(kBytes % kAccess == 0, "a packed group must fill its accesses");
};

// from must be aligned to the access size.
template <typename T, int kCount>
COOPFLOW_HD void load_packed(const T* from, arithmetic_t<T> (&values)[kCount]) {
  using Layout = PackedLayout<T, kCount>;
  typename Layout::Word words[Layout::kWords];
  COOPFLOW_UNROLL
  for (int w = 0; w < Layout::kWords; ++w) {
    words[w] = reinterpret_cast<const typename Layout::Word*>(from)[w];
  }
  T raw[kCount];
  memcpy(raw, words, sizeof(raw));
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = to_arithmetic(raw[i]);
}

template <typename T, int kCount>
COOPFLOW_HD void store_packed(const arithmetic_t<T> (&values)[kCount], T* to) {
  using Layout = PackedLayout<T, kCount>;
  T raw[kCount];
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; i += 2) {
    from_arithmetic_pair<T>(values[i], values[i + 1], raw + i);
  }
  typename Layout::Word words[Layout::kWords];
  memcpy(words, raw, sizeof(raw));
  COOPFLOW_UNROLL
  for (int w = 0; w < Layout::kWords; ++w) {
    store_word(words[w], reinterpret_cast<typename Layout::Word*>(to) + w);
  }
}

}  // namespace coopflow
