// A CUDA device in miniature, for running kernels in tests on a machine without a GPU. One thread
// of a block is one fiber; blocks run one after another. What a kernel does wrong that a GPU would
// forgive or hang on (a barrier that not all threads reach, a shuffle outside its mask) is an error
// that names block, thread and source line, thrown from the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_emulation {

struct Index3 {
  unsigned x, y, z;
};

constexpr int kWarpSize = 32;
constexpr unsigned kMaxBlockThreads = 1024;

// Where a kernel calls one of the functions below.
struct Place {
  const char* file;
  int line;
  const char* function;

  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                    const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

struct Launch {
  Index3 grid, block;
  size_t dynamic_shared;
  const void* kernel;
  void (*run_thread)(const void* arguments);  // calls the kernel as one thread
  const void* arguments;
};

// Runs every thread of every block. Throws std::runtime_error where the kernel is wrong.
void run(const Launch& launch);

// Called by kernels.
void sync_threads(Place place);
// A barrier of the block that tells each thread whether any of them votes for it.
bool vote_in_block(bool mine, Place place);
// Waits for every lane of the mask to make the same call; returns the values of all 32 lanes (those
// outside the mask are not set).
const uint64_t* meet_in_warp(const char* operation, unsigned mask, uint64_t value, Place place);
int lane();
[[noreturn]] void fail_thread(const char* what, Place place);
void* dynamic_shared();

// How much each of the emulated devices holds at once: few blocks, so that kernels loop; one; so
// many that each thread has one piece of work; and few again, with little shared memory.
constexpr int kDevices = 4;
constexpr int kMultiprocessors[kDevices] = {2, 1, 1 << 24, 2};
constexpr int kBlocksPerMultiprocessor[kDevices] = {4, 1, 8, 4};
constexpr int kThreadsPerMultiprocessor[kDevices] = {512, 1024, 2048, 512};
// Dynamic shared memory that a block may have: as on sm_90, on the last as on sm_120.
constexpr size_t kMostDynamicShared[kDevices] = {227 * 1024, 227 * 1024, 227 * 1024, 99 * 1024};

// The device that tensors are on, and the device and stream that torch has made current; see
// torch_device.cpp.
int tensor_device();
void set_tensor_device(int device);
int current_device();
void* current_stream();
// Of the CUDA that the driver serves, such as 13000.
int driver_version();
void set_driver_version(int version);

// --- for the race check (races.cpp) ------------------------------------------------------------
// A thread of the running block, and how often it was synchronised with its block and its warp.
struct Moment {
  uint32_t thread, warp, block_syncs, warp_syncs;
};
bool thread_is_running();
Moment now();
[[noreturn]] void fail_access(const std::string& what);
// Source lines of an instruction in a kernel, innermost inlined function first.
std::string source_lines(const void* instruction);
void races_begin_launch(const char* dynamic_shared, size_t bytes);
void races_begin_block();

// --- for the count of bank conflicts (banks.cpp) -------------------------------------------------
// An access `offset` bytes into shared memory.
void banks_record(const Moment& at, size_t offset, size_t bytes, const void* instruction);
void banks_end_block();

}  // namespace cuda_emulation
