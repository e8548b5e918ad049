#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace coopflow {
namespace {

CpuIsa best_isa() {
#if defined(COOPFLOW_X86_ISAS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBaseline;
}

CpuIsa choose_isa() {
  const CpuIsa best = best_isa();
  const char* asked = std::getenv("COOPFLOW_CPU_ISA");
  if (asked == nullptr) return best;
  for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (std::strcmp(asked, isa_name(isa)) == 0 && isa <= best) return isa;
  }
  throw std::runtime_error(
      std::string("COOPFLOW_CPU_ISA must be baseline, avx2 or avx512, at most ") + isa_name(best) +
      " on this machine, got '" + asked + "'");
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
