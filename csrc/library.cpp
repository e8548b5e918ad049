// Every op's schema. This is the only place that names an op.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "coopflow/mlp_tile.h"
#include "coopflow/philox.h"
#include "cpu/isa.h"
#include "ops/langevin_bound_op.h"

#if !defined(COOPFLOW_CUDA_VERSION)  // built without CUDA code
#define COOPFLOW_CUDA_VERSION ""
#define COOPFLOW_CUDA_ARCHS ""
#endif

namespace coopflow {
namespace {

int64_t fold_in_op(int64_t seed, int64_t data) {
  return static_cast<int64_t>(fold_in(static_cast<uint64_t>(seed), static_cast<uint64_t>(data)));
}

int64_t mlp_shared_bytes(std::vector<int64_t> sizes, bool bfloat16) {
  const int depth = static_cast<int>(sizes.size()) - 1;
  int given[kMlpMaxDepth + 1] = {};
  if (depth < 1 || depth > kMlpMaxDepth) {
    throw std::runtime_error("coopflow::mlp_shared_bytes: sizes: must be 2 to 5 numbers");
  }
  for (int l = 0; l <= depth; ++l) {
    if (sizes[l] < 1 || sizes[l] > kMlpMaxSize) {
      throw std::runtime_error("coopflow::mlp_shared_bytes: sizes: must be from 1 to 128");
    }
    given[l] = static_cast<int>(sizes[l]);
  }
  return has_bfloat16_products(bfloat16, depth)
             ? MlpBfloat16Tile::make(given, depth, kMlpLeastTile).bytes()
             : MlpTile::make(given, depth, kMlpLeastTile).bytes();
}

// JSON, so that it needs no type of its own.
std::string build_info() {
  return std::string("{\"version\": \"") + COOPFLOW_VERSION + "\", \"compiler\": \"" +
         COOPFLOW_COMPILER + "\", \"torch\": \"" + COOPFLOW_TORCH_VERSION +
         "\", \"cuda_version\": \"" + COOPFLOW_CUDA_VERSION + "\", \"cuda_architectures\": \"" +
         COOPFLOW_CUDA_ARCHS + "\", \"cpu_isa\": \"" + isa_name(current_isa()) + "\"}";
}

}  // namespace
}  // namespace coopflow

// The coefficients of a Langevin step are pairs: a float, or a (T or 1, B or 1) table of which row
// `step` is used. See csrc/include/coopflow/langevin.h for the update itself.
#define COOPFLOW_LANGEVIN_ARGS                                                               \
  "float drift=0.0, Tensor? drift_t=None, float noise=0.0, Tensor? noise_t=None, "           \
  "float decay=0.0, Tensor? decay_t=None, float pull=0.0, Tensor? pull_t=None, "             \
  "Tensor? x_ref=None, bool is_score=False, float? grad_clip=None, float? grad_norm=None, "  \
  "float? step_clip=None, float? clamp_low=None, float? clamp_high=None, int noise_when=0, " \
  "SymInt step=0, Tensor? xi=None"

// Of whole chains: those of a step that hold for all of them, and what is recorded. thin 0: no
// trajectory. See csrc/ops/langevin_chain_op.h.
#define COOPFLOW_LANGEVIN_CHAIN_ARGS                                                               \
  "SymInt n_steps, float drift=0.0, Tensor? drift_t=None, float noise=0.0, Tensor? noise_t=None, " \
  "float decay=0.0, Tensor? decay_t=None, float pull=0.0, Tensor? pull_t=None, "                   \
  "Tensor? x_ref=None, float? grad_clip=None, float? grad_norm=None, float? step_clip=None, "      \
  "float? clamp_low=None, float? clamp_high=None, bool clamp_end=False, "                          \
  "bool negative_energy=False, SymInt step=0, Tensor? xi=None, SymInt thin=0, bool stats=False, "  \
  "bool freeze_nonfinite=False"

// Of chains that accept their moves; step_size is such a pair. See csrc/ops/mala_chain_op.h.
#define COOPFLOW_MALA_CHAIN_ARGS                                                           \
  "SymInt n_steps, float step_size=0.0, Tensor? step_size_t=None, float temperature=1.0, " \
  "SymInt adapt_steps=0, float target_accept=0.574, bool negative_energy=False, "          \
  "SymInt step=0, Tensor? xi=None, SymInt thin=0, bool stats=False"

