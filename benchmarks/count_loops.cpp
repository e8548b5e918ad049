// Runs one CPU loop N times on fixed data, for valgrind to count its instructions.
//
//   count_loops LOOP N        prints the elements of one run
//   count_loops               prints the names of the loops
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "affine_coupling_loops.h"
#include "attention_loops.h"
#include "concat_elu_loops.h"
#include "gate_add_norm_loops.h"
#include "langevin_loops.h"
#include "mixture_logistic_loops.h"
#include "random_loops.h"
#include "weight_norm_loops.h"

using namespace coopflow;

namespace {

constexpr int64_t kBatch = 4, kPerChain = 512, kComponents = 32;
constexpr int64_t kElements = kBatch * kPerChain;
constexpr int64_t kTiles = kElements / 256;
constexpr int64_t kChunksAtMost = kElements;  // of a reduction, whatever the chunk's size
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRng[3] = {1, 0, 0};

// Fixed values in (-1, 1), without a generator whose version could matter.
std::vector<float> values(int64_t n, float scale = 1, float offset = 0) {
  std::vector<float> out(n);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = offset + scale * (static_cast<float>((i * 7919) % 4093) / 2046.5F - 1);
  }
  return out;
}

template <typename Forward, typename Backward>
void repeat(int64_t runs, bool backward, const Forward& forward, const Backward& derivative) {
  for (int64_t i = 0; i < runs; ++i) backward ? derivative() : forward();
}

template <typename T>
void langevin(int64_t runs) {
  std::vector<float> x = values(kElements), grad = values(kElements);  // long enough for half too
  std::memset(x.data(), 0, sizeof(float) * x.size());
  LangevinArgs<float> args{};
  args.x = args.x_out = x.data();
  args.grad = grad.data();
  args.rng = kRng;
  args.drift = {0.1F, nullptr, false, 0};
  args.noise = {0.1F, nullptr, false, 0};
  args.limits = {kInfinity, kInfinity, -1, 1};
  args.batch = kBatch;
  args.per_chain = kPerChain;
  args.noise_source = NoiseSource::kPhilox;
  args.noise_when = NoiseWhen::kWithStep;
  args.low_precision = LowPrecision::kNone;
  const LangevinLoops<T> loops = COOPFLOW_ISA::langevin_loops<T>();
  for (int64_t i = 0; i < runs; ++i) loops.update_tiles(args, 0, kTiles);
}

// Rows of per_chain elements: short ones must share tiles of noise.
void normal(int64_t runs, int64_t per_chain) {
  std::vector<float> out(kElements);
  const int64_t batch = kElements / per_chain;
  const RandomArgs args{out.data(), kRng, batch, per_chain, 0, Distribution::kNormal};
  const RandomLoop loop = COOPFLOW_ISA::random_loop<float>(args.distribution);
  for (int64_t i = 0; i < runs; ++i) loop(args, 0, batch * divide_up(per_chain, 4));
}

void affine(int64_t runs, int64_t per_chain, bool backward) {
  const int64_t batch = kElements / per_chain;
  const std::vector<float> x = values(kElements), params = values(2 * kElements);
  std::vector<float> out(kElements), grad_params(2 * kElements), sums(kChunksAtMost);
  const std::vector<float> ones(batch, 1);
  const auto loops = COOPFLOW_ISA::affine_coupling_loops<float, float>();
  const AffineCouplingArgs<float> args{x.data(), params.data(), out.data(), nullptr,
                                       batch,    per_chain,     false};
  const AffineCouplingBackwardArgs<float> gradient{x.data(),      ones.data(), x.data(),
                                                   params.data(), out.data(),  grad_params.data(),
                                                   batch,         per_chain,   false};
  repeat(
      runs, backward, [&] { loops.map(args, sums.data(), 0, batch); },
      [&] { loops.backward(gradient, 0, batch); });
}

constexpr MixtureShape kMixture{kBatch, kPerChain, kComponents, true};
// Chains so short that a block of elements holds several.
constexpr MixtureShape kShortMixture{kElements / 2, 2, kComponents, true};

