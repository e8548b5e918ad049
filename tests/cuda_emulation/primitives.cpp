// The emulation's own primitives, against what the CUDA manual says of them, on small blocks of
// their own: our kernels use few of them. Compiled as a kernel is.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "coopflow/elementary.h"
#include "emulation.h"
#include "warp_matrix.cuh"

namespace {

std::string first_error;

template <typename T>
void expect(const char* what, T actual, T expected) {
  if (actual == expected || !first_error.empty()) return;
  first_error = std::string(what) + " is " + std::to_string(actual) + ", not " +
                std::to_string(expected) + ", in thread " + std::to_string(threadIdx.x);
}

int this_lane() { return static_cast<int>(threadIdx.x) % warpSize; }

constexpr unsigned kAll = 0xFFFFFFFFu;

// --- what must be right: each runs as a block of 64 threads ------------------------------------
void shuffles() {
  const int lane = this_lane();
  const int section = lane / 8 * 8;
  expect("__shfl_sync", __shfl_sync(kAll, 3 * lane, 5), 15);
  expect("__shfl_sync of 8", __shfl_sync(kAll, lane, 13, 8), section + 5);
  expect("__shfl_up_sync", __shfl_up_sync(kAll, lane, 3), lane < 3 ? lane : lane - 3);
  expect("__shfl_up_sync of 8", __shfl_up_sync(kAll, lane, 3, 8),
         lane - 3 < section ? lane : lane - 3);
  expect("__shfl_down_sync", __shfl_down_sync(kAll, lane, 3), lane > 28 ? lane : lane + 3);
  expect("__shfl_down_sync of 8", __shfl_down_sync(kAll, lane, 3, 8),
         lane + 3 >= section + 8 ? lane : lane + 3);
  expect("__shfl_xor_sync", __shfl_xor_sync(kAll, lane, 5), lane ^ 5);
  // Earlier sections can be read, later ones not.
  expect("__shfl_xor_sync of 8", __shfl_xor_sync(kAll, lane, 8, 8),
         (lane ^ 8) < lane ? (lane ^ 8) : lane);
  expect("__shfl_sync of a double", __shfl_sync(kAll, 0.5 * lane, 7), 3.5);
  expect("__shfl_sync of 64 bits", __shfl_sync(kAll, int64_t{lane} << 40, 9), int64_t{9} << 40);
  if (lane < 8) expect("__shfl_xor_sync of 8 lanes", __shfl_xor_sync(0xFFu, lane, 1), lane ^ 1);
}

void votes() {
  const int lane = this_lane();
  expect("__ballot_sync", __ballot_sync(kAll, lane % 3 == 0), 0x49249249u);
  expect("__any_sync", __any_sync(kAll, lane == 31), 1);
  expect("__any_sync of none", __any_sync(kAll, 0), 0);
  expect("__all_sync", __all_sync(kAll, lane < 32), 1);
  expect("__all_sync but one", __all_sync(kAll, lane != 7), 0);
  for (unsigned voter : {3u, 40u}) {
    expect("__syncthreads_or", __syncthreads_or(threadIdx.x == voter), 1);
    expect("__syncthreads_or of none", __syncthreads_or(0), 0);
  }
  if (lane >= 16) expect("__ballot_sync of 16", __ballot_sync(0xFFFF0000u, lane < 18), 0x30000u);
}

void exchange_in_the_warp() {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  expect("the neighbour's value", values[threadIdx.x ^ 1], static_cast<int>(threadIdx.x ^ 1));
}

void exchange_in_the_block() {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  expect("the other warp's value", values[63 - threadIdx.x], static_cast<int>(63 - threadIdx.x));
}

void exchange_in_dynamic_memory() {
  int* const values = static_cast<int*>(cuda_emulation::dynamic_shared());
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  expect("the other warp's value", values[63 - threadIdx.x], static_cast<int>(63 - threadIdx.x));
}

// Small whole numbers, whose products and sums are exact; (16, 16), (8, 16) and a transpose.
constexpr int kStride = 24;
alignas(16) __shared__ coopflow::bfloat16 matrix[16 * kStride], transpose[16 * kStride],
    columns[8 * kStride];

float entry(int i, int k) { return static_cast<float>((7 * i + 5 * k) % 23 - 11); }

void write_matrices() {
  using coopflow::from_arithmetic;
  for (int at = static_cast<int>(threadIdx.x); at < 256; at += 64) {
    const int i = at / 16, k = at % 16;
    matrix[i * kStride + k] = from_arithmetic<coopflow::bfloat16>(entry(i, k));
    transpose[k * kStride + i] = from_arithmetic<coopflow::bfloat16>(entry(i, k));
    if (i < 8) columns[i * kStride + k] = from_arithmetic<coopflow::bfloat16>(entry(3 * i, k + 1));
  }
  __syncthreads();
}

void matrix_products() {
  write_matrices();
  const auto multiply = [](const coopflow::MatrixA& a, const char* what) {
    const coopflow::FragmentPlace place = coopflow::fragment_place(this_lane());
    coopflow::MatrixSums sums = {1.0f, 2.0f, 3.0f, 4.0f};
    coopflow::multiply_accumulate(a, coopflow::load_b(columns, kStride, this_lane()), sums);
    for (int at = 0; at < 4; ++at) {
      float expected = 1.0f + static_cast<float>(at);
      for (int k = 0; k < 16; ++k) {
        expected += entry(place.row + at / 2 * 8, k) * entry(3 * (place.column + at % 2), k + 1);
      }
      expect(what, sums[at], expected);
    }
  };
  multiply(coopflow::load_a<false>(matrix, kStride, this_lane()), "a product");
  multiply(coopflow::load_a<true>(transpose, kStride, this_lane()), "a transposed product");
}

void matrix_not_on_16_bytes() {
  write_matrices();
  uint32_t words[4];
  coopflow::load_quarters<false>(matrix + 4, words);
}

void product_of_half_a_warp() {
  coopflow::MatrixSums sums = {};
  if (this_lane() < 16) coopflow::multiply_accumulate({}, {}, sums);
}

// NaN is NaN, and zeros have signs.
void expect_value(const char* what, float actual, float expected) {
  const bool both_nan = std::isnan(actual) && std::isnan(expected);
  if (both_nan) return;
  expect(what, actual, expected);
  expect(what, std::signbit(actual), std::signbit(expected));
}

// Where the CPU loops' functions would give a finite number or another zero.
void elementary_functions() {
  constexpr float kDenormal = 0x1p-130f;
  expect_value("log_positive(0)", coopflow::log_positive(0.0f), -INFINITY);
  expect_value("log_positive(-1)", coopflow::log_positive(-1.0f), NAN);
  expect_value("log_positive(inf)", coopflow::log_positive(INFINITY), INFINITY);
  expect_value("log_positive(NaN)", coopflow::log_positive(NAN), NAN);
  // logf does not flush its argument, lg2.approx.ftz does.
  expect_value("log_positive(2^-130)", coopflow::log_positive(kDenormal), std::log(kDenormal));
  expect_value("quick_log_positive(2^-130)", coopflow::quick_log_positive(kDenormal), -INFINITY);
  expect_value("quick_log_positive(0)", coopflow::quick_log_positive(0.0f), -INFINITY);
  expect_value("quick_log_positive(-1)", coopflow::quick_log_positive(-1.0f), NAN);
  expect_value("quick_log_positive(inf)", coopflow::quick_log_positive(INFINITY), INFINITY);
  expect_value("quick_log_positive(NaN)", coopflow::quick_log_positive(NAN), NAN);
  expect_value("exponential(-inf)", coopflow::exponential(-INFINITY), 0.0f);
  expect_value("exponential(inf)", coopflow::exponential(INFINITY), INFINITY);
  expect_value("exponential(NaN)", coopflow::exponential(NAN), NAN);
  expect_value("exponential_normal(-inf)", coopflow::exponential_normal(-INFINITY), 0.0f);
  expect_value("exponential_normal(-200)", coopflow::exponential_normal(-200.0f), 0.0f);
  expect_value("exponential_normal(-90)", coopflow::exponential_normal(-90.0f), std::exp(-90.0f));
  expect_value("exponential_normal(200)", coopflow::exponential_normal(200.0f), INFINITY);
  expect_value("exponential_normal(NaN)", coopflow::exponential_normal(NAN), NAN);
  expect_value("exponential_nonpositive(-inf)", coopflow::exponential_nonpositive(-INFINITY), 0.0f);
  expect_value("exponential_nonpositive(-90)", coopflow::exponential_nonpositive(-90.0f),
               std::exp(-90.0f));
  expect_value("exponential_nonpositive(NaN)", coopflow::exponential_nonpositive(NAN), NAN);
  expect_value("exponential_minus_one(-inf)", coopflow::exponential_minus_one(-INFINITY), -1.0f);
  expect_value("exponential_minus_one(NaN)", coopflow::exponential_minus_one(NAN), NAN);
  const auto power_of_2 = [](float x) { return coopflow::exponential2_nonpositive<-110>(x); };
  expect_value("exponential2_nonpositive(-inf)", power_of_2(-INFINITY), 0.0f);
  expect_value("exponential2_nonpositive(-127)", power_of_2(-127.0f), 0.0f);
  expect_value("exponential2_nonpositive(-2^-130)", power_of_2(-kDenormal), 1.0f);
  expect_value("exponential2_nonpositive(inf)", power_of_2(INFINITY), INFINITY);
  expect_value("exponential2_nonpositive(NaN)", power_of_2(NAN), NAN);
  expect_value("reciprocal(0)", coopflow::reciprocal(0.0f), INFINITY);
  expect_value("reciprocal(-0)", coopflow::reciprocal(-0.0f), -INFINITY);
  expect_value("reciprocal(-2^-127)", coopflow::reciprocal(-0x1p-127f), -INFINITY);
  expect_value("reciprocal(2^127)", coopflow::reciprocal(0x1p127f), 0.0f);
  expect_value("reciprocal(-inf)", coopflow::reciprocal(-INFINITY), -0.0f);
  expect_value("reciprocal(NaN)", coopflow::reciprocal(NAN), NAN);
}

// --- bank conflicts ------------------------------------------------------------------------------
void neighbouring_words() {
  __shared__ int values[64];
  values[threadIdx.x] = 1;
}

void every_second_word() {
  __shared__ int values[128];
  values[2 * threadIdx.x] = 1;
}

void words_of_one_bank() {
  __shared__ int values[32 * 64];
  values[32 * threadIdx.x] = 1;
}

void neighbouring_bytes() {
  __shared__ char values[64];
  values[threadIdx.x] = 1;
}

void neighbours_of_16_bytes() {
  __shared__ coopflow::Word16 values[64];
  values[threadIdx.x] = coopflow::Word16{};
}

void every_second_of_16_bytes() {
  __shared__ coopflow::Word16 values[128];
  values[2 * threadIdx.x] = coopflow::Word16{};
}

void one_word_for_all() {
  __shared__ int value;
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  expect("the word", value, 1);
}

// --- what must be an error ---------------------------------------------------------------------
void race_in_the_block() {
  __shared__ int values[64];
  values[threadIdx.x] = 1;
  __syncwarp();
  if (threadIdx.x >= 32) expect("never", values[63 - threadIdx.x], 1);
}

void race_in_dynamic_memory() {
  int* const values = static_cast<int*>(cuda_emulation::dynamic_shared());
  values[threadIdx.x / 2] = 1;
}

void dynamic_memory_unwritten() {
  expect("never", static_cast<int*>(cuda_emulation::dynamic_shared())[threadIdx.x], 0);
}

void static_memory_past_the_end() {
  __shared__ int values[64];
  if (threadIdx.x == 3) values[threadIdx.x + 61] = 1;
}

void dynamic_memory_past_the_end() {
  if (threadIdx.x == 3) static_cast<int*>(cuda_emulation::dynamic_shared())[64] = 1;
}

void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shuffle_from_outside() {
  if (this_lane() < 8) __shfl_sync(0xFFu, 1, 9);
}

void shuffle_of_three() { __shfl_sync(kAll, 1, 0, 3); }

void warp_not_complete() {
  if (threadIdx.x != 40) __syncwarp();
}

struct Primitive {
  const char* name;
  void (*thread)();
};
constexpr Primitive kPrimitives[] = {
    {"shuffles", shuffles},
    {"votes", votes},
    {"exchange_in_the_warp", exchange_in_the_warp},
    {"exchange_in_the_block", exchange_in_the_block},
    {"exchange_in_dynamic_memory", exchange_in_dynamic_memory},
    {"elementary_functions", elementary_functions},
    {"matrix_products", matrix_products},
    {"matrix_not_on_16_bytes", matrix_not_on_16_bytes},
    {"product_of_half_a_warp", product_of_half_a_warp},
    {"neighbouring_words", neighbouring_words},
    {"every_second_word", every_second_word},
    {"words_of_one_bank", words_of_one_bank},
    {"neighbouring_bytes", neighbouring_bytes},
    {"neighbours_of_16_bytes", neighbours_of_16_bytes},
    {"every_second_of_16_bytes", every_second_of_16_bytes},
    {"one_word_for_all", one_word_for_all},
    {"race_in_the_block", race_in_the_block},
    {"race_in_dynamic_memory", race_in_dynamic_memory},
    {"dynamic_memory_unwritten", dynamic_memory_unwritten},
    {"static_memory_past_the_end", static_memory_past_the_end},
    {"dynamic_memory_past_the_end", dynamic_memory_past_the_end},
    {"two_barriers", two_barriers},
    {"shuffle_from_outside", shuffle_from_outside},
    {"shuffle_of_three", shuffle_of_three},
    {"warp_not_complete", warp_not_complete},
};

// Counts the visits to each thread of a grid of 3 x 2 x 2 blocks of 4 x 3 x 2 threads.
constexpr unsigned kGrid[3] = {3, 2, 2};
constexpr unsigned kBlock[3] = {4, 3, 2};
int visits[3 * 4][2 * 3][2 * 2];

void visit() {
  ++visits[blockIdx.x * blockDim.x + threadIdx.x][blockIdx.y * blockDim.y + threadIdx.y]
          [blockIdx.z * blockDim.z + threadIdx.z];
}

void run(const Primitive& primitive) {
  cuda_emulation::run({{2, 1, 1},
                       {64, 1, 1},
                       64 * sizeof(int),
                       nullptr,
                       [](const void* data) { static_cast<const Primitive*>(data)->thread(); },
                       &primitive});
}

}  // namespace

// What is wrong with a primitive, or the emulation's report; "" when all is right.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulation_primitive(
    const char* name) {
  first_error.clear();
  try {
    for (const Primitive& primitive : kPrimitives) {
      if (std::string(primitive.name) != name) continue;
      run(primitive);
      return first_error.c_str();
    }
    first_error = "no such primitive";
  } catch (const std::runtime_error& error) {
    first_error = error.what();
  }
  return first_error.c_str();
}

// How many threads of a grid in three dimensions were not visited exactly once.
extern "C" __attribute__((visibility("default"))) int cuda_emulation_wrong_visits() {
  const Primitive grid{"grid", visit};
  std::memset(visits, 0, sizeof(visits));
  cuda_emulation::run({{kGrid[0], kGrid[1], kGrid[2]},
                       {kBlock[0], kBlock[1], kBlock[2]},
                       0,
                       nullptr,
                       [](const void* data) { static_cast<const Primitive*>(data)->thread(); },
                       &grid});
  int wrong = 0;
  for (const auto& plane : visits) {
    for (const auto& row : plane) {
      for (const int count : row) wrong += count != 1;
    }
  }
  return wrong;
}
