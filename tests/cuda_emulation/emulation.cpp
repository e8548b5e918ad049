#include "emulation.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The built-in variables, which cuda_runtime.h declares constant for kernels.
extern cuda_emulation::Index3 emulated_thread_index __asm__("cuda_emulation_threadIdx");
extern cuda_emulation::Index3 emulated_block_index __asm__("cuda_emulation_blockIdx");
extern cuda_emulation::Index3 emulated_block_dim __asm__("cuda_emulation_blockDim");
extern cuda_emulation::Index3 emulated_grid_dim __asm__("cuda_emulation_gridDim");
cuda_emulation::Index3 emulated_thread_index, emulated_block_index, emulated_block_dim,
    emulated_grid_dim;

namespace cuda_emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { kNotStarted, kRunnable, kWaitsForBlock, kWaitsForWarp, kFinished };

struct Fiber;

struct Thread {
  Index3 index;
  int number;  // in the block
  State state;
  Fiber* fiber;
  // The call it waits in.
  const char* operation;
  unsigned mask;
  uint64_t value;
  Place place;
  uint64_t received[kWarpSize];

  int warp() const { return number / kWarpSize; }
  int lane() const { return number % kWarpSize; }

  bool waits_in(const char* call, unsigned call_mask, Place at) const {
    const bool waits = state == State::kWaitsForBlock || state == State::kWaitsForWarp;
    return waits && std::strcmp(operation, call) == 0 && mask == call_mask &&
           place.line == at.line && std::strcmp(place.file, at.file) == 0;
  }
};

// A stack that runs one thread after another; a thread that waits keeps its fiber.
struct Fiber {
  ucontext_t context;
  char* stack;
  Thread* thread;
  void* fake_stack;  // AddressSanitizer's
};

std::string text(Index3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) + " (" +
         place.function + ")";
}

// Threads run on one operating-system thread, so no lock is needed inside a launch.
class Device {
 public:
  ~Device() {
    if (stacks_) munmap(stacks_, kMaxBlockThreads * kStackBytes);
  }

  void run(const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launch_ = &launch;
    emulated_block_dim = launch.block;
    emulated_grid_dim = launch.grid;
    dynamic_shared_.reset(new char[launch.dynamic_shared]);
    prepare_stacks();
    races_begin_launch(dynamic_shared_.get(), launch.dynamic_shared);
    const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    if (launch.kernel) launched.push_back({launch.kernel, blocks});
    for (uint64_t block : blocks_in_order(blocks)) {
      if (block < blocks) run_block(block);
    }
    dynamic_shared_.reset();
  }

  // --- called by fibers ---
  void sync_threads(Place place) { wait(State::kWaitsForBlock, "__syncthreads", 0, 0, place); }

  // Three barriers: the votes of before are read, these are counted, these are complete.
  bool vote_in_block(bool mine, Place place) {
    sync_threads(place);
    votes_ = 0;
    sync_threads(place);
    if (mine) ++votes_;
    sync_threads(place);
    return votes_ != 0;
  }

  const uint64_t* meet(const char* operation, unsigned mask, uint64_t value, Place place) {
    Thread& self = *current_;
    if (((mask >> self.lane()) & 1) == 0) {
      fail(std::string(operation) + " leaves its own lane out of its mask " + text(mask), place);
    }
    Thread* const lanes = threads_.data() + self.warp() * kWarpSize;
    bool complete = true;
    for_lanes(mask, [&](int lane) {
      if (self.warp() * kWarpSize + lane >= static_cast<int>(threads_.size())) {
        fail(std::string(operation) + " has lane " + std::to_string(lane) + " in its mask " +
                 text(mask) + ", but the block has no such thread",
             place);
      }
      const Thread& other = lanes[lane];
      const bool there = &other == &self || other.waits_in(operation, mask, place);
      complete = complete && there;
    });
    self.value = value;
    if (!complete) {
      wait(State::kWaitsForWarp, operation, mask, value, place);
      return self.received;
    }
    uint64_t values[kWarpSize];
    for_lanes(mask, [&](int lane) { values[lane] = lanes[lane].value; });
    for_lanes(mask, [&](int lane) {
      std::copy(values, values + kWarpSize, lanes[lane].received);
      if (lanes[lane].state == State::kWaitsForWarp) lanes[lane].state = State::kRunnable;
    });
    // Only a __syncwarp of the whole warp orders memory for the race check.
    const bool orders_memory = std::strcmp(operation, "__syncwarp") == 0;
    if (orders_memory && mask == full_mask(self.warp())) ++warp_syncs_[self.warp()];
    return self.received;
  }

