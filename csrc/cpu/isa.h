// Which of the instruction-set builds of the CPU loops runs on this machine.
#pragma once

namespace coopflow {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// The best that this library was built with and the processor has, or what COOPFLOW_CPU_ISA =
// baseline | avx2 | avx512 asks for.
CpuIsa current_isa();

const char* isa_name(CpuIsa isa);

}  // namespace coopflow

// Declares a function of the loops files, which exists once per instruction set.
#define COOPFLOW_DECLARE_PER_ISA(...) \
  namespace baseline {                \
  __VA_ARGS__;                        \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__;                        \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__;                        \
  }

// The variant of such a function for this machine.
#if defined(COOPFLOW_HAS_AVX2)
#define COOPFLOW_SELECT_UP_TO_AVX2(...)                                       \
  (::coopflow::current_isa() == ::coopflow::CpuIsa::kAvx2 ? avx2::__VA_ARGS__ \
                                                          : baseline::__VA_ARGS__)
#else
#define COOPFLOW_SELECT_UP_TO_AVX2(...) (baseline::__VA_ARGS__)
#endif
#if defined(COOPFLOW_HAS_AVX512)
#define COOPFLOW_SELECT_ISA(...)                            \
  (::coopflow::current_isa() == ::coopflow::CpuIsa::kAvx512 \
       ? avx512::__VA_ARGS__                                \
       : COOPFLOW_SELECT_UP_TO_AVX2(__VA_ARGS__))
#else
#define COOPFLOW_SELECT_ISA(...) COOPFLOW_SELECT_UP_TO_AVX2(__VA_ARGS__)
#endif
