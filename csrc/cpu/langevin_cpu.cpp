// The Langevin ops on the CPU.
#include <atomic>
#include <cstring>
#include <vector>

#include "chunks.h"
#include "langevin_loops.h"
#include "ops/langevin_bound_op.h"

namespace coopflow {
namespace {

constexpr int64_t kTileElements = 256;

// Sets norm_scale and clears active from one pass over the gradient.
template <typename T, typename A>
void gradient_pass(const LangevinArgs<A>& args, const LangevinLoops<T>& loops) {
  const int64_t chunks = divide_up(args.per_chain, kReductionChunk);
  std::vector<GradientLook<A>> parts(args.batch * chunks);
  parallel_chunks(args.batch, args.per_chain, [&](int64_t begin, int64_t end) {
    loops.reduce_chunks(args, parts.data(), begin, end);
  });
  for (int64_t chain = 0; chain < args.batch; ++chain) {
    GradientLook<A> look{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) look.add(parts[chain * chunks + chunk]);
    apply_gradient_look(args, chain, look);
  }
}

template <typename T, typename A>
bool gradient_is_finite(const LangevinArgs<A>& args, const LangevinLoops<T>& loops) {
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, args.batch * args.per_chain, kGrain,
                              [&](int64_t begin, int64_t end) {
                                if (!loops.all_finite(args, begin, end))
                                  finite.store(false, std::memory_order_relaxed);
                              });
  return finite.load();
}

template <typename A>
bool all_chains_are_active(const LangevinArgs<A>& args) {
  return std::memchr(args.active, 0, static_cast<size_t>(args.batch)) == nullptr;
}

template <typename T, typename A>
void update_only(const LangevinArgs<A>& args, const LangevinLoops<T>& loops) {
  const int64_t tiles = divide_up(args.batch * divide_up(args.per_chain, 4), kTileElements / 4);
  torch::stable::parallel_for(0, tiles, kGrain / kTileElements, [&](int64_t begin, int64_t end) {
    loops.update_tiles(args, begin, end);
  });
}

struct CpuLangevin {
  static constexpr bool kReadsStrides = false;

  template <typename T>
  static void langevin_step(LangevinArgs<arithmetic_t<T>> args, const Tensor& /*x*/) {
    const LangevinLoops<T> loops = COOPFLOW_SELECT_ISA(langevin_loops<T>());
    std::vector<arithmetic_t<T>> norm_scale(args.clips_norm ? args.batch : 0);
    if (args.clips_norm) args.norm_scale = norm_scale.data();
    // Healthy chains, the usual case, pay one pass over the gradient and then move together.
    if (args.freeze_nonfinite && !args.clips_norm) {
      args.freeze_nonfinite = !gradient_is_finite<T>(args, loops);
    }
    if (args.needs_gradient_look()) gradient_pass<T>(args, loops);
    if (args.active != nullptr && all_chains_are_active(args)) args.active = nullptr;
    if (args.stats) {
      reduce_chunks_in_order(args.batch, args.per_chain, kStatistics, args.stats,
                             [&](arithmetic_t<T>* sums, int64_t begin, int64_t end) {
                               loops.update_chunks(args, sums, begin, end);
                             });
    } else {
      update_only<T>(args, loops);
    }
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  using coopflow::CpuLangevin;
  m.impl("langevin_step_", TORCH_BOX(&coopflow::langevin_step_<CpuLangevin>));
  m.impl("langevin_bind", TORCH_BOX(&coopflow::langevin_bind));
  m.impl("langevin_bound_step_", TORCH_BOX(&coopflow::langevin_bound_step_<CpuLangevin>));
  m.impl("langevin_step", TORCH_BOX(&coopflow::langevin_step<CpuLangevin>));
  m.impl("langevin_noise_", TORCH_BOX(&coopflow::langevin_noise_<CpuLangevin>));
}
