// The one place where a kernel is launched: device, stream, grid and the check after.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "items.cuh"
#include "ops/op_checks.h"

// Present in torch with CUDA only; weak, so that the library loads beside a CPU-only torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace coopflow {

// The driver serves an older CUDA than that of the runtime in this library. A driver serves every
// minor version of its CUDA.
[[noreturn]] inline void refuse_driver() {
  constexpr int kNeeded = CUDART_VERSION / 1000;
  int served = 0;
  cudaDriverGetVersion(&served);
  throw std::runtime_error(
      "BuildError: coopflow: for CUDA tensors this library needs an NVIDIA driver for CUDA " +
      std::to_string(kNeeded) + " (" + (kNeeded >= 13 ? "580" : "525") +
      " or newer); the driver here serves CUDA " + std::to_string(served / 1000) + "." +
      std::to_string(served % 1000 / 10) +
      ". Update it, or build from source with an older nvcc (>= 12.0); CPU tensors work as it is");
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorInsufficientDriver) refuse_driver();
  throw std::runtime_error(std::string("coopflow: CUDA error in ") + what + ": " +
                           cudaGetErrorString(status));
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("coopflow: this torch has no CUDA streams");
  }
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Blocks of so many threads, whole warps, that fill the device with this kernel: enough for a
// grid-stride loop, and no more.
template <auto kKernel>
int64_t resident_blocks(int device, int threads) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices][kBlockThreads / kWarp];  // by device and warps of a block
  std::atomic<int>* const cached =
      device < kDevices ? &cache[device][threads / kWarp - 1] : nullptr;
  if (cached && *cached > 0) return *cached;
  const torch::stable::accelerator::DeviceGuard guard(device);  // occupancy is the current device's
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int resident = std::max(1, multiprocessors * blocks);
  if (cached) *cached = resident;
  return resident;
}

// Launches kKernel(args...) with this many blocks on the current device.
template <auto kKernel, typename... Args>
void launch_on_current(int device, int64_t blocks, int threads, int64_t shared_bytes,
                       const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = current_stream(device);
  check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), "a kernel launch");
}

// Launches kKernel(args...) with this many blocks on the device and current stream of x.
template <auto kKernel, typename... Args>
void launch_exactly(const Tensor& x, int64_t blocks, int threads, const Args&... args) {
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  launch_on_current<kKernel>(device, blocks, threads, 0, args...);
}

// For a kernel that loops over `blocks` units of work: no more blocks than the device holds.
template <auto kKernel, typename... Args>
void launch(const Tensor& x, int64_t blocks, int threads, const Args&... args) {
  const int64_t resident = resident_blocks<kKernel>(x.get_device_index(), threads);
  launch_exactly<kKernel>(x, std::min(blocks, resident), threads, args...);
}

// Lets the blocks of a kernel have so many bytes of dynamic shared memory, or any number that the
// device has: another thread may be about to launch it with more.
template <auto kKernel>
void allow_memory(int device, int64_t shared_bytes) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (shared_bytes > most) {
    throw std::runtime_error("coopflow: a kernel needs " + std::to_string(shared_bytes) +
                             " bytes of shared memory, and there are " + std::to_string(most));
  }
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "cudaFuncSetAttribute");
}

// The same for a kernel whose blocks have so many bytes of dynamic shared memory.
template <auto kKernel, typename... Args>
void launch_with_memory(const Tensor& x, int64_t blocks, int threads, int64_t shared_bytes,
                        const Args&... args) {
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  allow_memory<kKernel>(device, shared_bytes);
  int resident = 0;  // of a multiprocessor
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kKernel, threads,
                                                           static_cast<size_t>(shared_bytes)),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t fit =
      int64_t{std::max(1, resident)} * device_attribute(cudaDevAttrMultiProcessorCount, device);
  launch_on_current<kKernel>(device, std::min(blocks, fit), threads, shared_bytes, args...);
}

// For a kernel (args, ItemGrid) that walks with an ItemCursor<kCount>.
template <auto kKernel, int kCount, typename Args>
void launch_over_items(const Tensor& x, int64_t batch, int64_t per_chain, const Args& args) {
  const int64_t wanted = divide_up(batch * divide_up(per_chain, kCount), kBlockThreads);
  const int64_t blocks =
      std::min(wanted, resident_blocks<kKernel>(x.get_device_index(), kBlockThreads));
  launch_exactly<kKernel>(x, blocks, kBlockThreads, args,
                          make_item_grid<kCount>(batch, per_chain, blocks * kBlockThreads));
}

}  // namespace coopflow
