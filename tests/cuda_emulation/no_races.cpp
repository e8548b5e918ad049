// The race check of a build that has none.
#include "emulation.h"

namespace cuda_emulation {

void races_begin_launch(const char* /*dynamic_shared*/, size_t /*bytes*/) {}
void races_begin_block() {}

}  // namespace cuda_emulation
