// Self-attention with dropout, out = dropout(softmax(scale * q k^T)) v, without the (L, L) weights
// in memory: what one row of scores and one weight become. Whoever walks the scores in tiles keeps
// a row's largest score and sum so far (online softmax: Milakov and Gimelshein 2018; with
// recomputation in the backward pass: Dao et al. 2022).
#pragma once

#include <cstdint>

#include "coopflow/dropout.h"
#include "coopflow/elementary.h"
#include "coopflow/macros.h"
#include "coopflow/reduction.h"

namespace coopflow {

constexpr int64_t kAttentionMaxDim = 64;

struct AttentionShape {
  int64_t batch, heads, length, dim;
};

// (batch, heads, length, dim), of any strides.
template <typename Pointer>
struct AttentionTensor {
  Pointer data;
  int64_t batch_stride, head_stride, row_stride, dim_stride;

  // Of a head's first row; heads are counted through the batch.
  COOPFLOW_HD int64_t head_offset(const AttentionShape& shape, int64_t head) const {
    const int64_t chain = head / shape.heads;
    return chain * batch_stride + (head - chain * shape.heads) * head_stride;
  }
};
using AttentionInput = AttentionTensor<const void*>;
using AttentionOutput = AttentionTensor<void*>;

template <typename A>
struct AttentionArgs {
  AttentionInput q, k, v;
  AttentionOutput out;
  A* lse;  // log-sum-exp of each row of scores, (batch, heads, length)
  AttentionShape shape;
  Dropout<A> dropout;  // of the weights, (heads, length, length) a chain
  A scale;
};

template <typename A>
struct AttentionBackwardArgs {
  AttentionInput grad_out, q, k, v, out;
  const A* lse;
  AttentionOutput grad_q, grad_k, grad_v;
  AttentionShape shape;
  Dropout<A> dropout;
  A scale;
};

// --- softmax ---

// NaN never becomes the largest score; its weight is NaN all the same.
template <typename A>
COOPFLOW_HD A larger_score(A a, A b) {
  return a < b ? b : a;
}

// e^(score - peak), for a peak that is the largest score, or the log-sum-exp; also what sums are
// multiplied by when the largest score grows. What cannot be seen beside 1 is 0, so that the
// product of a weight that is 0 with an infinite value is NaN as it is in PyTorch.
COOPFLOW_HD float softmax_term(float score, float peak) {
  const float exponent = score - peak;
  // The product's rounding moves a term by |exponent| * 2^-24 of itself, beside 1 by 2^-25.
  const float term = exponential2_nonpositive(1.44269504f * exponent);
  return exponent < -87.0f ? 0.0f : term;
}

COOPFLOW_HD double softmax_term(double score, double peak) {
  const double exponent = score - peak;
  const double term = exponential_nonpositive(exponent);
  return exponent < -87.0 ? 0.0 : term;
}

// NaN where the sum is.
template <typename A>
COOPFLOW_HD A log_sum_exp(A peak, A sum) {
  return is_finite(sum) ? peak + log_positive(sum) : sum;
}

// --- derivatives ---

// What the backward pass makes of one weight, given the gradient of what it was multiplied into a
// value as, and delta = the row's sum of grad_out * out.
template <typename A>
struct WeightGradients {
  A dropped;     // the weight after dropout
  A grad_score;  // before the scale
};

template <typename A>
COOPFLOW_HD WeightGradients<A> weight_gradients(A score, A lse, bool kept, A factor, A grad_dropped,
                                                A delta) {
  const A weight = softmax_term(score, lse);
  const A kept_factor = kept ? factor : A(0);
  return {weight * kept_factor, weight * (grad_dropped * kept_factor - delta)};
}

}  // namespace coopflow