STABLE_TORCH_LIBRARY(coopflow, m) {
  // Standard normals and uniforms, a pure function of (seed, time, chain, element).
  m.def("normal_(Tensor(a!) out, Tensor rng, *, SymInt step=0) -> ()");
  m.def("uniform_(Tensor(a!) out, Tensor rng, *, SymInt step=0) -> ()");
  // One Langevin update of every chain, in place, and as a function.
  m.def("langevin_step_(Tensor(a!) x, Tensor grad, Tensor rng, *, " COOPFLOW_LANGEVIN_ARGS
        ", Tensor(b!)? x_low=None, Tensor(c!)? stats=None, Tensor(d!)? active=None, "
        "bool freeze_nonfinite=False, Tensor(e!)? frozen_at=None) -> ()");
  // The same for the loop of a chain: torch takes longer to look 24 arguments up by name and to
  // hand them over than a small step takes to run, so they are bound once, under a number. xi and
  // stats have a row for each step there. See csrc/ops/langevin_bound_op.h.
  m.def("langevin_bind(Tensor x, Tensor rng, *, " COOPFLOW_LANGEVIN_ARGS
        ", Tensor? x_low=None, Tensor? stats=None, Tensor? active=None, "
        "bool freeze_nonfinite=False, Tensor? frozen_at=None) -> int");
  m.def("langevin_bound_step_(Tensor(a!) x, Tensor grad, int bound, SymInt step) -> ()");
  m.def("langevin_unbind(int bound) -> ()");
  m.def("langevin_step(Tensor x, Tensor grad, Tensor rng, " COOPFLOW_LANGEVIN_ARGS ") -> Tensor");
  // The noise of one step alone.
  m.def(
      "langevin_noise_(Tensor(a!) x, Tensor rng, *, float noise=0.0, Tensor? noise_t=None, "
      "SymInt step=0, Tensor? xi=None, Tensor? active=None) -> ()");
  // Whole chains of an energy in closed form, which its name, tensors and numbers describe. The
  // name comes as its characters: torch's boxing of a str (2.10 to 2.13) leaks it. x, trajectory,
  // statistics with the energy, and the step at which each chain stopped.
  m.def(
      "analytic_langevin_chain(Tensor x0, Tensor rng, int[] energy, Tensor[] tensors, "
      "float[] numbers, *, " COOPFLOW_LANGEVIN_CHAIN_ARGS ") -> (Tensor, Tensor, Tensor, Tensor)");
  // Chains of an energy that is a fully connected network, Linear - activation - ... -
  // Linear(., 1): x, trajectory, statistics, and the step at which each chain stopped. Weights
  // are (out, in); the activations are numbered in csrc/include/coopflow/mlp.h.
  // bfloat16: on CUDA the factors of products between hidden layers are rounded to it.
  m.def(
      "mlp_langevin_chain(Tensor x0, Tensor rng, Tensor[] weights, Tensor[] biases, "
      "int activation, float activation_shape, float activation_threshold, "
      "*, " COOPFLOW_LANGEVIN_CHAIN_ARGS
      ", bool bfloat16=False) -> (Tensor, Tensor, Tensor, Tensor)");
  // Chains of the same energies by the Metropolis-adjusted Langevin algorithm: x, trajectory,
  // statistics, the last step size of each chain, and whether its start is finite.
  m.def(
      "analytic_mala_chain(Tensor x0, Tensor rng, Tensor accept_rng, int[] energy, "
      "Tensor[] tensors, float[] numbers, *, " COOPFLOW_MALA_CHAIN_ARGS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlp_mala_chain(Tensor x0, Tensor rng, Tensor accept_rng, Tensor[] weights, "
      "Tensor[] biases, int activation, float activation_shape, float activation_threshold, "
      "*, " COOPFLOW_MALA_CHAIN_ARGS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // y = x * e^a + b with log|det|, its inverse, and what their backward passes need.
  m.def("affine_coupling(Tensor x, Tensor params) -> (Tensor, Tensor)");
  m.def("affine_coupling_inverse(Tensor y, Tensor params) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor grad_y, Tensor grad_ladj, Tensor x, Tensor params) -> "
      "(Tensor, Tensor)");
  m.def(
      "affine_coupling_inverse_backward(Tensor grad_x, Tensor grad_ladj, Tensor x, Tensor params) "
      "-> (Tensor, Tensor)");
  // y = (logit F(x) + b) * e^a with F the CDF of a mixture of logistics, its inverse, and what
  // their backward passes need.
  m.def("mixture_logistic_coupling(Tensor x, Tensor params, bool affine=True) -> (Tensor, Tensor)");
  m.def(
      "mixture_logistic_coupling_inverse(Tensor y, Tensor params, bool affine=True, "
      "bool legacy_cdf_clamp=False) -> (Tensor, Tensor)");
  m.def(
      "mixture_logistic_coupling_backward(Tensor grad_y, Tensor grad_ladj, Tensor x, "
      "Tensor params, bool affine=True) -> (Tensor, Tensor)");
  m.def(
      "mixture_logistic_coupling_inverse_backward(Tensor grad_x, Tensor grad_ladj, Tensor y, "
      "Tensor x, Tensor params, bool affine=True, bool legacy_cdf_clamp=False) -> "
      "(Tensor, Tensor)");
  // Self-attention over (B, H, L, d) whose weights are dropped where the uniforms (B, H, L, L) of
  // (rng, step) are below p, with the log-sum-exp of each row of scores (B, H, L); and its
  // gradients, those of k, v and q side by side, (B, L, 3, H, d). scale None: d^-1/2.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor rng, float p, SymInt step=0, "
      "float? scale=None) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor rng, Tensor out, "
      "Tensor lse, float p, SymInt step=0, float? scale=None) -> Tensor");
  // elu of x (B, C, ...) and of -x, (B, 2C, ...); whole channels are zero where the uniforms
  // (B, 2C) of (rng, step) are below p, the others divided by 1 - p. And its gradient.
  m.def("concat_elu(Tensor x, Tensor? rng=None, float p=0.0, SymInt step=0) -> Tensor");
  m.def(
      "concat_elu_backward(Tensor grad_y, Tensor y, Tensor? rng=None, float p=0.0, "
      "SymInt step=0) -> Tensor");
  // LayerNorm over the last dimension of x + a * sigma(b), x (..., C) and gates (a, b) (..., 2C),
  // with mean and one over the standard deviation of each row (..., 2); and what its backward pass
  // needs: gradients of x, of the gates, and of weight and bias (2, C).
  m.def(
      "gate_add_norm(Tensor x, Tensor gates, Tensor weight, Tensor bias, float eps=1e-05) -> "
      "(Tensor, Tensor)");
  m.def(
      "gate_add_norm_backward(Tensor grad_y, Tensor x, Tensor gates, Tensor weight, Tensor norms, "
      "float eps=1e-05) -> (Tensor, Tensor, Tensor)");
  // w = g * v / |v| for every row of many layers' weights at once: directions v (rows, ...) and
  // gains g (rows, 1, ...) of each; and what its backward pass needs.
  m.def("weight_norm(Tensor[] directions, Tensor[] gains) -> Tensor[]");
  m.def(
      "weight_norm_backward(Tensor[] grads, Tensor[] directions, Tensor[] gains) -> "
      "(Tensor[], Tensor[])");
  // Bytes of shared memory that a network of these sizes, the state's and those of the hidden
  // layers, needs on CUDA, as mlp_langevin_chain takes it with this `bfloat16`.
  m.def("mlp_shared_bytes(int[] sizes, bool bfloat16=False) -> int");
  // The seed of a separate use.
  m.def("fold_in(int seed, int data) -> int");
  // Versions, architectures and instruction set, as JSON.
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(coopflow, CompositeExplicitAutograd, m) {
  m.impl("mlp_shared_bytes", TORCH_BOX(&coopflow::mlp_shared_bytes));
  m.impl("langevin_unbind", TORCH_BOX(&coopflow::langevin_unbind));
  m.impl("fold_in", TORCH_BOX(&coopflow::fold_in_op));
  m.impl("build_info", TORCH_BOX(&coopflow::build_info));
}
