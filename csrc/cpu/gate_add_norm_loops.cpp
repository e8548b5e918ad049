#include "gate_add_norm_loops.h"

#include <algorithm>

#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// Calls f(first row, n) for blocks of the rows [begin, end): rows of a block take each step side by
// side, since within a row each waits for the one before.
template <typename F>
void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; row += kGateAddNormBlock) {
    f(row, std::min(end - row, kGateAddNormBlock));
  }
}

// term(0) + ... + term(n - 1).
template <typename A, typename F>
A sum_over(int64_t n, const F& term) {
  alignas(64) A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; lane < n - i; ++lane) lanes[lane] += term(i + lane);
  return sum_by_halves(lanes);
}

template <typename T>
void forward(const GateAddNormArgs<arithmetic_t<T>>& args, arithmetic_t<T>* scratch, int64_t begin,
             int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t channels = args.channels;
  const A count = static_cast<A>(channels);
  for_each_block(begin, end, [&](int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (row + r) * channels;
      A* const sums = scratch + r * channels;
      for_each_part<T>(channels, [&](int64_t e, int64_t n) {
        alignas(64) A x_buffer[kTile], a_buffer[kTile], b_buffer[kTile];
        const A* x = view<T>(args.x, first + e, n, x_buffer);
        const A* a = view<T>(args.gates, 2 * first + e, n, a_buffer);
        const A* b = view<T>(args.gates, 2 * first + channels + e, n, b_buffer);
        COOPFLOW_ELEMENTWISE
        for (int64_t i = 0; i < n; ++i) sums[e + i] = gated_sum(x[i], a[i], gate(b[i]).value);
      });
    }
    A means[kGateAddNormBlock], variances[kGateAddNormBlock];
    for (int64_t r = 0; r < rows; ++r) {
      const A* const sums = scratch + r * channels;
      means[r] = sum_over<A>(channels, [&](int64_t c) { return sums[c]; }) / count;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const A* const sums = scratch + r * channels;
      const A mean = means[r];
      variances[r] =
          sum_over<A>(channels, [&](int64_t c) { return (sums[c] - mean) * (sums[c] - mean); }) /
          count;
    }
    for (int64_t r = 0; r < rows; ++r) {
      args.norms[row + r] = {means[r], norm_factor(variances[r], args.eps)};
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (row + r) * channels;
      const A* const sums = scratch + r * channels;
      const NormRow<A> norm = args.norms[row + r];
      for_each_part<T>(channels, [&](int64_t e, int64_t n) {
        alignas(64) A y_buffer[kTile];
        A* y = room<T>(args.y, first + e, y_buffer);
        COOPFLOW_ELEMENTWISE
        for (int64_t i = 0; i < n; ++i) {
          y[i] = multiply_add(norm.normalized(sums[e + i]), args.weight[e + i], args.bias[e + i]);
        }
        put_back<T>(y, first + e, n, args.y);
      });
    }
  });
}

// What the backward pass keeps of a row between its two steps.
template <typename A>
struct RowScratch {
  RowScratch(A* scratch, int64_t channels, int64_t row)
      : normalized(scratch + kGateAddNormScratch * channels * row),
        grads(normalized + channels),
        values(grads + channels),
        slopes(values + channels) {}

  A* normalized;
  A* grads;   // of what was normalized
  A* values;  // of the gates
  A* slopes;
};

template <typename T>
void recompute_row(const GateAddNormBackwardArgs<arithmetic_t<T>>& args, int64_t row,
                   const RowScratch<arithmetic_t<T>>& kept, arithmetic_t<T>* grad_weight,
                   arithmetic_t<T>* grad_bias) {
  using A = arithmetic_t<T>;
  const int64_t channels = args.channels, first = row * channels;
  const NormRow<A> norm = args.norms[row];
  for_each_part<T>(channels, [&](int64_t e, int64_t n) {
    alignas(64) A grad_buffer[kTile], x_buffer[kTile], a_buffer[kTile], b_buffer[kTile];
    const A* grad_y = view<T>(args.grad_y, first + e, n, grad_buffer);
    const A* x = view<T>(args.x, first + e, n, x_buffer);
    const A* a = view<T>(args.gates, 2 * first + e, n, a_buffer);
    const A* b = view<T>(args.gates, 2 * first + channels + e, n, b_buffer);
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = e + i;
      const Gate<A> at = gate(b[i]);
      const A normalized = norm.normalized(gated_sum(x[i], a[i], at.value));
      kept.normalized[c] = normalized;
      kept.grads[c] = grad_y[i] * args.weight[c];
      kept.values[c] = at.value;
      kept.slopes[c] = at.slope;
      grad_weight[c] = multiply_add(grad_y[i], normalized, grad_weight[c]);
      grad_bias[c] += grad_y[i];
    }
  });
}

