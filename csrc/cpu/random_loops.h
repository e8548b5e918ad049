// The CPU loops of normal_ and uniform_, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/random.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// Fills tiles [begin, end) = chain * tiles_per_chain + tile.
using RandomLoop = void (*)(const RandomArgs& args, int64_t begin, int64_t end);

constexpr int64_t kRandomTile = 256;

COOPFLOW_DECLARE_PER_ISA(template <typename T> RandomLoop random_loop(Distribution distribution))

}  // namespace coopflow
