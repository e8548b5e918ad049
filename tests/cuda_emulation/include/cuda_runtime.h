// Stands in for the CUDA toolkit's header of this name: what the kernels in csrc/cuda use of the
// language and of the runtime, for a host compiler. What is missing here does not compile: add it.
#pragma once

#if defined(__CUDACC__)
#error "the emulation's cuda_runtime.h met a CUDA compiler"
#endif

#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../emulation.h"

// --- language ----------------------------------------------------------------------------------
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Blocks run one after another, so a variable of its own storage duration serves each in turn.
// AddressSanitizer puts red zones around static ones; the race check knows shared memory as the
// thread-local ones, of which there are no others.
// C++ knows nothing like `extern __shared__ T name[]`, which is an error here: where a kernel needs
// dynamic shared memory, a header of csrc/cuda hands out that array to nvcc, and
// cuda_emulation::dynamic_shared() to other compilers.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

using uint3 = cuda_emulation::Index3;

struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

extern const uint3 threadIdx __asm__("cuda_emulation_threadIdx");
extern const uint3 blockIdx __asm__("cuda_emulation_blockIdx");
extern const uint3 blockDim __asm__("cuda_emulation_blockDim");
extern const uint3 gridDim __asm__("cuda_emulation_gridDim");
constexpr int warpSize = cuda_emulation::kWarpSize;

// --- synchronisation ---------------------------------------------------------------------------
inline void __syncthreads(cuda_emulation::Place place = cuda_emulation::Place::here()) {
  cuda_emulation::sync_threads(place);
}

inline int __syncthreads_or(int predicate,
                            cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::vote_in_block(predicate != 0, place);
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       cuda_emulation::Place place = cuda_emulation::Place::here()) {
  cuda_emulation::meet_in_warp("__syncwarp", mask, 0, place);
}

// --- shuffles ----------------------------------------------------------------------------------
namespace cuda_emulation {

// `source` gives the lane to read from, its own to keep the value; sections have `width` lanes.
template <typename T, typename F>
T shuffle(const char* operation, unsigned mask, T value, int width, Place place, const F& source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8,
                "shuffles move 4- and 8-byte numbers");
  if (width <= 0 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail_thread("a shuffle's width is not a power of two up to 32", place);
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* const values = meet_in_warp(operation, mask, bits, place);
  const int section = lane() / width * width;
  const int from = source(section, lane());
  if (((mask >> from) & 1) == 0) fail_thread("a shuffle reads from a lane outside its mask", place);
  std::memcpy(&value, &values[from], sizeof(T));
  return value;
}

}  // namespace cuda_emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::shuffle("__shfl_sync", mask, value, width, place,
                                 [=](int section, int) { return section + (from & (width - 1)); });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, width, place,
                                 [=](int section, int lane) {
                                   const int from = lane - static_cast<int>(delta);
                                   return from < section ? lane : from;
                                 });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, width, place,
                                 [=](int section, int lane) {
                                   const int from = lane + static_cast<int>(delta);
                                   return from >= section + width ? lane : from;
                                 });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, width, place,
                                 [=](int section, int lane) {
                                   const int from = lane ^ bits;
                                   return from >= section + width ? lane : from;
                                 });
}

// --- votes -------------------------------------------------------------------------------------
namespace cuda_emulation {

inline unsigned ballot(const char* operation, unsigned mask, int predicate, Place place) {
  const uint64_t* const values = meet_in_warp(operation, mask, predicate != 0, place);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (((mask >> lane) & 1) && values[lane]) votes |= 1u << lane;
  }
  return votes;
}

}  // namespace cuda_emulation

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::ballot("__ballot_sync", mask, predicate, place);
}

inline int __any_sync(unsigned mask, int predicate,
                      cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::ballot("__any_sync", mask, predicate, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::ballot("__all_sync", mask, predicate, place) == mask;
}

// --- runtime -----------------------------------------------------------------------------------
#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_emulation::driver_version();
  return cudaSuccess;
}

// With an older driver nothing else works; an op asks one of these first.
inline bool driver_is_too_old() {
  return cuda_emulation::driver_version() / 1000 < CUDART_VERSION / 1000;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (driver_is_too_old()) return cudaErrorInsufficientDriver;
  if (device < 0 || device >= cuda_emulation::kDevices) return cudaErrorInvalidValue;
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = cuda_emulation::kMultiprocessors[device];
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = static_cast<int>(cuda_emulation::kMostDynamicShared[device]);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// A kernel gets more dynamic shared memory than this only after it was asked for, on each device.
constexpr size_t kDynamicSharedUnasked = 48 * 1024;

inline size_t& dynamic_shared_allowed(const void* kernel) {
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::pair on_device(kernel, cuda_emulation::current_device());
  return allowed.try_emplace(on_device, kDynamicSharedUnasked).first->second;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (driver_is_too_old()) return cudaErrorInsufficientDriver;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) >
          cuda_emulation::kMostDynamicShared[cuda_emulation::current_device()]) {
    return cudaErrorInvalidValue;
  }
  dynamic_shared_allowed(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(value);
  return cudaSuccess;
}

// Of the current device, which must be the tensor's: a library that forgets to make it so would ask
// about another GPU.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* /*kernel*/,
                                                          int threads, size_t shared_bytes) {
  const int device = cuda_emulation::current_device();
  if (threads < 1 || device != cuda_emulation::tensor_device()) return cudaErrorInvalidValue;
  const int fit = cuda_emulation::kThreadsPerMultiprocessor[device] / threads;
  const int most = cuda_emulation::kBlocksPerMultiprocessor[device];
  *blocks = fit < most ? fit : most;
  if (shared_bytes > 0) {
    const int hold = static_cast<int>(cuda_emulation::kMostDynamicShared[device] / shared_bytes);
    *blocks = hold < *blocks ? hold : *blocks;
  }
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (driver_is_too_old()) return cudaErrorInsufficientDriver;
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied byte by byte");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters must fit in 4 KB");
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 0xFFFFu ||
      grid.z > 0xFFFFu || threads < 1 || threads > cuda_emulation::kMaxBlockThreads ||
      config->dynamicSmemBytes > dynamic_shared_allowed(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidConfiguration;
  }
  if (cuda_emulation::current_device() != cuda_emulation::tensor_device() ||
      config->stream != cuda_emulation::current_stream()) {
    return cudaErrorInvalidValue;  // no device guard, or not torch's current stream
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto run_thread = [](const void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.kernel, call.parameters);
  };
  cuda_emulation::run({grid, block, config->dynamicSmemBytes, reinterpret_cast<const void*>(kernel),
                       run_thread, &call});
  return cudaSuccess;
}
