// Energies in closed form, U with p(x) = exp(-U(x)) up to a constant, for whole chains: each gives
// its value and its gradient at once, of chains that lie side by side (ChainLanes).
//
// An energy is a template of the arithmetic type A with
//   kName, kTensors, kNumbers, kLeastDim    how it is called, and what it is given
//   Energy(const EnergyParameters<A>&)
//   table_size(), table_entry(i)            numbers that are made of its tensors once for many
//   steps operator()<kValue>(table, per_chain, lanes)
//                                           sets lanes.grad, and with kValue lanes.energy, at
//                                           lanes.x
// and a place in AnalyticEnergies at the end of this file.
#pragma once

#include <array>
#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/langevin_chain.h"

namespace coopflow {

// A tensor that an energy is given. Its shape is one letter a dimension: D, the elements of a
// chain, or K, any number, the same in all tensors of the energy.
struct EnergyTensor {
  const char* name;
  const char* shape;
};

struct EnergyNumber {
  const char* name;
  bool positive;  // it must be
};

template <std::size_t kCount>
using EnergyTensors = std::array<EnergyTensor, kCount>;
template <std::size_t kCount>
using EnergyNumbers = std::array<EnergyNumber, kCount>;

// What an energy is made of: its tensors and numbers in the order of their names.
template <typename A>
struct EnergyParameters {
  static constexpr int kMost = 3;
  const A* tensors[kMost];
  A numbers[kMost];
  int64_t per_chain;  // D
  int64_t count;      // K
};

// Of an energy that needs no table.
struct NoTable {
  COOPFLOW_HD int64_t table_size() const { return 0; }
  COOPFLOW_HD float table_entry(int64_t /*i*/) const { return 0; }
};

// --- sums over elements that do not know one another --------------------------------------------

template <typename A>
struct ValueAndDerivative {
  A value, derivative;
};

// U = sum energy.term(x_e). By value: a copy that no store of a gradient can change.
template <bool kValue, int kLanes, typename A, typename Energy>
COOPFLOW_HD void sum_of_terms(Energy energy, int64_t per_chain, ChainLanes<A, kLanes>& lanes) {
  A sums[kLanes] = {};
  for (int64_t e = 0; e < per_chain; ++e) {
    const A* const x = lanes.x + e * kLanes;
    A* const grad = lanes.grad + e * kLanes;
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const ValueAndDerivative<A> term = energy.term(x[l]);
      grad[l] = term.derivative;
      if (kValue) sums[l] += term.value;
    }
  }
  if (!kValue) return;
  for (int l = 0; l < kLanes; ++l) lanes.energy[l] = sums[l];
}

// U = h * sum (x^2 - 1)^2.
template <typename A>
struct DoubleWell : NoTable {
  static constexpr const char* kName = "double_well";
  static constexpr EnergyTensors<0> kTensors{};
  static constexpr EnergyNumbers<1> kNumbers{{{"barrier_height", false}}};
  static constexpr int64_t kLeastDim = 1;

  explicit DoubleWell(const EnergyParameters<A>& given) : h(given.numbers[0]) {}

  COOPFLOW_HD ValueAndDerivative<A> term(A x) const {
    const A well = multiply_add(x, x, A(-1));
    return {h * (well * well), A(4) * h * x * well};
  }

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* /*table*/, int64_t per_chain,
                              ChainLanes<A, kLanes>& lanes) const {
    sum_of_terms<kValue>(*this, per_chain, lanes);
  }

  A h;
};

// U = a * D + sum x^2 - a cos 2 pi x.
template <typename A>
struct Rastrigin : NoTable {
  static constexpr const char* kName = "rastrigin";
  static constexpr EnergyTensors<0> kTensors{};
  static constexpr EnergyNumbers<1> kNumbers{{{"a", false}}};
  static constexpr int64_t kLeastDim = 1;

  explicit Rastrigin(const EnergyParameters<A>& given) : a(given.numbers[0]) {}

  COOPFLOW_HD ValueAndDerivative<A> term(A x) const {
    A sine, cosine;
    sincos_2pi(x, &sine, &cosine);
    const A bowl = multiply_add(x, x, a), slope = A(6.283185307179586) * a;
    return {multiply_add(-a, cosine, bowl), multiply_add(slope, sine, A(2) * x)};
  }

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* /*table*/, int64_t per_chain,
                              ChainLanes<A, kLanes>& lanes) const {
    sum_of_terms<kValue>(*this, per_chain, lanes);
  }

  A a;
};

// --- others ------------------------------------------------------------------------------------

// U = sum b (x_{e+1} - x_e^2)^2 + (a - x_e)^2.
template <typename A>
struct Rosenbrock : NoTable {
  static constexpr const char* kName = "rosenbrock";
  static constexpr EnergyTensors<0> kTensors{};
  static constexpr EnergyNumbers<2> kNumbers{{{"a", false}, {"b", false}}};
  static constexpr int64_t kLeastDim = 2;

