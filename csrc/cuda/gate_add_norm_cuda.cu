// gate_add_norm and its derivative on CUDA: a warp a row. What it reads of a row it needs again
// after each sum: a lane's first neighbours are held, the others of rows beyond 128 channels are
// read again, from the first-level cache, so that rows may be of any length.
#include "items.cuh"
#include "launch.cuh"
#include "ops/gate_add_norm_op.h"
#include "reduce.cuh"
#include "team.cuh"

namespace coopflow {
namespace {

// Neighbours that a lane has at a time, of half precision too: a row of 96 channels keeps 24 lanes
// busy, where items of 16 bytes would keep 12.
constexpr int kOfLane = 4;
// Channels whose neighbours are held. Where they are read one by one, registers do not suffice.
template <int kVec>
constexpr int64_t kHeld = kVec == 1 ? 0 : kWarp * kOfLane;

// Some neighbours of a row.
template <typename A>
struct SumItem {
  A sums[kOfLane], a[kOfLane];
  Gate<A> gates[kOfLane];
};

// Elements [e, e + n) of the row whose x begins at `first`.
template <typename T, int kVec, typename Args>
__device__ __forceinline__ SumItem<arithmetic_t<T>> load_sums(const Args& args, int64_t first,
                                                              int64_t e, int n) {
  SumItem<arithmetic_t<T>> item;
  arithmetic_t<T> x[kOfLane], b[kOfLane];
  load_item<T, kVec>(args.x, first + e, n, x);
  load_item<T, kVec>(args.gates, 2 * first + e, n, item.a);
  load_item<T, kVec>(args.gates, 2 * first + args.channels + e, n, b);
  COOPFLOW_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    item.gates[i] = gate(b[i]);
    item.sums[i] = gated_sum(x[i], item.a[i], item.gates[i].value);
  }
  return item;
}

// The same with the gradients of what was normalized, and that in place of the sums.
template <typename A>
struct GradientItem {
  SumItem<A> at;
  A grads[kOfLane];
};

template <typename T, int kVec>
__device__ __forceinline__ GradientItem<arithmetic_t<T>> load_gradients(
    const GateAddNormBackwardArgs<arithmetic_t<T>>& args, const NormRow<arithmetic_t<T>>& norm,
    int64_t first, int64_t e, int n) {
  using A = arithmetic_t<T>;
  GradientItem<A> item{load_sums<T, kVec>(args, first, e, n), {}};
  A weight[kOfLane];
  load_item<A, kVec>(args.weight, e, n, weight);
  load_item<T, kVec>(args.grad_y, first + e, n, item.grads);
  COOPFLOW_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    item.grads[i] *= weight[i];
    item.at.sums[i] = norm.normalized(item.at.sums[i]);
  }
  return item;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    gate_add_norm_kernel(const __grid_constant__ GateAddNormArgs<arithmetic_t<T>> args) {
  using A = arithmetic_t<T>;
  const A channels = static_cast<A>(args.channels);
  for (int64_t row = team_index<WarpTeam>(); row < args.rows; row += team_count<WarpTeam>()) {
    const int64_t first = row * args.channels;
    A total[1] = {}, squares[1] = {};
    SumItem<A> held = {};
    for_each_item_of_row<kOfLane>(args.channels, [&](int64_t e, int n) {
      const SumItem<A> item = load_sums<T, kVec>(args, first, e, n);
      if (e < kHeld<kVec>) held = item;
      COOPFLOW_UNROLL
      for (int i = 0; i < kOfLane; ++i) total[0] += i < n ? item.sums[i] : A(0);
    });
    const auto item_at = [&](int64_t e, int n) {
      return e < kHeld<kVec> ? held : load_sums<T, kVec>(args, first, e, n);
    };
    warp_sum(total);
    const A mean = total[0] / channels;
    for_each_item_of_row<kOfLane>(args.channels, [&](int64_t e, int n) {
      const SumItem<A> item = item_at(e, n);
      COOPFLOW_UNROLL
      for (int i = 0; i < kOfLane; ++i) {
        const A distance = i < n ? item.sums[i] - mean : A(0);
        squares[0] = multiply_add(distance, distance, squares[0]);
      }
    });
    warp_sum(squares);
    const NormRow<A> norm{mean, norm_factor(squares[0] / channels, args.eps)};
    if (team_rank<WarpTeam>() == 0) args.norms[row] = norm;
    for_each_item_of_row<kOfLane>(args.channels, [&](int64_t e, int n) {
      const SumItem<A> item = item_at(e, n);
      A weight[kOfLane], bias[kOfLane], y[kOfLane];
      load_item<A, kVec>(args.weight, e, n, weight);
      load_item<A, kVec>(args.bias, e, n, bias);
      COOPFLOW_UNROLL
      for (int i = 0; i < kOfLane; ++i) {
        y[i] = multiply_add(norm.normalized(item.sums[i]), weight[i], bias[i]);
      }
      store_item<T, kVec>(y, first + e, n, args.y);
    });
  }
}

// The gradients of x and of the gates.
template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>) gate_add_norm_backward_kernel(
    const __grid_constant__ GateAddNormBackwardArgs<arithmetic_t<T>> args) {
  using A = arithmetic_t<T>;
  const A channels = static_cast<A>(args.channels);
  for (int64_t row = team_index<WarpTeam>(); row < args.rows; row += team_count<WarpTeam>()) {
    const int64_t first = row * args.channels;
    const NormRow<A> norm = args.norms[row];
    A totals[2] = {};
    GradientItem<A> held = {};
    for_each_item_of_row<kOfLane>(args.channels, [&](int64_t e, int n) {
      const GradientItem<A> item = load_gradients<T, kVec>(args, norm, first, e, n);
      if (e < kHeld<kVec>) held = item;
      COOPFLOW_UNROLL
      for (int i = 0; i < kOfLane; ++i) {
        totals[0] += i < n ? item.grads[i] : A(0);
        totals[1] += i < n ? item.grads[i] * item.at.sums[i] : A(0);
      }
    });
    warp_sum(totals);
    const NormGradient<A> means{totals[0] / channels, totals[1] / channels};
    for_each_item_of_row<kOfLane>(args.channels, [&](int64_t e, int n) {
      const GradientItem<A> item =
          e < kHeld<kVec> ? held : load_gradients<T, kVec>(args, norm, first, e, n);
      A grad_x[kOfLane], grad_a[kOfLane], grad_b[kOfLane];
      COOPFLOW_UNROLL
      for (int i = 0; i < kOfLane; ++i) {
        grad_x[i] = sum_gradient(norm, means, item.grads[i], item.at.sums[i]);
        const GateGradient<A> gradient = gate_gradient(grad_x[i], item.at.a[i], item.at.gates[i]);
        grad_a[i] = gradient.a;
        grad_b[i] = gradient.b;
      }
      store_item<T, kVec>(grad_x, first + e, n, args.grad_x);
      store_item<T, kVec>(grad_a, 2 * first + e, n, args.grad_gates);
      store_item<T, kVec>(grad_b, 2 * first + args.channels + e, n, args.grad_gates);
    });
  }
}

