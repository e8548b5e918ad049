#include "concat_elu_loops.h"

#include <algorithm>

#include "noise_tile.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// What the elements of a run are multiplied by.
template <typename A>
struct AllKept {
  A operator()(int64_t /*element*/) const { return A(1); }
};

template <typename A>
struct OfOneChannel {
  A operator()(int64_t /*element*/) const { return factor; }
  A factor;
};

template <typename A>
struct OfEachChannel {
  A operator()(int64_t element) const { return factors[element]; }
  const A* factors;
};

// The factors of n channels of a chain's result.
template <typename A>
void draw_factors(const Dropout<A>& dropout, int64_t image, int64_t first, int64_t n, A* factors) {
  const int64_t shift = first % 4;
  TileCounters counters;
  counters.set_run(dropout.rng[2] + image, first / 4);
  TileWords tile;
  philox_tile(counters, make_philox_key(dropout.rng[0]), noise_time(dropout.rng, dropout.step),
              &tile, divide_up(shift + n, 4));
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = tile.words[(shift + i) % 4][(shift + i) / 4];
    factors[i] = is_kept(word, dropout.threshold) ? dropout.factor : A(0);
  }
}

// A run of neighbours in memory: where it begins in x, and in the result's halves.
struct Run {
  int64_t x, plus, minus, size;
};

// Calls f(run, factors of its plus half, of its minus half).
template <typename A, typename F>
void for_each_run(const ConcatEluShape& shape, const Dropout<A>& dropout, int64_t begin,
                  int64_t end, const F& f) {
  const ConcatEluBlocks blocks(shape);
  const int64_t half = shape.row_size();
  const bool has_dropout = dropout.rng != nullptr;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first_position = index % blocks.of_positions * blocks.positions;
    const int64_t rest = index / blocks.of_positions;
    const int64_t first = rest % blocks.of_channels * blocks.channels;
    const int64_t image = rest / blocks.of_channels;
    const int64_t positions = std::min(blocks.positions, shape.positions - first_position);
    const int64_t channels = std::min(blocks.channels, shape.channels - first);
    alignas(64) A plus[ConcatEluBlocks::kChannels], minus[ConcatEluBlocks::kChannels];
    if (has_dropout) {
      draw_factors(dropout, image, first, channels, plus);
      draw_factors(dropout, image, shape.channels + first, channels, minus);
    }
    if (shape.channels_last) {
      for (int64_t i = 0; i < positions; ++i) {
        const int64_t row = image * shape.positions + first_position + i;
        const int64_t at = 2 * row * half + first;
        const Run run{row * half + first, at, at + half, channels};
        if (has_dropout) {
          f(run, OfEachChannel<A>{plus}, OfEachChannel<A>{minus});
        } else {
          f(run, AllKept<A>(), AllKept<A>());
        }
      }
    } else {
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t in_half = (first + i) * shape.positions + first_position;
        const int64_t at = 2 * image * half + in_half;
        const Run run{image * half + in_half, at, at + half, positions};
        if (has_dropout) {
          f(run, OfOneChannel<A>{plus[i]}, OfOneChannel<A>{minus[i]});
        } else {
          f(run, AllKept<A>(), AllKept<A>());
        }
      }
    }
  }
}

template <typename T>
void forward(const ConcatEluArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for_each_run(args.shape, args.dropout, begin, end, [&](const Run& run, auto plus, auto minus) {
    for (int64_t first = 0; first < run.size; first += kTile) {
      const int64_t n = std::min(run.size - first, kTile);
      alignas(64) A x_buffer[kTile], plus_buffer[kTile], minus_buffer[kTile];
      const A* x = view<T>(args.x, run.x + first, n, x_buffer);
      A* y_plus = room<T>(args.y, run.plus + first, plus_buffer);
      A* y_minus = room<T>(args.y, run.minus + first, minus_buffer);
      COOPFLOW_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) {
        const EluPair<A> elu = elu_pair(x[i]);
        y_plus[i] = elu.plus * plus(first + i);
        y_minus[i] = elu.minus * minus(first + i);
      }
      put_back<T>(y_plus, run.plus + first, n, args.y);
      put_back<T>(y_minus, run.minus + first, n, args.y);
    }
  });
}

template <typename T>
void backward(const ConcatEluBackwardArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for_each_run(args.shape, args.dropout, begin, end, [&](const Run& run, auto plus, auto minus) {
    for (int64_t first = 0; first < run.size; first += kTile) {
      const int64_t n = std::min(run.size - first, kTile);
      alignas(64) A y_plus_buffer[kTile], y_minus_buffer[kTile];
      alignas(64) A grad_plus_buffer[kTile], grad_minus_buffer[kTile], grad_x_buffer[kTile];
      const A* y_plus = view<T>(args.y, run.plus + first, n, y_plus_buffer);
      const A* y_minus = view<T>(args.y, run.minus + first, n, y_minus_buffer);
      const A* grad_plus = view<T>(args.grad_y, run.plus + first, n, grad_plus_buffer);
      const A* grad_minus = view<T>(args.grad_y, run.minus + first, n, grad_minus_buffer);
      A* grad_x = room<T>(args.grad_x, run.x + first, grad_x_buffer);
      COOPFLOW_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) {
        grad_x[i] = grad_plus[i] * elu_slope(y_plus[i], plus(first + i)) -
                    grad_minus[i] * elu_slope(y_minus[i], minus(first + i));
      }
      put_back<T>(grad_x, run.x + first, n, args.grad_x);
    }
  });
}

}  // namespace

template <typename T>
ConcatEluLoops<T> concat_elu_loops() {
  return {forward<T>, backward<T>};
}

template ConcatEluLoops<float> concat_elu_loops();
template ConcatEluLoops<double> concat_elu_loops();
template ConcatEluLoops<bfloat16> concat_elu_loops();
template ConcatEluLoops<float16> concat_elu_loops();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