  explicit Rosenbrock(const EnergyParameters<A>& given)
      : a(given.numbers[0]), b(given.numbers[1]) {}

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* /*table*/, int64_t per_chain,
                              ChainLanes<A, kLanes>& lanes) const {
    A energy[kLanes] = {}, from_before[kLanes] = {};
    for (int64_t e = 0; e + 1 < per_chain; ++e) {
      const A* const x = lanes.x + e * kLanes;
      A* const grad = lanes.grad + e * kLanes;
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) {
        const A head = x[l], ridge = multiply_add(-head, head, x[kLanes + l]), rest = a - head;
        grad[l] = from_before[l] - A(4) * b * head * ridge - A(2) * rest;
        from_before[l] = A(2) * b * ridge;
        if (kValue) energy[l] += multiply_add(b * ridge, ridge, rest * rest);
      }
    }
    A* const last = lanes.grad + (per_chain - 1) * kLanes;
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      last[l] = from_before[l];
      if (kValue) lanes.energy[l] = energy[l];
    }
  }

  A a, b;
};

// v = x_0 from N(0, scale^2), the others from N(0, e^v); normalised.
template <typename A>
struct Funnel : NoTable {
  static constexpr const char* kName = "funnel";
  static constexpr EnergyTensors<0> kTensors{};
  static constexpr EnergyNumbers<1> kNumbers{{{"scale", true}}};
  static constexpr int64_t kLeastDim = 2;

  explicit Funnel(const EnergyParameters<A>& given) : scale(given.numbers[0]) {}

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* /*table*/, int64_t per_chain,
                              ChainLanes<A, kLanes>& lanes) const {
    const A precision_of_v = A(1) / (scale * scale);
    const A half_rest = A(0.5) * static_cast<A>(per_chain - 1);
    const A log_root_2pi = A(0.9189385332046727);
    const A constant = log_positive(scale) + log_root_2pi * static_cast<A>(per_chain);
    A precision[kLanes], squares[kLanes] = {};
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) precision[l] = exponential(-lanes.x[l]);
    for (int64_t e = 1; e < per_chain; ++e) {
      const A* const x = lanes.x + e * kLanes;
      A* const grad = lanes.grad + e * kLanes;
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) {
        grad[l] = x[l] * precision[l];
        squares[l] = multiply_add(x[l], grad[l], squares[l]);
      }
    }
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const A v = lanes.x[l], half_squares = A(0.5) * squares[l];
      lanes.grad[l] = multiply_add(v, precision_of_v, half_rest - half_squares);
      if (kValue) {
        const A of_v = multiply_add(A(0.5) * precision_of_v * v, v, constant);
        lanes.energy[l] = multiply_add(half_rest, v, of_v + half_squares);
      }
    }
  }

  A scale;
};

// U = (x - mean)^T precision (x - mean) / 2 + log_norm.
template <typename A>
struct Gaussian {
  static constexpr const char* kName = "gaussian";
  static constexpr EnergyTensors<3> kTensors{
      {{"mean", "D"}, {"precision", "DD"}, {"log_norm", ""}}};
  static constexpr EnergyNumbers<0> kNumbers{};
  static constexpr int64_t kLeastDim = 1;

  explicit Gaussian(const EnergyParameters<A>& given)
      : mean(given.tensors[0]),
        precision(given.tensors[1]),
        log_norm(given.tensors[2]),
        per_chain(given.per_chain) {}

  COOPFLOW_HD int64_t table_size() const { return per_chain * (per_chain + 1) + 1; }

  // log_norm, the mean, the rows of the precision.
  COOPFLOW_HD A table_entry(int64_t i) const {
    if (i == 0) return *log_norm;
    return i <= per_chain ? mean[i - 1] : precision[i - 1 - per_chain];
  }

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* table, int64_t n, ChainLanes<A, kLanes>& lanes) const {
    const A* const centre = table + 1;
    A energy[kLanes];
    for (int l = 0; l < kLanes; ++l) energy[l] = table[0];
    for (int64_t e = 0; e < n; ++e) {
      const A* const row = table + 1 + n + e * n;
      A product[kLanes] = {};
      for (int64_t j = 0; j < n; ++j) {
        const A* const x = lanes.x + j * kLanes;
        const A weight = row[j], mean_j = centre[j];
        COOPFLOW_LANES
        for (int l = 0; l < kLanes; ++l) {
          product[l] = multiply_add(weight, x[l] - mean_j, product[l]);
        }
      }
      const A* const x = lanes.x + e * kLanes;
      A* const grad = lanes.grad + e * kLanes;
      const A mean_e = centre[e];
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) {
        grad[l] = product[l];
        if (kValue) energy[l] = multiply_add(A(0.5) * (x[l] - mean_e), product[l], energy[l]);
      }
    }
    if (!kValue) return;
    for (int l = 0; l < kLanes; ++l) lanes.energy[l] = energy[l];
  }

  const A *mean, *precision, *log_norm;
  int64_t per_chain;
};

