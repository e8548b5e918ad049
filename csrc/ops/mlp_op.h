// mlp_langevin_chain and mlp_mala_chain as the dispatcher calls them: checks, a LangevinChainArgs
// or a MalaChainArgs, and a Mlp, written once. A back end is a type with
//   template <typename A>
//   static void run(const OpChecks& check, const LangevinChainArgs<A>& args, const Mlp<A>& mlp,
//                   const Tensor& x0);
//   and the same of MalaChainArgs<A>
#pragma once

#include <string>
#include <vector>

#include "coopflow/mlp.h"
#include "ops/langevin_chain_op.h"
#include "ops/mala_chain_op.h"

namespace coopflow {

class MlpOp {
 public:
  MlpOp(const ChainOp& op, const Tensor& x0, const std::vector<Tensor>& weights,
        const std::vector<Tensor>& biases, int64_t activation, double shape, double threshold,
        bool bfloat16)
      : check_(op.check()), x0_(x0), weights_(weights), biases_(biases), bfloat16_(bfloat16) {
    const auto layers = static_cast<int64_t>(weights.size());
    if (layers < 2 || layers > kMlpMaxDepth + 1) {
      check_.fail("weights", "must be 2 to ", kMlpMaxDepth + 1, " matrices, for 1 to ",
                  kMlpMaxDepth, " hidden layers, got ", layers);
    }
    if (biases.size() != weights.size()) {
      check_.fail("biases", "must be as many as the weights, ", layers, ", got ", biases.size());
    }
    check_size("x0", op.per_chain());
    sizes_.push_back(static_cast<int>(op.per_chain()));
    for (int64_t l = 0; l < layers; ++l) check_layer(l, l + 1 == layers);
    if (activation < 0 || activation >= static_cast<int64_t>(Activation::kActivations)) {
      check_.fail("activation", "must be one of the activations' numbers, 0 to ",
                  static_cast<int>(Activation::kActivations) - 1, ", got ", activation);
    }
    activation_ = static_cast<Activation>(activation);
    check_.is_finite("activation_args", shape, x0);
    if (activation_ == Activation::kSoftplus && shape == 0) {
      check_.fail("activation_args", "beta must not be 0");
    }
    shape_ = shape;
    threshold_ = threshold;
  }

  const OpChecks& check() const { return check_; }

  template <typename A>
  Mlp<A> mlp() const {
    Mlp<A> mlp{};
    mlp.depth = static_cast<int>(weights_.size()) - 1;
    for (int l = 0; l <= mlp.depth; ++l) {
      mlp.weights[l] = static_cast<const A*>(weights_[l].const_data_ptr());
      mlp.biases[l] = static_cast<const A*>(biases_[l].const_data_ptr());
      mlp.sizes[l] = sizes_[l];
    }
    mlp.activation = activation_;
    mlp.parameters = {static_cast<A>(shape_), static_cast<A>(threshold_)};
    mlp.bfloat16 = bfloat16_;
    return mlp;
  }

 private:
  void check_size(const char* argument, int64_t size) const {
    if (size > kMlpMaxSize) {
      check_.fail(argument, "must have at most ", kMlpMaxSize,
                  " elements per chain and layer, got ", size);
    }
  }

  void check_layer(int64_t l, bool is_last) {
    const std::string index = "[" + std::to_string(l) + "]";
    const std::string name = "weights" + index, bias_name = "biases" + index;
    const Tensor& weight = weights_[l];
    check_like_x0(name.c_str(), weight);
    if (weight.dim() != 2 || weight.size(1) != sizes_.back() || weight.size(0) < 1 ||
        (is_last && weight.size(0) != 1)) {
      check_.fail(name.c_str(), "must have shape (", is_last ? "1" : "out", ", ", sizes_.back(),
                  "), got ", shape_text(weight));
    }
    check_size(name.c_str(), weight.size(0));
    const Tensor& bias = biases_[l];
    check_like_x0(bias_name.c_str(), bias);
    if (bias.dim() != 1 || bias.size(0) != weight.size(0)) {
      check_.fail(bias_name.c_str(), "must have shape (", weight.size(0), ",), got ",
                  shape_text(bias));
    }
    sizes_.push_back(static_cast<int>(weight.size(0)));
  }

  void check_like_x0(const char* name, const Tensor& t) const {
    check_.has_dtype(name, t, x0_.scalar_type());
    check_.same_device(name, t, x0_);
    check_.is_contiguous(name, t);
  }

  const OpChecks& check_;
  const Tensor& x0_;
  const std::vector<Tensor>&weights_, &biases_;
  std::vector<int> sizes_;  // of the state and of every layer
  Activation activation_;
  double shape_, threshold_;
  bool bfloat16_;
};

// Runs the chains of a network, given as f(args) with args of either kind and of the state's type.
template <typename Backend>
auto network_runner(const MlpOp& network, const Tensor& x0) {
  return [&](const auto& args) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(args.x0)>>;
    Backend::run(network.check(), args, network.template mlp<A>(), x0);
  };
}

template <typename Backend>
LangevinChainResults mlp_langevin_chain(
    Tensor x0, Tensor rng, std::vector<Tensor> weights, std::vector<Tensor> biases,
    int64_t activation, double activation_shape, double activation_threshold, int64_t n_steps,
    double drift, OptionalTensor drift_t, double noise, OptionalTensor noise_t, double decay,
    OptionalTensor decay_t, double pull, OptionalTensor pull_t, OptionalTensor x_ref,
    std::optional<double> grad_clip, std::optional<double> grad_norm,
    std::optional<double> step_clip, std::optional<double> clamp_low,
    std::optional<double> clamp_high, bool clamp_end, bool negative_energy, int64_t step,
    OptionalTensor xi, int64_t thin, bool stats, bool freeze_nonfinite, bool bfloat16) {
  const LangevinChainOptions o{n_steps,   drift,           drift_t,   noise,     noise_t,
                               decay,     decay_t,         pull,      pull_t,    x_ref,
                               grad_clip, grad_norm,       step_clip, clamp_low, clamp_high,
                               clamp_end, negative_energy, step,      xi,        thin,
                               stats,     freeze_nonfinite};
  const LangevinChainOp op("mlp_langevin_chain", x0);
  op.check_options(rng, o);
  const MlpOp network(op, x0, weights, biases, activation, activation_shape, activation_threshold,
                      bfloat16);
  return run_langevin_chain(op, rng, o, network_runner<Backend>(network, x0));
}

template <typename Backend>
MalaChainResults mlp_mala_chain(Tensor x0, Tensor rng, Tensor accept_rng,
                                std::vector<Tensor> weights, std::vector<Tensor> biases,
                                int64_t activation, double activation_shape,
                                double activation_threshold, int64_t n_steps, double step_size,
                                OptionalTensor step_size_t, double temperature, int64_t adapt_steps,
                                double target_accept, bool negative_energy, int64_t step,
                                OptionalTensor xi, int64_t thin, bool stats) {
  const MalaChainOptions o{n_steps,       step_size,       step_size_t, temperature, adapt_steps,
                           target_accept, negative_energy, step,        xi,          thin,
                           stats};
  const MalaChainOp op("mlp_mala_chain", x0);
  op.check_options(rng, accept_rng, o);
  const MlpOp network(op, x0, weights, biases, activation, activation_shape, activation_threshold,
                      /*bfloat16=*/false);
  return run_mala_chain(op, rng, accept_rng, o, network_runner<Backend>(network, x0));
}

}  // namespace coopflow