void mixture(int64_t runs, const MixtureShape& shape, bool inverse) {
  const std::vector<float> x = values(kElements);
  const std::vector<float> params = values(shape.rows() * kElements, 1, -0.5F);
  std::vector<float> out(kElements), sums(kChunksAtMost);
  std::vector<ComponentBlock<float>> scratch(kComponents);
  MixtureCouplingArgs<float> args{};
  args.in = x.data();
  args.params = params.data();
  args.out = out.data();
  args.shape = shape;
  args.inverse = inverse;
  const auto loops = COOPFLOW_ISA::mixture_logistic_loops<float, float>();
  for (int64_t i = 0; i < runs; ++i) loops.map(args, scratch.data(), sums.data(), 0, shape.batch);
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

void concat_elu(int64_t runs, bool backward) {
  constexpr ConcatEluShape shape{kBatch, 8, kPerChain / 8, false};
  const std::vector<float> x = values(kElements), y = values(2 * kElements);
  std::vector<float> out(2 * kElements);
  const Dropout<float> dropout{kRng, 0, dropout_threshold(0.5), 2};
  const ConcatEluArgs<float> args{x.data(), out.data(), shape, dropout};
  const ConcatEluBackwardArgs<float> gradient{y.data(), y.data(), out.data(), shape, dropout};
  const auto loops = COOPFLOW_ISA::concat_elu_loops<float>();
  const int64_t blocks = ConcatEluBlocks(shape).count;
  repeat(
      runs, backward, [&] { loops.forward(args, 0, blocks); },
      [&] { loops.backward(gradient, 0, blocks); });
}

void attention(int64_t runs, bool backward) {
  constexpr AttentionShape shape{kBatch, 2, 16, kPerChain / 32};
  constexpr int64_t kHeads = shape.batch * shape.heads, kOfHead = shape.length * shape.dim;
  const std::vector<float> in = values(kElements);
  std::vector<float> out(kElements), lse(kHeads * shape.length, 3);
  const auto input = [&](const float* data) {
    return AttentionInput{data, shape.heads * kOfHead, kOfHead, shape.dim, 1};
  };
  const AttentionOutput result{out.data(), shape.heads * kOfHead, kOfHead, shape.dim, 1};
  AttentionArgs<float> args{};
  args.q = args.k = args.v = input(in.data());
  args.out = result;
  args.lse = lse.data();
  args.shape = shape;
  args.dropout = {kRng, 0, 0, 1};
  args.scale = 0.25F;
  AttentionBackwardArgs<float> gradient{};
  gradient.grad_out = gradient.q = gradient.k = gradient.v = gradient.out = input(in.data());
  gradient.lse = lse.data();
  gradient.grad_q = gradient.grad_k = gradient.grad_v = result;
  gradient.shape = shape;
  gradient.dropout = args.dropout;
  gradient.scale = 0.25F;
  const auto loops = COOPFLOW_ISA::attention_loops<float>();
  repeat(
      runs, backward,
      [&] { loops.forward(args, 0, kHeads * divide_up(shape.length, kAttentionRows)); },
      [&] { loops.backward(gradient, 0, kHeads); });
}

void gate_add_norm(int64_t runs, bool backward) {
  constexpr int64_t kChannels = 32, kRows = kElements / kChannels;
  const std::vector<float> x = values(kElements), gates = values(2 * kElements);
  const std::vector<float> weight = values(kChannels), bias = values(kChannels);
  std::vector<float> y(kElements), grad_gates(2 * kElements), sums(2 * kElements);
  std::vector<float> scratch(kGateAddNormScratch * kGateAddNormBlock * kChannels);
  std::vector<NormRow<float>> norms(kRows, {0, 1});
  const GateAddNormArgs<float> args{x.data(),    gates.data(), weight.data(),
                                    bias.data(), y.data(),     norms.data(),
                                    kRows,       kChannels,    1e-5F};
  const GateAddNormBackwardArgs<float> gradient{
      x.data(), x.data(),          gates.data(), weight.data(), norms.data(),
      y.data(), grad_gates.data(), sums.data(),  kRows,         kChannels};
  const auto loops = COOPFLOW_ISA::gate_add_norm_loops<float>();
  repeat(
      runs, backward, [&] { loops.forward(args, scratch.data(), 0, kRows); },
      [&] { loops.backward(gradient, scratch.data(), 0, divide_up(kRows, kGateAddNormRows)); });
}

void weight_norm(int64_t runs, bool backward) {
  constexpr int64_t kRows = 16, kPerRow = kElements / kRows;
  const std::vector<float> direction = values(kElements), gain = values(kRows);
  std::vector<float> out(kElements), grad_gain(kRows);
  const WeightNormLayer layer{direction.data(), gain.data(), out.data(), kRows, kPerRow};
  const WeightNormBackwardLayer gradient{direction.data(), direction.data(), gain.data(),
                                         out.data(),       grad_gain.data(), kRows,
                                         kPerRow};
  const int64_t first_row = 0;
  const auto loops = COOPFLOW_ISA::weight_norm_loops<float>();
  repeat(
      runs, backward, [&] { loops.forward({&layer, &first_row, 1}, 0, kRows); },
      [&] { loops.backward({&gradient, &first_row, 1}, 0, kRows); });
}

struct Loop {
  const char* name;
  void (*run)(int64_t runs);
};

constexpr Loop kLoops[] = {
    {"langevin_fp32", langevin<float>},
    {"langevin_bf16", langevin<bfloat16>},
    {"normal_rows", [](int64_t runs) { normal(runs, kPerChain); }},
    {"normal_pairs", [](int64_t runs) { normal(runs, 2); }},
    {"affine_forward", [](int64_t runs) { affine(runs, kPerChain, false); }},
    {"affine_forward_short", [](int64_t runs) { affine(runs, 2, false); }},
    {"affine_backward", [](int64_t runs) { affine(runs, kPerChain, true); }},
    {"mixture_forward", [](int64_t runs) { mixture(runs, kMixture, false); }},
    {"mixture_forward_short", [](int64_t runs) { mixture(runs, kShortMixture, false); }},
    {"mixture_inverse", [](int64_t runs) { mixture(runs, kMixture, true); }},
    {"mixture_backward", mixture_backward},
    {"concat_elu_forward", [](int64_t runs) { concat_elu(runs, false); }},
    {"concat_elu_backward", [](int64_t runs) { concat_elu(runs, true); }},
    {"attention_forward", [](int64_t runs) { attention(runs, false); }},
    {"attention_backward", [](int64_t runs) { attention(runs, true); }},
    {"gate_add_norm_forward", [](int64_t runs) { gate_add_norm(runs, false); }},
    {"gate_add_norm_backward", [](int64_t runs) { gate_add_norm(runs, true); }},
    {"weight_norm_forward", [](int64_t runs) { weight_norm(runs, false); }},
    {"weight_norm_backward", [](int64_t runs) { weight_norm(runs, true); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    for (const Loop& loop : kLoops) std::puts(loop.name);
    return argc == 1 ? 0 : 2;
  }
  for (const Loop& loop : kLoops) {
    if (std::strcmp(argv[1], loop.name) != 0) continue;
    loop.run(std::atoll(argv[2]));
    std::printf("%lld\n", static_cast<long long>(kElements));
    return 0;
  }
  return 2;
}
