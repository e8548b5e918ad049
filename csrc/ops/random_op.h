// normal_ and uniform_ as the dispatcher calls them: checks and a RandomArgs, written once.
#pragma once

#include "coopflow/random.h"
#include "ops/op_checks.h"

namespace coopflow {

template <typename Backend>
void fill_random(const char* name, Distribution distribution, const Tensor& out, const Tensor& rng,
                 int64_t step) {
  const OpChecks check(name);
  check.is_floating("out", out);
  const int64_t per_chain = check.chains_are_dense("out", out);
  check.is_rng(rng, out);
  check.noise_fits(per_chain, step);
  check.share_no_memory({{"out", &out, true, false}, {"rng", &rng, false, false}});
  if (out.numel() == 0) return;
  const RandomArgs args{out.mutable_data_ptr(),
                        static_cast<const int64_t*>(rng.const_data_ptr()),
                        out.size(0),
                        per_chain,
                        step,
                        distribution};
  dispatch_floating(out.scalar_type(), [&](auto tag) {
    Backend::template fill<typename decltype(tag)::type>(args, out);
  });
}

template <typename Backend>
void normal_(Tensor out, Tensor rng, int64_t step) {
  fill_random<Backend>("normal_", Distribution::kNormal, out, rng, step);
}

template <typename Backend>
void uniform_(Tensor out, Tensor rng, int64_t step) {
  fill_random<Backend>("uniform_", Distribution::kUniform, out, rng, step);
}

}  // namespace coopflow
