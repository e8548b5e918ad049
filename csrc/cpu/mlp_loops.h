// The CPU loops of mlp_langevin_chain and mlp_mala_chain, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/langevin_chain.h"
#include "coopflow/mala.h"
#include "coopflow/mlp.h"
#include "isa.h"

namespace coopflow {

// A network whose matrices (rows, length) are cut in blocks of rows: for each block, for each k,
// the entries of its rows lie side by side. Rows that do not exist are zero.
template <typename A>
struct PackedMlp {
  Mlp<A> mlp;
  const A* weights[kMlpMaxDepth];     // from layer l to the next
  const A* transposed[kMlpMaxDepth];  // back again
  const A* biases[kMlpMaxDepth];      // for whole blocks
};

template <typename A>
struct MlpLoops {
  int64_t tile;    // chains that move side by side
  int block_rows;  // of the packed matrices
  // All steps of tiles [begin, end).
  void (*run_tiles)(const LangevinChainArgs<A>& args, const PackedMlp<A>& mlp, int64_t begin,
                    int64_t end);
  void (*run_mala_tiles)(const MalaChainArgs<A>& args, const PackedMlp<A>& mlp, int64_t begin,
                         int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename A> MlpLoops<A> mlp_loops())

}  // namespace coopflow
