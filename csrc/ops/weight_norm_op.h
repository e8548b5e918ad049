// weight_norm and its derivative as the dispatcher calls them: checks and layers, written once. A
// back end is a type with
//   template <typename T>
//   static void run(const std::vector<WeightNormLayer>& layers, const Tensor& like);
//   and the same of WeightNormBackwardLayer
// where the layers have rows and `like` tells the device.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "coopflow/weight_norm.h"
#include "ops/op_checks.h"

namespace coopflow {

// The layers that both ops are given.
class WeightNormOp {
 public:
  WeightNormOp(const char* name, const std::vector<Tensor>& directions,
               const std::vector<Tensor>& gains)
      : check_(name), directions_(directions) {
    if (directions.empty()) check_.fail("directions", "must hold at least one tensor, got none");
    check_count("gains", gains);
    for (std::size_t i = 0; i < directions.size(); ++i) check_layer(i, gains[i]);
  }

  // As many as there are layers.
  void check_count(const char* argument, const std::vector<Tensor>& tensors) const {
    if (tensors.size() != directions_.size()) {
      check_.fail(argument, "must be as many as the directions, ", directions_.size(), ", got ",
                  tensors.size());
    }
  }

  void check_like_directions(const char* argument, const std::vector<Tensor>& tensors) const {
    check_count(argument, tensors);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::string name = numbered(argument, i);
      check_like_first(name, tensors[i]);
      check_.same_shape(name.c_str(), tensors[i], directions_[i],
                        numbered("directions", i).c_str());
    }
  }

  const Tensor& first() const { return directions_[0]; }
  int64_t rows(std::size_t i) const { return directions_[i].size(0); }
  int64_t per_row(std::size_t i) const {
    int64_t elements = 1;
    for (int64_t d = 1; d < directions_[i].dim(); ++d) elements *= directions_[i].size(d);
    return elements;
  }

 private:
  static std::string numbered(const char* argument, std::size_t i) {
    return std::string(argument) + "[" + std::to_string(i) + "]";
  }

  // Of the first direction's dtype and device.
  void check_like_first(const std::string& name, const Tensor& t) const {
    check_.has_dtype(name.c_str(), t, first().scalar_type());
    check_.same_device(name.c_str(), t, first(), "directions[0]");
    check_.is_contiguous(name.c_str(), t);
  }

  void check_layer(std::size_t i, const Tensor& gain) const {
    const Tensor& direction = directions_[i];
    const std::string name = numbered("directions", i), gain_name = numbered("gains", i);
    if (i == 0) check_.is_floating(name.c_str(), direction);
    check_like_first(name, direction);
    if (direction.dim() == 0) check_.fail(name.c_str(), "must have rows, got shape ()");
    check_like_first(gain_name, gain);
    bool fits = gain.dim() == direction.dim() && gain.size(0) == direction.size(0);
    for (int64_t d = 1; fits && d < gain.dim(); ++d) fits = gain.size(d) == 1;
    if (!fits) {
      check_.fail(gain_name.c_str(), "must have shape (rows, 1, ...) beside ", name, " of shape ",
                  shape_text(direction), ", got ", shape_text(gain));
    }
  }

  OpChecks check_;
  const std::vector<Tensor>& directions_;
};

template <typename Backend, typename Layer>
void run_layers(const std::vector<Layer>& layers, const Tensor& like) {
  if (layers.empty()) return;
  dispatch_floating(like.scalar_type(), [&](auto tag) {
    Backend::template run<typename decltype(tag)::type>(layers, like);
  });
}

template <typename Backend>
std::vector<Tensor> weight_norm(std::vector<Tensor> directions, std::vector<Tensor> gains) {
  const WeightNormOp op("weight_norm", directions, gains);
  std::vector<Tensor> weights;
  std::vector<WeightNormLayer> layers;
  weights.reserve(directions.size());
  layers.reserve(directions.size());
  for (std::size_t i = 0; i < directions.size(); ++i) {
    weights.push_back(torch::stable::empty_like(directions[i]));
    if (op.rows(i) == 0) continue;
    layers.push_back({directions[i].const_data_ptr(), gains[i].const_data_ptr(),
                      weights[i].mutable_data_ptr(), op.rows(i), op.per_row(i)});
  }
  run_layers<Backend>(layers, op.first());
  return weights;
}

// Gradients of the directions and of the gains.
template <typename Backend>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> weight_norm_backward(
    std::vector<Tensor> grads, std::vector<Tensor> directions, std::vector<Tensor> gains) {
  const WeightNormOp op("weight_norm_backward", directions, gains);
  op.check_like_directions("grads", grads);
  std::vector<Tensor> grad_directions, grad_gains;
  std::vector<WeightNormBackwardLayer> layers;
  grad_directions.reserve(directions.size());
  grad_gains.reserve(directions.size());
  layers.reserve(directions.size());
  for (std::size_t i = 0; i < directions.size(); ++i) {
    grad_directions.push_back(torch::stable::empty_like(directions[i]));
    grad_gains.push_back(torch::stable::empty_like(gains[i]));
    if (op.rows(i) == 0) continue;
    layers.push_back({grads[i].const_data_ptr(), directions[i].const_data_ptr(),
                      gains[i].const_data_ptr(), grad_directions[i].mutable_data_ptr(),
                      grad_gains[i].mutable_data_ptr(), op.rows(i), op.per_row(i)});
  }
  run_layers<Backend>(layers, op.first());
  return {grad_directions, grad_gains};
}

}  // namespace coopflow
