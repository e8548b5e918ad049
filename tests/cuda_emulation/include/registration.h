// Registers the ops of csrc/library.cpp and csrc/cuda under the namespace coopflow_emulated, for
// CPU tensors: they stand beside the CPU ops in one process. Included ahead of every file.
#pragma once

#include <torch/csrc/stable/library.h>

#define COOPFLOW_EMULATED_KEY_CUDA CPU
#define COOPFLOW_EMULATED_KEY_CompositeExplicitAutograd CompositeExplicitAutograd

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) COOPFLOW_EMULATED_LIBRARY(ns##_emulated, m)
#define COOPFLOW_EMULATED_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  COOPFLOW_EMULATED_IMPL(ns##_emulated, COOPFLOW_EMULATED_KEY_##key, m)
#define COOPFLOW_EMULATED_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, key, m, C10_UID)
