// Filling a tensor with noise: the plain description of a launch.
#pragma once

#include <cstdint>

#include "coopflow/normal.h"

namespace coopflow {

enum class Distribution : int { kNormal, kUniform };

struct RandomArgs {
  void* out;           // (batch, per_chain), dense
  const int64_t* rng;  // seed, time, number of the first chain
  int64_t batch, per_chain, step;
  Distribution distribution;
};

template <typename A>
COOPFLOW_HD Quad<A> draw(Distribution distribution, PhiloxWords words) {
  return distribution == Distribution::kNormal ? normals_from_words<A>(words)
                                               : uniforms_from_words<A>(words);
}

}  // namespace coopflow
