// The CPU loops of mlp_langevin_chain, built once per instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "coopflow/langevin_chain.h"
#include "coopflow/mlp.h"
#include "isa.h"

namespace coopflow {

// The network in the order in which the loops read it: see mlp_loops.cpp.
template <typename A>
struct PackedMlp {
  Mlp<A> mlp;
  std::vector<A> weights[kMlpMaxDepth];     // from layer l to the next
  std::vector<A> biases[kMlpMaxDepth];
  std::vector<A> transposed[kMlpMaxDepth];  // back again
  const A* last_weights;
  A last_bias;
};

template <typename A>
struct MlpLoops {
  PackedMlp<A> (*pack)(const Mlp<A>& mlp);
  // All steps of tiles [begin, end) of kMlpTile chains.
  void (*run_tiles)(const LangevinChainArgs<A>& args, const PackedMlp<A>& mlp, int64_t begin,
                    int64_t end);
};

constexpr int kMlpTile = 32;

COOPFLOW_DECLARE_PER_ISA(template <typename A> MlpLoops<A> mlp_loops())

}  // namespace coopflow
