// Which of the instruction-set builds of the CPU loops runs on this machine.
#pragma once

namespace coopflow {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// The best that the processor has, or what COOPFLOW_CPU_ISA = baseline | avx2 | avx512 asks for.
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
#if defined(COOPFLOW_X86_ISAS)
#define COOPFLOW_SELECT_ISA(...)                                                  \
  (::coopflow::current_isa() == ::coopflow::CpuIsa::kAvx512 ? avx512::__VA_ARGS__ \
   : ::coopflow::current_isa() == ::coopflow::CpuIsa::kAvx2 ? avx2::__VA_ARGS__   \
                                                            : baseline::__VA_ARGS__)
#else
#define COOPFLOW_SELECT_ISA(...) (baseline::__VA_ARGS__)
#endif