  [[noreturn]] void fail(const std::string& what, Place place) {
    fail(what + " at " + text(place));
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = message(*current_, what);
    switch_to_host();
    __builtin_unreachable();  // a failed block is never resumed
  }

  Thread* current() { return current_; }
  char* dynamic_shared() { return dynamic_shared_.get(); }

  Moment now() const {
    return {static_cast<uint32_t>(current_->number), static_cast<uint32_t>(current_->warp()),
            block_syncs_, warp_syncs_[current_->warp()]};
  }

  void run_fiber(Fiber* fiber) {
    arrive(fiber);
    for (;;) {
      launch_->run_thread(launch_->arguments);
      current_->state = State::kFinished;
      Thread* const next = next_not_started();
      if (next) {
        start(next, fiber);
      } else {
        idle_.push_back(fiber);
        switch_to_host();
      }
    }
  }

  // --- settings ---
  uint64_t order_seed = 0;
  std::vector<uint64_t> only_blocks;  // of each grid; empty: all
  struct Launched {
    const void* kernel;
    uint64_t blocks;
  };
  std::vector<Launched> launched;

 private:
  template <typename F>
  static void for_lanes(unsigned mask, const F& f) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane) & 1) f(lane);
    }
  }

  static std::string text(unsigned mask) {
    char digits[16];
    std::snprintf(digits, sizeof(digits), "0x%08x", mask);
    return digits;
  }
  static std::string text(Index3 i) { return cuda_emulation::text(i); }
  static std::string text(Place p) { return cuda_emulation::text(p); }

  unsigned full_mask(int warp) const {
    const int lanes = static_cast<int>(threads_.size()) - warp * kWarpSize;
    return lanes >= kWarpSize ? 0xFFFFFFFFu : (1u << lanes) - 1;
  }

  // --- order ---
  template <typename T>
  void shuffle(std::vector<T>& items) {
    if (order_seed != 0) std::shuffle(items.begin(), items.end(), random_);
  }

  std::vector<uint64_t> blocks_in_order(uint64_t count) {
    random_.seed(order_seed);
    std::vector<uint64_t> blocks = only_blocks;
    if (blocks.empty()) {
      blocks.resize(count);
      std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    }
    shuffle(blocks);
    return blocks;
  }

  // --- one block ---
  void run_block(uint64_t block) {
    const Index3 grid = launch_->grid;
    emulated_block_index = {static_cast<unsigned>(block % grid.x),
                            static_cast<unsigned>(block / grid.x % grid.y),
                            static_cast<unsigned>(block / grid.x / grid.y)};
    make_threads();
    races_begin_block();
    std::memset(dynamic_shared_.get(), 0xFF, launch_->dynamic_shared);
    std::vector<int> warps(warp_syncs_.size());
    std::iota(warps.begin(), warps.end(), 0);
    // Each warp runs as far as it can before another does, which is the hardest on kernels that
    // forget to synchronise.
    for (;;) {
      shuffle(warps);
      bool progress = false;
      for (int warp : warps) progress = run_warp(warp) || progress;
      if (progress) continue;
      if (std::all_of(threads_.begin(), threads_.end(),
                      [](const Thread& t) { return t.state == State::kFinished; })) {
        banks_end_block();
        return;
      }
      release_barrier();
    }
  }

  void make_threads() {
    const Index3 dim = launch_->block;
    threads_.clear();
    for (unsigned z = 0; z < dim.z; ++z) {
      for (unsigned y = 0; y < dim.y; ++y) {
        for (unsigned x = 0; x < dim.x; ++x) {
          Thread thread{};
          thread.index = {x, y, z};
          thread.number = static_cast<int>(threads_.size());
          threads_.push_back(thread);
        }
      }
    }
    block_syncs_ = 0;
    warp_syncs_.assign((threads_.size() + kWarpSize - 1) / kWarpSize, 0);
  }

  bool run_warp(int warp) {
    lane_order_.clear();
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (static_cast<size_t>(warp * kWarpSize + lane) < threads_.size()) {
        lane_order_.push_back(&threads_[warp * kWarpSize + lane]);
      }
    }
    shuffle(lane_order_);
    bool progress = false;
    for (bool ran = true; ran;) {
      ran = false;
      for (Thread* thread : lane_order_) {
        if (thread->state != State::kNotStarted && thread->state != State::kRunnable) continue;
        resume(thread);
        ran = progress = true;
      }
    }
    return progress;
  }

  Thread* next_not_started() {
    for (Thread* thread : lane_order_) {
      if (thread->state == State::kNotStarted) return thread;
    }
    return nullptr;
  }

  // No thread can go on: either all wait at one barrier, or the kernel is wrong.
  void release_barrier() {
    const Thread* waiting = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state == State::kWaitsForWarp) fail_warp(thread);
      if (!waiting && thread.state == State::kWaitsForBlock) waiting = &thread;
    }
    for (const Thread& thread : threads_) {
      if (!thread.waits_in(waiting->operation, 0, waiting->place)) fail_wait(*waiting, thread);
    }
    for (Thread& thread : threads_) thread.state = State::kRunnable;
    ++block_syncs_;
  }

  void fail_warp(const Thread& waiting) {
    for_lanes(waiting.mask, [&](int lane) {
      const Thread& other = threads_[waiting.warp() * kWarpSize + lane];
      if (!other.waits_in(waiting.operation, waiting.mask, waiting.place)) {
        fail_wait(waiting, other);
      }
    });
  }

  [[noreturn]] void fail_wait(const Thread& waiting, const Thread& other) {
    std::string what = std::string(waiting.operation) + " at " + text(waiting.place) +
                       " is not reached by thread " + text(other.index) + ", which ";
    if (other.state == State::kFinished) {
      what += "has finished";
    } else {
      what += std::string("waits in ") + other.operation + " at " + text(other.place);
      if (other.state == State::kWaitsForWarp) what += " with mask " + text(other.mask);
    }
    abandon_block();
    throw std::runtime_error(message(waiting, what));
  }

  static std::string message(const Thread& thread, const std::string& what) {
    return "cuda_emulation: block " + text(emulated_block_index) + ", thread " +
           text(thread.index) + ": " + what;
  }

  // --- fibers ---
  void prepare_stacks() {
    if (stacks_) return;
    void* const memory = mmap(nullptr, kMaxBlockThreads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda_emulation: no memory for stacks");
    stacks_ = static_cast<char*>(memory);
  }

  Fiber* take_fiber() {
    if (idle_.empty()) {
      char* const stack = stacks_ + fibers_.size() * kStackBytes;
      mprotect(stack, 4096, PROT_NONE);  // an overflow ends here
      fibers_.push_back(std::make_unique<Fiber>());
      Fiber* const fiber = fibers_.back().get();
      fiber->stack = stack;
      make_context(fiber);
      return fiber;
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  void make_context(Fiber* fiber);

  void start(Thread* thread, Fiber* fiber) {
    fiber->thread = thread;
    thread->fiber = fiber;
    become(thread);
  }

  void become(Thread* thread) {
    thread->state = State::kRunnable;
    current_ = thread;
    emulated_thread_index = thread->index;
  }

  void resume(Thread* thread) {
    if (thread->state == State::kNotStarted) {
      start(thread, take_fiber());
    } else {
      become(thread);
    }
    Fiber* const fiber = thread->fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStackBytes);
#endif
    swapcontext(&host_, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current_ = nullptr;
    if (!error_.empty()) {
      abandon_block();
      throw std::runtime_error(std::exchange(error_, {}));
    }
  }

  void wait(State state, const char* operation, unsigned mask, uint64_t value, Place place) {
    Thread& self = *current_;
    self.state = state;
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.place = place;
    switch_to_host();
  }

  void switch_to_host() {
    Fiber* const fiber = current_->fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber->fake_stack, host_stack_, host_stack_bytes_);
#endif
    swapcontext(&fiber->context, &host_);
    arrive(fiber);
  }

  void arrive([[maybe_unused]] Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &host_stack_, &host_stack_bytes_);
    fiber->fake_stack = nullptr;
#endif
  }

  // Fibers of a failed block hold half-run threads; they start anew.
  void abandon_block() {
    idle_.clear();
    for (const std::unique_ptr<Fiber>& fiber : fibers_) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
      make_context(fiber.get());
      idle_.push_back(fiber.get());
    }
  }

  std::mutex mutex_;
  const Launch* launch_ = nullptr;
  std::unique_ptr<char[]> dynamic_shared_;
  int votes_ = 0;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Thread*> lane_order_;  // of the warp that runs
  std::vector<uint32_t> warp_syncs_;
  uint32_t block_syncs_ = 0;
  Thread* current_ = nullptr;
  std::string error_;
  ucontext_t host_{};
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  char* stacks_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

