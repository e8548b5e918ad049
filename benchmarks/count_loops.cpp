// Runs one CPU loop N times on fixed data, for valgrind to count its instructions.
//
//   count_loops LOOP N        LOOP as in main(); prints the elements of one run
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "affine_coupling_loops.h"
#include "langevin_loops.h"
#include "mixture_logistic_loops.h"

using namespace coopflow;

namespace {

constexpr int64_t kBatch = 4, kPerChain = 512, kComponents = 32;
constexpr int64_t kElements = kBatch * kPerChain;
constexpr int64_t kTiles = kElements / 256;
constexpr int64_t kChunksAtMost = kElements;  // of a reduction, whatever the chunk's size

// Fixed values in (-1, 1), without a generator whose version could matter.
std::vector<float> values(int64_t n, float scale = 1, float offset = 0) {
  std::vector<float> out(n);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = offset + scale * (static_cast<float>((i * 7919) % 4093) / 2046.5F - 1);
  }
  return out;
}

template <typename T>
void langevin(int64_t runs) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int64_t rng[2] = {1, 0};
  std::vector<float> x = values(kElements), grad = values(kElements);  // long enough for half too
  std::memset(x.data(), 0, sizeof(float) * x.size());
  LangevinArgs<float> args{};
  args.x = args.x_out = x.data();
  args.grad = grad.data();
  args.rng = rng;
  args.drift = {0.1F, nullptr, false, 0};
  args.noise = {0.1F, nullptr, false, 0};
  args.limits = {infinity, infinity, -1, 1};
  args.batch = kBatch;
  args.per_chain = kPerChain;
  args.noise_source = NoiseSource::kPhilox;
  args.noise_when = NoiseWhen::kWithStep;
  args.low_precision = LowPrecision::kNone;
  const LangevinLoops<T> loops = COOPFLOW_ISA::langevin_loops<T>();
  for (int64_t i = 0; i < runs; ++i) loops.update_tiles(args, 0, kTiles);
}

void affine(int64_t runs, bool backward) {
  const std::vector<float> x = values(kElements), params = values(2 * kElements);
  std::vector<float> out(kElements), grad_params(2 * kElements), sums(kChunksAtMost);
  const std::vector<float> ones(kBatch, 1);
  const auto loops = COOPFLOW_ISA::affine_coupling_loops<float, float>();
  const AffineCouplingArgs<float> args{x.data(), params.data(), out.data(), nullptr,
                                       kBatch,   kPerChain,     false};
  const AffineCouplingBackwardArgs<float> gradient{x.data(),      ones.data(), x.data(),
                                                   params.data(), out.data(),  grad_params.data(),
                                                   kBatch,        kPerChain,   false};
  for (int64_t i = 0; i < runs; ++i) {
    if (backward) {
      loops.backward(gradient, 0, kBatch);
    } else {
      loops.map(args, sums.data(), 0, kBatch);
    }
  }
}

constexpr MixtureShape kMixture{kBatch, kPerChain, kComponents, true};

void mixture(int64_t runs, bool inverse) {
  const std::vector<float> x = values(kElements);
  const std::vector<float> params = values(kMixture.rows() * kElements, 1, -0.5F);
  std::vector<float> out(kElements), sums(kChunksAtMost);
  std::vector<ComponentBlock<float>> scratch(kComponents);
  MixtureCouplingArgs<float> args{};
  args.in = x.data();
  args.params = params.data();
  args.out = out.data();
  args.shape = kMixture;
  args.inverse = inverse;
  const auto loops = COOPFLOW_ISA::mixture_logistic_loops<float, float>();
  for (int64_t i = 0; i < runs; ++i) loops.map(args, scratch.data(), sums.data(), 0, kBatch);
}

void mixture_backward(int64_t runs) {
  const std::vector<float> x = values(kElements), ones(kBatch, 1);
  const std::vector<float> params = values(kMixture.rows() * kElements, 1, -0.5F);
  std::vector<float> grad_x(kElements), grad_params(params.size());
  std::vector<ComponentBlock<float>> scratch(kComponents);
  MixtureCouplingBackwardArgs<float> args{};
  args.grad_out = args.x = x.data();
  args.grad_ladj = ones.data();
  args.params = params.data();
  args.grad_in = grad_x.data();
  args.grad_params = grad_params.data();
  args.shape = kMixture;
  const auto loops = COOPFLOW_ISA::mixture_logistic_loops<float, float>();
  for (int64_t i = 0; i < runs; ++i) loops.backward(args, scratch.data(), 0, kBatch);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const char* name = argv[1];
  const int64_t runs = std::atoll(argv[2]);
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("langevin_fp32")) {
    langevin<float>(runs);
  } else if (is("langevin_bf16")) {
    langevin<bfloat16>(runs);
  } else if (is("affine_forward")) {
    affine(runs, false);
  } else if (is("affine_backward")) {
    affine(runs, true);
  } else if (is("mixture_forward")) {
    mixture(runs, false);
  } else if (is("mixture_inverse")) {
    mixture(runs, true);
  } else if (is("mixture_backward")) {
    mixture_backward(runs);
  } else {
    return 2;
  }
  std::printf("%lld\n", static_cast<long long>(kElements));
  return 0;
}
