#include "weight_norm_loops.h"

#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// Calls f(layer, its row) for rows [begin, end) of all layers.
template <typename Layer, typename F>
void for_each_row(const LayerRows<Layer>& rows, int64_t begin, int64_t end, const F& f) {
  int64_t l = layer_of_row(rows.first_rows, rows.count, begin);
  for (int64_t row = begin; row < end; ++row) {
    while (l + 1 < rows.count && rows.first_rows[l + 1] <= row) ++l;
    f(rows.layers[l], row - rows.first_rows[l]);
  }
}

// Enough for the additions that a processor has in flight: rows are short.
constexpr int64_t kRowLanes = 2 * kLanes;

template <typename A>
void add_products_by_lane(const A* a, const A* b, int64_t n, A* lanes) {
  A sums[kRowLanes];  // a copy stays in registers
  for (int64_t lane = 0; lane < kRowLanes; ++lane) sums[lane] = lanes[lane];
  int64_t i = 0;
  for (; i + kRowLanes <= n; i += kRowLanes) {
    for (int64_t lane = 0; lane < kRowLanes; ++lane) {
      sums[lane] = multiply_add(a[i + lane], b[i + lane], sums[lane]);
    }
  }
  for (int64_t lane = 0; lane < kRowLanes; ++lane) lanes[lane] = sums[lane];
  COOPFLOW_ELEMENTWISE
  for (int64_t lane = 0; lane < n - i; ++lane) {
    lanes[lane] = multiply_add(a[i + lane], b[i + lane], lanes[lane]);
  }
}

template <typename T>
arithmetic_t<T> gain_of(const void* gains, int64_t row) {
  return to_arithmetic(static_cast<const T*>(gains)[row]);
}

template <typename T>
void forward(const LayerRows<WeightNormLayer>& rows, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for_each_row(rows, begin, end, [](const WeightNormLayer& layer, int64_t row) {
    const int64_t first = row * layer.per_row;
    alignas(64) A lanes[kRowLanes] = {};
    for_each_part<T>(layer.per_row, [&](int64_t e, int64_t n) {
      alignas(64) A v_buffer[kTile];
      const A* v = view<T>(layer.direction, first + e, n, v_buffer);
      add_products_by_lane(v, v, n, lanes);
    });
    const A factor = weight_norm_factor(gain_of<T>(layer.gain, row), sum_by_halves(lanes));
    for_each_part<T>(layer.per_row, [&](int64_t e, int64_t n) {
      alignas(64) A v_buffer[kTile], w_buffer[kTile];
      const A* v = view<T>(layer.direction, first + e, n, v_buffer);
      A* w = room<T>(layer.weight, first + e, w_buffer);
      COOPFLOW_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) w[i] = v[i] * factor;
      put_back<T>(w, first + e, n, layer.weight);
    });
  });
}

template <typename T>
void backward(const LayerRows<WeightNormBackwardLayer>& rows, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for_each_row(rows, begin, end, [](const WeightNormBackwardLayer& layer, int64_t row) {
    const int64_t first = row * layer.per_row;
    alignas(64) A squares[kRowLanes] = {}, products[kRowLanes] = {};
    for_each_part<T>(layer.per_row, [&](int64_t e, int64_t n) {
      alignas(64) A v_buffer[kTile], grad_buffer[kTile];
      const A* v = view<T>(layer.direction, first + e, n, v_buffer);
      const A* grad = view<T>(layer.grad_weight, first + e, n, grad_buffer);
      add_products_by_lane(v, v, n, squares);
      add_products_by_lane(v, grad, n, products);
    });
    const WeightNormGradient<A> gradient = weight_norm_gradient(
        gain_of<T>(layer.gain, row), sum_by_halves(squares), sum_by_halves(products));
    static_cast<T*>(layer.grad_gain)[row] = from_arithmetic<T>(gradient.gain);
    for_each_part<T>(layer.per_row, [&](int64_t e, int64_t n) {
      alignas(64) A v_buffer[kTile], grad_buffer[kTile], out_buffer[kTile];
      const A* v = view<T>(layer.direction, first + e, n, v_buffer);
      const A* grad = view<T>(layer.grad_weight, first + e, n, grad_buffer);
      A* out = room<T>(layer.grad_direction, first + e, out_buffer);
      COOPFLOW_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) out[i] = direction_gradient(gradient, grad[i], v[i]);
      put_back<T>(out, first + e, n, layer.grad_direction);
    });
  });
}

}  // namespace

template <typename T>
WeightNormLoops<T> weight_norm_loops() {
  return {forward<T>, backward<T>};
}

template WeightNormLoops<float> weight_norm_loops();
template WeightNormLoops<double> weight_norm_loops();
template WeightNormLoops<bfloat16> weight_norm_loops();
template WeightNormLoops<float16> weight_norm_loops();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
