// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// counter layout that defines this package's noise:
//   key     = the seed's 64 bits (low word, high word)
//   counter = (element / 4, time, chain low, chain high)
// This is the Philox of cuRAND and torch with subsequence = chain and
// offset = time * 2^32 + element / 4, in units of blocks.
#pragma once

#include <cstdint>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

struct PhiloxKey {
  uint32_t low, high;
};

// Four words, or four vectors of them: Word is uint32_t, or a vector type of the CPU loops with
// multiply_wide and ^ (csrc/cpu/simd_words.h).
template <typename Word>
struct PhiloxBlock {
  Word w0, w1, w2, w3;
};
using PhiloxWords = PhiloxBlock<uint32_t>;

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

COOPFLOW_HD PhiloxKey make_philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

template <typename Word>
struct WideProduct {
  Word high, low;
};

COOPFLOW_HD WideProduct<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = multiply_words(a, b);
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

template <typename Word>
COOPFLOW_HD PhiloxBlock<Word> philox4x32_10(PhiloxBlock<Word> c, PhiloxKey k) {
  COOPFLOW_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct<Word> p0 = multiply_wide(c.w0, kPhiloxMultiplier0);
    const WideProduct<Word> p1 = multiply_wide(c.w2, kPhiloxMultiplier1);
    c = {p1.high ^ c.w1 ^ k.low, p1.low, p0.high ^ c.w3 ^ k.high, p0.low};
    k.low += kPhiloxWeyl0;
    k.high += kPhiloxWeyl1;
  }
  return c;
}

// The four words that serve elements 4 * block .. 4 * block + 3 of one chain at one time.
COOPFLOW_HD PhiloxWords noise_words(PhiloxKey key, int64_t chain, uint32_t time, uint32_t block) {
  const uint64_t c = static_cast<uint64_t>(chain);
  return philox4x32_10(
      PhiloxWords{block, time, static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32)}, key);
}

// A seed for a separate use. Counter word 3 has its top bit set, which no chain (< 2^63) can have.
COOPFLOW_HD uint64_t fold_in(uint64_t seed, uint64_t data) {
  const PhiloxWords w = philox4x32_10(
      PhiloxWords{static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), 0u, 0x80000000u},
      make_philox_key(static_cast<int64_t>(seed)));
  return static_cast<uint64_t>(w.w0) | (static_cast<uint64_t>(w.w1) << 32);
}

}  // namespace coopflow
