// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// counter layout that defines this package's noise:
//   key     = the seed's 64 bits (low word, high word)
//   counter = (element / 4, time, chain low, chain high)
// This is the Philox of cuRAND and torch with subsequence = chain and
// offset = time * 2^32 + element / 4, in units of blocks.
#pragma once

#include <cstdint>

#include "coopflow/macros.h"

namespace coopflow {

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

COOPFLOW_HD PhiloxKey make_philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

COOPFLOW_HD PhiloxWords philox4x32_10(PhiloxWords c, PhiloxKey k) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c.w0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c.w2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k.low, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k.high, static_cast<uint32_t>(p0)};
    k.low += kPhiloxWeyl0;
    k.high += kPhiloxWeyl1;
  }
  return c;
}

// The four words that serve elements 4 * block .. 4 * block + 3 of one chain at one time.
COOPFLOW_HD PhiloxWords noise_words(PhiloxKey key, int64_t chain, uint32_t time, uint32_t block) {
  const uint64_t c = static_cast<uint64_t>(chain);
  return philox4x32_10({block, time, static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32)},
                       key);
}

// A seed for a separate use. Counter word 3 has its top bit set, which no chain (< 2^63) can have.
COOPFLOW_HD uint64_t fold_in(uint64_t seed, uint64_t data) {
  const PhiloxWords w = philox4x32_10(
      {static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), 0u, 0x80000000u},
      make_philox_key(static_cast<int64_t>(seed)));
  return static_cast<uint64_t>(w.w0) | (static_cast<uint64_t>(w.w1) << 32);
}

}  // namespace coopflow