// U = -log sum_k w_k N(x; means_k, diag(stds_k^2)), normalised. Exponents are taken to base 2: with
// t = (x - mean) r and r = sqrt(log2(e) / 2) / std, a component is 2^(c - sum t^2). Shares below
// 2^-110 would make denormal products, which slow a CPU down.
template <typename A>
struct GaussianMixture {
  static constexpr const char* kName = "gaussian_mixture";
  static constexpr EnergyTensors<3> kTensors{
      {{"means", "KD"}, {"stds", "KD"}, {"log_weights", "K"}}};
  static constexpr EnergyNumbers<0> kNumbers{};
  static constexpr int64_t kLeastDim = 1;

  explicit GaussianMixture(const EnergyParameters<A>& given)
      : means(given.tensors[0]),
        stds(given.tensors[1]),
        log_weights(given.tensors[2]),
        per_chain(given.per_chain),
        components(given.count) {}

  COOPFLOW_HD int64_t entries() const { return 2 * per_chain + 1; }
  COOPFLOW_HD int64_t table_size() const { return components * entries(); }

  // Of each component c, and for each element its mean and its r.
  COOPFLOW_HD A table_entry(int64_t i) const {
    const int64_t component = i / entries(), place = i - component * entries();
    const A* const std_of = stds + component * per_chain;
    if (place > 0) {
      const int64_t e = (place - 1) / 2;
      return place % 2 == 1 ? means[component * per_chain + e] : A(0.8493218002880191) / std_of[e];
    }
    A c = log_weights[component] - A(0.9189385332046727) * static_cast<A>(per_chain);
    for (int64_t e = 0; e < per_chain; ++e) c -= log_positive(std_of[e]);
    return A(1.4426950408889634) * c;
  }

  template <bool kValue, int kLanes>
  COOPFLOW_HD void operator()(const A* table, int64_t n, ChainLanes<A, kLanes>& lanes) const {
    A most[kLanes], total[kLanes] = {};
    exponents(table, n, lanes, most);
    for (int64_t k = 1; k < components; ++k) {
      A exponent[kLanes];
      exponents(table + k * (2 * n + 1), n, lanes, exponent);
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) most[l] = exponent[l] > most[l] ? exponent[l] : most[l];
    }
    for (int64_t i = 0; i < n * kLanes; ++i) lanes.grad[i] = A(0);
    for (int64_t k = 0; k < components; ++k) {
      const A* const component = table + k * (2 * n + 1);
      A share[kLanes];
      exponents(component, n, lanes, share);
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) {
        share[l] = exponential2_nonpositive<-110>(share[l] - most[l]);
        total[l] += share[l];
      }
      for (int64_t e = 0; e < n; ++e) {
        const A mean = component[1 + 2 * e], r = component[2 + 2 * e];
        const A* const x = lanes.x + e * kLanes;
        A* const grad = lanes.grad + e * kLanes;
        COOPFLOW_LANES
        for (int l = 0; l < kLanes; ++l) {
          grad[l] = multiply_add(share[l] * ((x[l] - mean) * r), r, grad[l]);
        }
      }
    }
    A scale[kLanes];
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) scale[l] = A(1.3862943611198906) / total[l];  // 2 log 2
    for (int64_t e = 0; e < n; ++e) {
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) lanes.grad[e * kLanes + l] *= scale[l];
    }
    if (!kValue) return;
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      lanes.energy[l] = -multiply_add(A(0.6931471805599453), most[l], log_positive(total[l]));
    }
  }

  // Of one component at every lane.
  template <int kLanes>
  COOPFLOW_HD static void exponents(const A* component, int64_t n,
                                    const ChainLanes<A, kLanes>& lanes, A (&result)[kLanes]) {
    for (int l = 0; l < kLanes; ++l) result[l] = component[0];
    for (int64_t e = 0; e < n; ++e) {
      const A mean = component[1 + 2 * e], r = component[2 + 2 * e];
      const A* const x = lanes.x + e * kLanes;
      COOPFLOW_LANES
      for (int l = 0; l < kLanes; ++l) {
        const A t = (x[l] - mean) * r;
        result[l] = multiply_add(-t, t, result[l]);
      }
    }
  }

  const A *means, *stds, *log_weights;
  int64_t per_chain, components;
};

// --- registration --------------------------------------------------------------------------------

template <template <typename> class Energy>
struct EnergyTag {
  template <typename A>
  using type = Energy<A>;
};

template <template <typename> class... Energies>
struct EnergyList {
  // Calls f(EnergyTag<Energy>()) with each.
  template <typename F>
  static void for_each(const F& f) {
    (f(EnergyTag<Energies>()), ...);
  }
};

// Every energy that chains know.
using AnalyticEnergies =
    EnergyList<DoubleWell, Funnel, Gaussian, GaussianMixture, Rastrigin, Rosenbrock>;

}  // namespace coopflow