Device& device() {
  static Device the_device;
  return the_device;
}

// makecontext passes ints only: a pointer goes in two halves.
void fiber_entry(unsigned high, unsigned low) {
  device().run_fiber(reinterpret_cast<Fiber*>((uint64_t{high} << 32) | low));
}

void Device::make_context(Fiber* fiber) {
  fiber->fake_stack = nullptr;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  const uint64_t address = reinterpret_cast<uint64_t>(fiber);
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(fiber_entry), 2,
              static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
}

}  // namespace

void run(const Launch& launch) { device().run(launch); }
void sync_threads(Place place) { device().sync_threads(place); }

bool vote_in_block(bool mine, Place place) { return device().vote_in_block(mine, place); }
const uint64_t* meet_in_warp(const char* operation, unsigned mask, uint64_t value, Place place) {
  return device().meet(operation, mask, value, place);
}
int lane() { return device().current()->lane(); }
void fail_thread(const char* what, Place place) { device().fail(what, place); }
void* dynamic_shared() { return device().dynamic_shared(); }

bool thread_is_running() { return device().current() != nullptr; }
Moment now() { return device().now(); }
std::string source_lines(const void* instruction) {
  Dl_info module;
  if (dladdr(instruction, &module) == 0) return "?";
  const size_t offset =
      static_cast<const char*>(instruction) - static_cast<const char*>(module.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -Cfips -e '%s' 0x%zx 2>/dev/null",
                module.dli_fname, offset);
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[4096];
    while (std::fgets(line, sizeof(line), pipe))
      lines += lines.empty() ? line : "    " + std::string(line);
    pclose(pipe);
  }
  if (!lines.empty() && lines.back() == '\n') lines.pop_back();
  return lines.empty() ? module.dli_fname + ("+" + std::to_string(offset)) : lines;
}