template <typename T>
__device__ __forceinline__ arithmetic_t<T> element(const void* base, int64_t at) {
  return to_arithmetic(static_cast<const T*>(base)[at]);
}

// The gradients of weight and bias over the rows of a part: a warp has neighbouring channels of
// every kMaxWarps-th row, and the block adds its warps' sums up in order.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>) gate_add_norm_parameters_kernel(
    const __grid_constant__ GateAddNormBackwardArgs<arithmetic_t<T>> args) {
  using A = arithmetic_t<T>;
  __shared__ A by_warp[2][kMaxWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = divide_up(args.channels, kWarp);
  const int64_t blocks = divide_up(args.rows, kGateAddNormRows) * groups;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t part = block / groups;
    const int64_t channel = (block - part * groups) * kWarp + lane;
    const bool exists = channel < args.channels;
    const int64_t after = (part + 1) * kGateAddNormRows;
    const int64_t last = after < args.rows ? after : args.rows;
    A grad_weight = A(0), grad_bias = A(0);
    for (int64_t row = part * kGateAddNormRows + warp; exists && row < last; row += kMaxWarps) {
      const int64_t at = row * args.channels + channel;
      const int64_t gates_at = at + row * args.channels;
      const A a = element<T>(args.gates, gates_at);
      const A b = element<T>(args.gates, gates_at + args.channels);
      const A sum = gated_sum(element<T>(args.x, at), a, gate(b).value);
      const A grad = element<T>(args.grad_y, at);
      grad_weight = multiply_add(grad, args.norms[row].normalized(sum), grad_weight);
      grad_bias += grad;
    }
    by_warp[0][warp][lane] = grad_weight;
    by_warp[1][warp][lane] = grad_bias;
    __syncthreads();
    if (warp < 2 && exists) {  // a warp for either gradient
      A total = A(0);
      COOPFLOW_UNROLL
      for (int w = 0; w < kMaxWarps; ++w) total += by_warp[warp][w][lane];
      args.partial_sums[(2 * part + warp) * args.channels + channel] = total;
    }
    __syncthreads();  // by_warp is free for the next part
  }
}

