// Dropout by a key: which elements of a chain are kept, drawn anew wherever it is asked for.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/macros.h"
#include "coopflow/philox.h"

namespace coopflow {

// Kept is what has uniform((batch, elements of a chain), rng, step=step) >= p.
template <typename A>
struct Dropout {
  const int64_t* rng;  // seed, time, number of the first chain
  int64_t step;
  uint32_t threshold;  // see dropout_threshold
  A factor;            // of what is kept, 1 / (1 - p)
};

// uniform >= p in integers: float32 uniforms are (n + 1/2) * 2^-23 with n the top 23 bits of a
// word, and are compared with p as a float32.
inline uint32_t dropout_threshold(double p) {
  const double rounded = static_cast<float>(p);
  return static_cast<uint32_t>(std::ceil(rounded * 0x1p23 - 0.5));
}

COOPFLOW_HD bool is_kept(uint32_t word, uint32_t threshold) { return (word >> 9) >= threshold; }

COOPFLOW_HD uint32_t kept_of_block(PhiloxWords w, uint32_t threshold) {
  return (is_kept(w.w0, threshold) ? 1u : 0u) | (is_kept(w.w1, threshold) ? 2u : 0u) |
         (is_kept(w.w2, threshold) ? 4u : 0u) | (is_kept(w.w3, threshold) ? 8u : 0u);
}

// Bit i: whether element first + i of the chain is kept, i < kCount <= 4. They may lie in two
// blocks of words.
template <int kCount>
COOPFLOW_HD uint32_t kept_of(PhiloxKey key, int64_t chain, uint32_t time, int64_t first,
                             uint32_t threshold) {
  const uint32_t block = static_cast<uint32_t>(first / 4);
  const uint32_t shift = static_cast<uint32_t>(first % 4);
  uint32_t kept = kept_of_block(noise_words(key, chain, time, block), threshold);
  if (shift + kCount > 4) {
    kept |= kept_of_block(noise_words(key, chain, time, block + 1), threshold) << 4;
  }
  return kept >> shift;
}

}  // namespace coopflow