template <typename T>
void write_gradients(const GateAddNormBackwardArgs<arithmetic_t<T>>& args, int64_t row,
                     const RowScratch<arithmetic_t<T>>& kept,
                     const NormGradient<arithmetic_t<T>>& means) {
  using A = arithmetic_t<T>;
  const int64_t channels = args.channels, first = row * channels;
  const NormRow<A> norm = args.norms[row];
  for_each_part<T>(channels, [&](int64_t e, int64_t n) {
    alignas(64) A a_buffer[kTile];
    alignas(64) A grad_x_buffer[kTile], grad_a_buffer[kTile], grad_b_buffer[kTile];
    const A* a = view<T>(args.gates, 2 * first + e, n, a_buffer);
    A* grad_x = room<T>(args.grad_x, first + e, grad_x_buffer);
    A* grad_a = room<T>(args.grad_gates, 2 * first + e, grad_a_buffer);
    A* grad_b = room<T>(args.grad_gates, 2 * first + channels + e, grad_b_buffer);
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = e + i;
      const A grad_sum = sum_gradient(norm, means, kept.grads[c], kept.normalized[c]);
      const Gate<A> at{kept.values[c], kept.slopes[c]};
      const GateGradient<A> gradient = gate_gradient(grad_sum, a[i], at);
      grad_x[i] = grad_sum;
      grad_a[i] = gradient.a;
      grad_b[i] = gradient.b;
    }
    put_back<T>(grad_x, first + e, n, args.grad_x);
    put_back<T>(grad_a, 2 * first + e, n, args.grad_gates);
    put_back<T>(grad_b, 2 * first + channels + e, n, args.grad_gates);
  });
}

template <typename T>
void backward(const GateAddNormBackwardArgs<arithmetic_t<T>>& args, arithmetic_t<T>* scratch,
              int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t channels = args.channels;
  const A count = static_cast<A>(channels);
  for (int64_t part = begin; part < end; ++part) {
    A* const grad_weight = args.partial_sums + 2 * part * channels;
    A* const grad_bias = grad_weight + channels;
    std::fill(grad_weight, grad_bias + channels, A(0));
    const int64_t first = part * kGateAddNormRows;
    const int64_t last = std::min(first + kGateAddNormRows, args.rows);
    for_each_block(first, last, [&](int64_t row, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r) {
        const RowScratch<A> kept(scratch, channels, r);
        recompute_row<T>(args, row + r, kept, grad_weight, grad_bias);
      }
      NormGradient<A> means[kGateAddNormBlock];
      for (int64_t r = 0; r < rows; ++r) {
        const RowScratch<A> kept(scratch, channels, r);
        means[r] = {sum_over<A>(channels, [&](int64_t c) { return kept.grads[c]; }) / count,
                    sum_over<A>(channels, [&](int64_t c) {
                      return kept.grads[c] * kept.normalized[c];
                    }) / count};
      }
      for (int64_t r = 0; r < rows; ++r) {
        write_gradients<T>(args, row + r, RowScratch<A>(scratch, channels, r), means[r]);
      }
    });
  }
}

}  // namespace

template <typename T>
GateAddNormLoops<T> gate_add_norm_loops() {
  return {forward<T>, backward<T>};
}

template GateAddNormLoops<float> gate_add_norm_loops();
template GateAddNormLoops<double> gate_add_norm_loops();
template GateAddNormLoops<bfloat16> gate_add_norm_loops();
template GateAddNormLoops<float16> gate_add_norm_loops();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