// The sums of all parts, rows of `width` numbers: as above, a warp has every kMaxWarps-th part.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    add_parts_kernel(const A* sums, A* total, int64_t parts, int64_t width) {
  __shared__ A by_warp[kMaxWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t block = blockIdx.x; block < divide_up(width, kWarp); block += gridDim.x) {
    const int64_t column = block * kWarp + lane;
    A sum = A(0);
    if (column < width) {
      COOPFLOW_UNROLL_4
      for (int64_t part = warp; part < parts; part += kMaxWarps) sum += sums[part * width + column];
    }
    by_warp[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
      sum = A(0);
      COOPFLOW_UNROLL
      for (int w = 0; w < kMaxWarps; ++w) sum += by_warp[w][lane];
      total[column] = sum;
    }
    __syncthreads();  // by_warp is free for the next columns
  }
}

struct CudaGateAddNorm {
  template <typename T>
  static void run(const GateAddNormArgs<arithmetic_t<T>>& args, const Tensor& x) {
    const int64_t blocks = divide_up(args.rows, kTeamsPerBlock<WarpTeam>);
    if (can_pack<T>(args.channels, {args.x, args.gates, args.weight, args.bias, args.y})) {
      launch<gate_add_norm_kernel<T, kOfLane>>(x, blocks, kBlockThreads, args);
    } else {
      launch<gate_add_norm_kernel<T, 1>>(x, blocks, kBlockThreads, args);
    }
  }

  template <typename T>
  static void run_backward(const GateAddNormBackwardArgs<arithmetic_t<T>>& args,
                           arithmetic_t<T>* grad_parameters, const Tensor& x) {
    using A = arithmetic_t<T>;
    const int64_t blocks = divide_up(args.rows, kTeamsPerBlock<WarpTeam>);
    const int64_t parts = divide_up(args.rows, kGateAddNormRows);
    if (can_pack<T>(args.channels,
                    {args.grad_y, args.x, args.gates, args.weight, args.grad_x, args.grad_gates})) {
      launch<gate_add_norm_backward_kernel<T, kOfLane>>(x, blocks, kBlockThreads, args);
    } else {
      launch<gate_add_norm_backward_kernel<T, 1>>(x, blocks, kBlockThreads, args);
    }
    launch<gate_add_norm_parameters_kernel<T>>(x, parts * divide_up(args.channels, kWarp),
                                               kBlockThreads, args);
    if (parts == 1) return;
    const int64_t width = 2 * args.channels;
    launch<add_parts_kernel<A>>(x, divide_up(width, kWarp), kBlockThreads,
                                static_cast<const A*>(args.partial_sums), grad_parameters, parts,
                                width);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using Cuda = coopflow::CudaGateAddNorm;
  m.impl("gate_add_norm", TORCH_BOX(&coopflow::gate_add_norm<Cuda>));
  m.impl("gate_add_norm_backward", TORCH_BOX(&coopflow::gate_add_norm_backward<Cuda>));
}
