// analytic_langevin_chain and analytic_mala_chain on CUDA: a thread a chain, whose state stays in
// registers, or in local memory where its length is not known to the compiler.
#include <type_traits>

#include "coopflow/analytic_energies.h"
#include "coopflow/mala.h"
#include "launch.cuh"
#include "ops/analytic_langevin_chain_op.h"

namespace coopflow {
namespace {

// Small, so that few chains spread over many multiprocessors.
constexpr int kChainThreads = 64;
constexpr int kChainBlocks = 8;        // resident ones, which leaves each thread 128 registers
constexpr int64_t kMostElements = 64;  // of a chain
constexpr int kSharedTable = 1024;     // numbers that a block keeps for itself

// The random numbers of one chain.
template <typename A>
struct ThreadNoise {
  int64_t chain;  // its number in the noise
  int64_t per_chain;

  // Normals.
  __device__ __forceinline__ void operator()(ChainLanes<A, 1>& lanes, PhiloxKey key,
                                             uint32_t time) const {
    COOPFLOW_UNROLL
    for (int64_t e = 0; e < per_chain; e += 4) {
      const Quad<A> z =
          normals_from_words<A>(noise_words(key, chain, time, static_cast<uint32_t>(e / 4)));
      lanes.xi[e] = z.v0;
      lanes.xi[e + 1] = z.v1;
      lanes.xi[e + 2] = z.v2;
      lanes.xi[e + 3] = z.v3;
    }
  }

  // A uniform.
  __device__ __forceinline__ void operator()(PhiloxKey key, uint32_t time, A (&uniforms)[1]) const {
    uniforms[0] = mala_uniform<A>(noise_words(key, chain, time, 0).w0);
  }
};

// What the block reads instead of the energy's tensors: the table given, or one of its own.
template <typename Energy, typename A>
__device__ __forceinline__ const A* table_of_block(const Energy& energy, const A* given) {
  if constexpr (std::is_base_of_v<NoTable, Energy>) {
    return nullptr;
  } else {
    __shared__ A own[kSharedTable];
    if (given != nullptr) return given;
    for (int64_t i = threadIdx.x; i < energy.table_size(); i += blockDim.x) {
      own[i] = energy.table_entry(i);
    }
    __syncthreads();
    return own;
  }
}

template <typename Energy, typename A>
__global__ void __launch_bounds__(kBlockThreads)
    energy_table_kernel(const __grid_constant__ Energy energy, A* table) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < energy.table_size(); i += stride) {
    table[i] = energy.table_entry(i);
  }
}

// kPerChain: elements of a chain, or 0.
template <typename Energy, bool kPlain, int64_t kPerChain, typename A>
__global__ void __launch_bounds__(kChainThreads, kChainBlocks)
    analytic_chain_kernel(const __grid_constant__ LangevinChainArgs<A> args,
                          const __grid_constant__ Energy energy, const A* given_table) {
  constexpr int64_t kRoom = kPerChain == 0 ? kMostElements : kPerChain;
  constexpr int64_t kNoiseRoom = (kRoom + 3) / 4 * 4;
  const int64_t per_chain = kPerChain == 0 ? args.per_chain : kPerChain;
  const A* const table = table_of_block(energy, given_table);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chain = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       chain < args.batch; chain += stride) {
    A x[kRoom], grad[kRoom], x_ref[kRoom], xi[kNoiseRoom];
    ChainLanes<A, 1> lanes{chain, 1, x, grad, x_ref, xi, {}, {}, {}, {}, {}, {}, {}};
    run_lanes<!kPlain, kPerChain>(
        args, lanes,
        [&](ChainLanes<A, 1>& at) { energy.template operator()<!kPlain>(table, per_chain, at); },
        ThreadNoise<A>{args.rng[2] + chain, per_chain});
  }
}

// The same of chains that accept their moves, of any length: a variant for each energy.
template <typename Energy, typename A>
__global__ void __launch_bounds__(kChainThreads, kChainBlocks)
    analytic_mala_kernel(const __grid_constant__ MalaChainArgs<A> args,
                         const __grid_constant__ Energy energy, const A* given_table) {
  const A* const table = table_of_block(energy, given_table);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chain = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       chain < args.batch; chain += stride) {
    A vectors[4][kMostElements];
    const ChainLanes<A, 1> memory{chain, 1,  vectors[0], vectors[1], vectors[2], vectors[3], {},
                                  {},    {}, {},         {},         {},         {}};
    run_mala_lanes(
        args, memory,
        [&](ChainLanes<A, 1>& at) { energy.template operator()<true>(table, args.per_chain, at); },
        ThreadNoise<A>{args.rng[2] + chain, args.per_chain},
        ThreadNoise<A>{args.accept_rng[2] + chain, 1});
  }
}

// A table that is too large for a block's own memory; null where it is not.
template <typename Energy, typename A>
const A* launch_table(const Energy& energy, const Tensor& x0, OptionalTensor* storage) {
  if constexpr (!std::is_base_of_v<NoTable, Energy>) {
    if (energy.table_size() > kSharedTable) {
      *storage = torch::stable::new_empty(x0, {energy.table_size()});
      A* const table = static_cast<A*>((*storage)->mutable_data_ptr());
      launch<energy_table_kernel<Energy, A>>(x0, divide_up(energy.table_size(), kBlockThreads),
                                             kBlockThreads, energy, table);
      return table;
    }
  }
  return nullptr;
}

struct CudaAnalyticChain {
  static void check_chains(const ChainOp& op) {
    if (op.per_chain() > kMostElements) {
      op.check().fail("x0", "must have D <= ", kMostElements, " on CUDA, got ", op.per_chain());
    }
  }

  template <typename Energy, typename A>
  static void run(const LangevinChainArgs<A>& args, const Energy& energy, const Tensor& x0) {
    OptionalTensor storage;  // until the launch: torch's allocator knows the stream
    const A* const table = launch_table<Energy, A>(energy, x0, &storage);
    if (args.is_plain() && args.per_chain == 2) {
      launch_chains<Energy, true, 2>(args, energy, table, x0);
    } else if (args.is_plain()) {
      launch_chains<Energy, true, 0>(args, energy, table, x0);
    } else {
      launch_chains<Energy, false, 0>(args, energy, table, x0);
    }
  }

  template <typename Energy, typename A>
  static void run(const MalaChainArgs<A>& args, const Energy& energy, const Tensor& x0) {
    OptionalTensor storage;
    const A* const table = launch_table<Energy, A>(energy, x0, &storage);
    launch<analytic_mala_kernel<Energy, A>>(x0, divide_up(args.batch, kChainThreads), kChainThreads,
                                            args, energy, table);
  }

 private:
  template <typename Energy, bool kPlain, int64_t kPerChain, typename A>
  static void launch_chains(const LangevinChainArgs<A>& args, const Energy& energy, const A* table,
                            const Tensor& x0) {
    launch<analytic_chain_kernel<Energy, kPlain, kPerChain, A>>(
        x0, divide_up(args.batch, kChainThreads), kChainThreads, args, energy, table);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  m.impl("analytic_langevin_chain",
         TORCH_BOX(&coopflow::analytic_langevin_chain<coopflow::CudaAnalyticChain>));
  m.impl("analytic_mala_chain",
         TORCH_BOX(&coopflow::analytic_mala_chain<coopflow::CudaAnalyticChain>));
}