void fail_access(const std::string& what) { device().fail(what); }

}  // namespace cuda_emulation

// --- called from Python (harness.py) -----------------------------------------------------------
#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void cuda_emulation_set_order(uint64_t seed) {
  cuda_emulation::device().order_seed = seed;
}

EXPORTED void cuda_emulation_set_device(int device) { cuda_emulation::set_tensor_device(device); }

EXPORTED void cuda_emulation_set_driver(int version) {
  cuda_emulation::set_driver_version(version);
}

EXPORTED void cuda_emulation_set_blocks(const uint64_t* blocks, size_t count) {
  cuda_emulation::device().only_blocks.assign(blocks, blocks + count);
}

// Hands out the launches since the last call: the kernels' symbol addresses, relative to the
// library, and the grids' numbers of blocks; returns how many there are and writes at most
// `capacity`.
EXPORTED size_t cuda_emulation_take_launches(uint64_t* offsets, uint64_t* blocks, size_t capacity) {
  auto& launched = cuda_emulation::device().launched;
  Dl_info module{};
  dladdr(reinterpret_cast<const void*>(&cuda_emulation_take_launches), &module);
  for (size_t i = 0; i < std::min(capacity, launched.size()); ++i) {
    offsets[i] =
        static_cast<const char*>(launched[i].kernel) - static_cast<const char*>(module.dli_fbase);
    blocks[i] = launched[i].blocks;
  }
  const size_t count = launched.size();
  launched.clear();
  return count;
}
}
