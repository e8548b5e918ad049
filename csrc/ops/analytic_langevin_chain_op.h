// analytic_langevin_chain and analytic_mala_chain as the dispatcher calls them. A back end is a
// type with
//   template <typename Energy, typename A>
//   static void run(const LangevinChainArgs<A>& args, const Energy& energy, const Tensor& x0);
//   and the same of MalaChainArgs<A>
//   static void check_chains(const ChainOp& op);   what it has no memory for
// where x0 tells the device and gives scratch tensors.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "coopflow/analytic_energies.h"
#include "ops/langevin_chain_op.h"
#include "ops/mala_chain_op.h"

namespace coopflow {

// What describes the energy of a call.
struct EnergyArguments {
  std::vector<Tensor> tensors;
  std::vector<double> numbers;
};

// The K of an energy's tensors, which all must fit.
template <std::size_t kCount>
int64_t check_energy_tensors(const ChainOp& op, const Tensor& x0,
                             const EnergyTensors<kCount>& wanted,
                             const std::vector<Tensor>& tensors) {
  const OpChecks& check = op.check();
  if (tensors.size() != kCount) {
    check.fail("tensors", "must be ", kCount, " for this energy, got ", tensors.size());
  }
  int64_t count = -1;
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto& [name, shape] = wanted[i];
    const Tensor& t = tensors[i];
    check.has_dtype(name, t, x0.scalar_type());
    check.same_device(name, t, x0);
    bool fits = t.dim() == static_cast<int64_t>(std::string(shape).size());
    for (int64_t d = 0; fits && d < t.dim(); ++d) {
      if (shape[d] == 'K' && count < 0) count = t.size(d);
      fits = t.size(d) == (shape[d] == 'K' ? count : op.per_chain());
    }
    if (!fits || count == 0) {
      check.fail(name, "must have one dimension for each letter of '", shape,
                 "', with D = ", op.per_chain(), " and one K > 0 for all tensors, got ",
                 shape_text(t));
    }
    check.is_contiguous(name, t);
  }
  return count;
}

template <std::size_t kCount>
void check_energy_numbers(const OpChecks& check, const EnergyNumbers<kCount>& wanted,
                          const std::vector<double>& numbers, const Tensor& x0) {
  if (numbers.size() != kCount) {
    check.fail("numbers", "must be ", kCount, " for this energy, got ", numbers.size());
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    check.is_finite(wanted[i].name, numbers[i], x0);
    if (wanted[i].positive) check.is_positive(wanted[i].name, numbers[i]);
  }
}

template <typename Energy>
void check_energy(const ChainOp& op, const Tensor& x0, const EnergyArguments& given,
                  int64_t* count) {
  if (op.per_chain() < Energy::kLeastDim) {
    op.check().fail("x0", "must have D >= ", Energy::kLeastDim, " for this energy, got ",
                    shape_text(x0));
  }
  *count = check_energy_tensors(op, x0, Energy::kTensors, given.tensors);
  check_energy_numbers(op.check(), Energy::kNumbers, given.numbers, x0);
}

template <typename A>
EnergyParameters<A> energy_parameters(const EnergyArguments& given, int64_t per_chain,
                                      int64_t count) {
  EnergyParameters<A> parameters{};
  for (std::size_t i = 0; i < given.tensors.size(); ++i) {
    parameters.tensors[i] = static_cast<const A*>(given.tensors[i].const_data_ptr());
  }
  for (std::size_t i = 0; i < given.numbers.size(); ++i) {
    parameters.numbers[i] = static_cast<A>(given.numbers[i]);
  }
  parameters.per_chain = per_chain;
  parameters.count = count;
  return parameters;
}

[[noreturn]] inline void fail_energy(const OpChecks& check, const std::string& energy) {
  std::string names;
  AnalyticEnergies::for_each([&](auto tag) {
    names += names.empty() ? "" : ", ";
    names += decltype(tag)::template type<float>::kName;
  });
  check.fail("energy", "must be one of ", names, ", got '", energy, "'");
}

