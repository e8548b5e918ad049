#include "random_loops.h"

#include "noise_range.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

template <typename T, typename Noise>
void fill_quads(const RandomArgs& args, int64_t begin, int64_t end) {
  for (int64_t quad = begin; quad < end; quad += kQuadsPerTile) {
    const int64_t last = quad + kQuadsPerTile < end ? quad + kQuadsPerTile : end;
    const int64_t first = first_element(args.per_chain, quad);
    alignas(64) arithmetic_t<T> values[kTile];
    fill_without_gaps<Noise>(args.rng, args.step, args.per_chain, quad, last, values);
    store<T>(values, first, first_element(args.per_chain, last) - first, args.out);
  }
}

}  // namespace

template <typename T>
RandomLoop random_loop(Distribution distribution) {
  return distribution == Distribution::kNormal ? fill_quads<T, NormalNoise>
                                               : fill_quads<T, UniformNoise>;
}

template RandomLoop random_loop<float>(Distribution);
template RandomLoop random_loop<double>(Distribution);
template RandomLoop random_loop<bfloat16>(Distribution);
template RandomLoop random_loop<float16>(Distribution);

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
