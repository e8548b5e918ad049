// The CPU loops of gate_add_norm and its derivative, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/gate_add_norm.h"
#include "coopflow/reduction.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

constexpr int64_t kGateAddNormBlock = 8;    // rows that take each step side by side
constexpr int64_t kGateAddNormScratch = 4;  // quantities of an element that are kept between steps

// Storage type T. `scratch` has room for kGateAddNormScratch * kGateAddNormBlock rows.
template <typename T>
struct GateAddNormLoops {
  using A = arithmetic_t<T>;
  // Rows [begin, end).
  void (*forward)(const GateAddNormArgs<A>& args, A* scratch, int64_t begin, int64_t end);
  // Parts [begin, end), of kGateAddNormRows rows each, with their partial sums.
  void (*backward)(const GateAddNormBackwardArgs<A>& args, A* scratch, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename T> GateAddNormLoops<T> gate_add_norm_loops())

}  // namespace coopflow
