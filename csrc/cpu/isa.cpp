#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace coopflow {
namespace {

// Built into this library, and run by this processor; the baseline is always.
bool is_usable(CpuIsa isa) {
#if defined(COOPFLOW_HAS_AVX512)
  if (isa == CpuIsa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  }
#endif
#if defined(COOPFLOW_HAS_AVX2)
  if (isa == CpuIsa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == CpuIsa::kBaseline;
}

CpuIsa choose_isa() {
  const char* asked = std::getenv("COOPFLOW_CPU_ISA");
  std::string usable;
  for (CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kBaseline}) {
    if (!is_usable(isa)) continue;
    if (asked == nullptr || std::strcmp(asked, isa_name(isa)) == 0) return isa;
    usable += (usable.empty() ? "" : " or ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("COOPFLOW_CPU_ISA must be " + usable +
                           " with this library on this machine, got '" + asked + "'");
}

}  // namespace

CpuIsa current_isa() {
  static const CpuIsa isa = choose_isa();
  return isa;
}

const char* isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace coopflow
