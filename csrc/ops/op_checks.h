// Argument checks shared by the ops of both back ends. A failed check throws std::runtime_error,
// the only exception that the stable ABI knows:
//   "coopflow::OP: ARGUMENT: what is wrong"              a bad value
//   "TypeError: coopflow::OP: ARGUMENT: what is wrong"   a bad type
// coopflow_ext/ops/_call.py makes ValueError and TypeError of them, without the mark.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "coopflow/scalar_types.h"

namespace coopflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

// A tensor of a call, as the check for shared memory sees it.
struct SharedArgument {
  const char* argument;
  const Tensor* tensor;  // null: not given
  bool written;
  bool by_element;  // used with the state's element of the same place alone
};

inline const Tensor* pointer_to(const OptionalTensor& t) { return t ? &*t : nullptr; }

// The memory that a tensor reaches into, [begin, end).
struct MemoryRange {
  uintptr_t begin = 0, end = 0;

  MemoryRange() = default;

  explicit MemoryRange(const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) {
      const int64_t size = t.size(i);
      if (size == 0) return;
      last += (size - 1) * t.stride(i);
    }
    begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    end = begin + (last + 1) * t.element_size();
  }

  bool overlaps(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
};

// The op being checked; each method names the argument it speaks of.
class OpChecks {
 public:
  explicit OpChecks(const char* op) : op_(op) {}

  // The value of an argument is bad.
  template <typename... Parts>
  [[noreturn]] void fail(const char* argument, const Parts&... parts) const {
    throw_error("", argument, parts...);
  }

  // Its type or dtype is.
  template <typename... Parts>
  [[noreturn]] void fail_type(const char* argument, const Parts&... parts) const {
    throw_error("TypeError: ", argument, parts...);
  }

  // Also in the type in which the op computes for x.
  void is_finite(const char* argument, double value, const Tensor& x) const {
    if (!std::isfinite(value)) fail(argument, "must be finite, got ", value);
    const bool wide = x.scalar_type() == ScalarType::Double;
    if (!wide && std::abs(value) > std::numeric_limits<float>::max()) {
      fail(argument, "must be finite in float32, got ", value);
    }
  }

  void is_non_negative(const char* argument, double value) const {
    if (!(value >= 0)) fail(argument, "must not be negative, got ", value);
  }

  void is_positive(const char* argument, double value) const {
    if (!(value > 0)) fail(argument, "must be positive, got ", value);
  }

  void is_tensor(const char* argument, const Tensor& t) const {
    if (!t.defined()) fail_type(argument, "must be a tensor, got None");
  }

  void has_dtype(const char* argument, const Tensor& t, ScalarType type) const {
    is_tensor(argument, t);
    if (t.scalar_type() != type) {
      fail_type(argument, "must have dtype ", dtype_name(type), ", got dtype ",
                dtype_name(t.scalar_type()));
    }
  }