// Calls f(tag, K) with the EnergyTag of the energy of this name, to which what is given fits.
template <typename F>
void with_energy(const ChainOp& op, const Tensor& x0, const std::vector<int64_t>& characters,
                 const EnergyArguments& given, const F& f) {
  const std::string energy(characters.begin(), characters.end());
  bool found = false;
  AnalyticEnergies::for_each([&](auto tag) {
    using Energy = typename decltype(tag)::template type<float>;
    if (energy != Energy::kName) return;
    int64_t count = 0;
    check_energy<Energy>(op, x0, given, &count);
    found = true;
    f(tag, count);
  });
  if (!found) fail_energy(op.check(), energy);
}

// Runs the chains of an energy, given as f(args) with args of either kind and of the state's type.
template <typename Backend, typename Tag>
auto chain_runner(const ChainOp& op, const Tensor& x0, const EnergyArguments& given,
                  int64_t count) {
  return [&op, &x0, &given, count](const auto& args) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(args.x0)>>;
    using Energy = typename Tag::template type<A>;
    Backend::run(args, Energy(energy_parameters<A>(given, op.per_chain(), count)), x0);
  };
}

template <typename Backend>
LangevinChainResults analytic_langevin_chain(
    Tensor x0, Tensor rng, std::vector<int64_t> energy, std::vector<Tensor> tensors,
    std::vector<double> numbers, int64_t n_steps, double drift, OptionalTensor drift_t,
    double noise, OptionalTensor noise_t, double decay, OptionalTensor decay_t, double pull,
    OptionalTensor pull_t, OptionalTensor x_ref, std::optional<double> grad_clip,
    std::optional<double> grad_norm, std::optional<double> step_clip,
    std::optional<double> clamp_low, std::optional<double> clamp_high, bool clamp_end,
    bool negative_energy, int64_t step, OptionalTensor xi, int64_t thin, bool stats,
    bool freeze_nonfinite) {
  const LangevinChainOp op("analytic_langevin_chain", x0);
  const LangevinChainOptions o{n_steps,   drift,           drift_t,   noise,     noise_t,
                               decay,     decay_t,         pull,      pull_t,    x_ref,
                               grad_clip, grad_norm,       step_clip, clamp_low, clamp_high,
                               clamp_end, negative_energy, step,      xi,        thin,
                               stats,     freeze_nonfinite};
  op.check_options(rng, o);
  Backend::check_chains(op);
  const EnergyArguments given{std::move(tensors), std::move(numbers)};
  std::optional<LangevinChainResults> results;
  with_energy(op, x0, energy, given, [&](auto tag, int64_t count) {
    results =
        run_langevin_chain(op, rng, o, chain_runner<Backend, decltype(tag)>(op, x0, given, count));
  });
  return *results;
}

template <typename Backend>
MalaChainResults analytic_mala_chain(Tensor x0, Tensor rng, Tensor accept_rng,
                                     std::vector<int64_t> energy, std::vector<Tensor> tensors,
                                     std::vector<double> numbers, int64_t n_steps, double step_size,
                                     OptionalTensor step_size_t, double temperature,
                                     int64_t adapt_steps, double target_accept,
                                     bool negative_energy, int64_t step, OptionalTensor xi,
                                     int64_t thin, bool stats) {
  const MalaChainOp op("analytic_mala_chain", x0);
  const MalaChainOptions o{n_steps,       step_size,       step_size_t, temperature, adapt_steps,
                           target_accept, negative_energy, step,        xi,          thin,
                           stats};
  op.check_options(rng, accept_rng, o);
  Backend::check_chains(op);
  const EnergyArguments given{std::move(tensors), std::move(numbers)};
  std::optional<MalaChainResults> results;
  with_energy(op, x0, energy, given, [&](auto tag, int64_t count) {
    results = run_mala_chain(op, rng, accept_rng, o,
                             chain_runner<Backend, decltype(tag)>(op, x0, given, count));
  });
  return *results;
}

}  // namespace coopflow
