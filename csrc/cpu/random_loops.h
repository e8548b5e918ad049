// The CPU loops of normal_ and uniform_, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/random.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// Fills the quads [begin, end) of the flat range over all chains, which a tile of noise serves.
using RandomLoop = void (*)(const RandomArgs& args, int64_t begin, int64_t end);

COOPFLOW_DECLARE_PER_ISA(template <typename T> RandomLoop random_loop(Distribution distribution))

}  // namespace coopflow