  void is_floating(const char* argument, const Tensor& t) const {
    is_tensor(argument, t);
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::Half &&
        type != ScalarType::BFloat16) {
      fail_type(argument, "must have dtype float32, float64, float16 or bfloat16, got dtype ",
                dtype_name(type));
    }
  }

  // x_name is what the op calls x.
  void same_device(const char* argument, const Tensor& t, const Tensor& x,
                   const char* x_name = "x") const {
    if (t.is_cuda() != x.is_cuda() || t.get_device_index() != x.get_device_index()) {
      fail(argument, "must be on the device of ", x_name, ", ", device_text(x), ", got ",
           device_text(t));
    }
  }

  void same_shape(const char* argument, const Tensor& t, const Tensor& x,
                  const char* x_name = "x") const {
    if (!has_sizes(t, x)) {
      fail(argument, "must have the shape of ", x_name, ", ", shape_text(x), ", got ",
           shape_text(t));
    }
  }

  // What is written shares no memory with another argument, unless both are the same elements and
  // each is read before it is written.
  template <size_t kCount>
  void share_no_memory(const SharedArgument (&arguments)[kCount]) const {
    MemoryRange ranges[kCount];
    for (size_t i = 0; i < kCount; ++i) {
      if (arguments[i].tensor != nullptr) ranges[i] = MemoryRange(*arguments[i].tensor);
    }
    for (size_t i = 0; i < kCount; ++i) {
      if (!arguments[i].written) continue;
      for (size_t j = 0; j < kCount; ++j) {
        if (j == i || !ranges[i].overlaps(ranges[j])) continue;
        if (arguments[i].by_element && arguments[j].by_element &&
            same_elements(*arguments[i].tensor, *arguments[j].tensor)) {
          continue;
        }
        fail(arguments[i].argument, "must not share memory with ", arguments[j].argument);
      }
    }
  }

  // Whether t shares memory with what is written, unless both are the same elements as above.
  template <size_t kCount>
  bool shares_memory(const Tensor& t, const SharedArgument (&written)[kCount]) const {
    const MemoryRange range(t);
    for (const SharedArgument& other : written) {
      if (other.tensor == nullptr || !range.overlaps(MemoryRange(*other.tensor))) continue;
      if (!other.by_element || !same_elements(t, *other.tensor)) return true;
    }
    return false;
  }

  // Same shape and, where a dimension has more than one element, same strides.
  void same_layout(const char* argument, const Tensor& t, const Tensor& x) const {
    same_shape(argument, t, x);
    if (const int64_t i = other_stride(t, x); i >= 0) {
      fail(argument, "must have the strides of x; dimension ", i, " has stride ", t.stride(i),
           " where x has ", x.stride(i));
    }
  }

  // A row of t for each step, which has the shape and strides of x.
  void rows_have_layout(const char* argument, const Tensor& t, const Tensor& x) const {
    if (!has_sizes(t, x, 1)) {
      fail(argument, "must have a row of the shape of x, ", shape_text(x), ", for each step, got ",
           shape_text(t));
    }
    if (const int64_t i = other_stride(t, x, 1); i >= 0) {
      fail(argument, "must have the strides of x in each row; dimension ", i, " has stride ",
           t.stride(i + 1), " where x has ", x.stride(i));
    }
  }

  void is_contiguous(const char* argument, const Tensor& t) const {
    if (!t.is_contiguous()) fail(argument, "must be contiguous, got a strided view");
  }

  // Each chain (index of dimension 0) is one dense block, and the chains follow one another.
  // Returns the elements of a chain.
  int64_t chains_are_dense(const char* argument, const Tensor& x) const {
    if (x.dim() == 0) fail(argument, "must have a batch dimension, got a tensor of shape ()");
    int64_t per_chain = 1;
    std::vector<std::array<int64_t, 2>> dims;  // stride, size
    for (int64_t i = 1; i < x.dim(); ++i) {
      per_chain *= x.size(i);
      if (x.size(i) > 1) dims.push_back({x.stride(i), x.size(i)});
    }
    if (per_chain == 0 || x.size(0) == 0) return per_chain;
    if (!x.is_contiguous()) {
      std::sort(dims.begin(), dims.end());
      int64_t expected = 1;
      for (const auto& [stride, size] : dims) {
        if (stride != expected) fail_dense(argument);
        expected *= size;
      }
      if (x.size(0) > 1 && x.stride(0) != per_chain) fail_dense(argument);
    }
    return per_chain;
  }

  // The base of the noise. Its numbers are on the device, so the host cannot check them.
  void is_rng(const Tensor& rng, const Tensor& x, const char* x_name = "x",
              const char* argument = "rng") const {
    has_dtype(argument, rng, ScalarType::Long);
    if (rng.dim() != 1 || rng.size(0) != 3) {
      fail(argument, "must have shape (3,) = (seed, time, chain), as Key.tensor gives, got ",
           shape_text(rng));
    }
    is_contiguous(argument, rng);
    same_device(argument, rng, x, x_name);
  }

  void noise_fits(int64_t per_chain, int64_t step) const {
    if (per_chain > (int64_t{1} << 34)) {
      fail("x", "must have at most 2**34 elements per chain, got ", per_chain);
    }
    if (step < 0 || step >= (int64_t{1} << 32)) {
      fail("step", "must be in [0, 2**32), got ", step);
    }
  }

 private:
  // Whether t has x's sizes, behind so many dimensions of its own.
  static bool has_sizes(const Tensor& t, const Tensor& x, int64_t leading = 0) {
    bool same = t.dim() == x.dim() + leading;
    for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(leading + i) == x.size(i);
    return same;
  }

  // The first dimension of x, with more than one element, in which t's stride is another; or -1.
  static int64_t other_stride(const Tensor& t, const Tensor& x, int64_t leading = 0) {
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (x.size(i) > 1 && t.stride(leading + i) != x.stride(i)) return i;
    }
    return -1;
  }

  static bool same_elements(const Tensor& a, const Tensor& b) {
    return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() &&
           has_sizes(a, b) && other_stride(a, b) < 0;
  }

  template <typename... Parts>
  [[noreturn]] void throw_error(const char* mark, const char* argument,
                                const Parts&... parts) const {
    std::ostringstream message;
    message << mark << "coopflow::" << op_ << ": " << argument << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  [[noreturn]] void fail_dense(const char* argument) const {
    fail(argument, "must be dense with the batch as its outermost storage dimension; ",
         "call .contiguous() first");
  }

  static std::string device_text(const Tensor& t) {
    if (!t.is_cuda()) return "cpu";
    return "cuda:" + std::to_string(t.get_device_index());
  }

  const char* op_;
};

// A storage type passed as a value, so that a generic lambda can receive it.
template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>()) with the storage type of a dtype that passed is_floating.
template <typename F>
void dispatch_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(TypeTag<double>());
    case ScalarType::Half:
      return f(TypeTag<float16>());
    case ScalarType::BFloat16:
      return f(TypeTag<bfloat16>());
    default:
      return f(TypeTag<float>());
  }
}

}  // namespace coopflow
