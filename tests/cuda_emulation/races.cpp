// The race check. The kernels of this build are compiled with -fsanitize=thread, which makes the
// compiler call one of the functions at the end of this file at each access to memory; they replace
// ThreadSanitizer's own. An access is an error when it meets another thread's and one of the two is
// a write, unless a barrier lies between them: __syncthreads for threads of a block, __syncwarp of
// a full warp for its lanes. So is a read of shared memory that no thread of the block has written.
#include <link.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "emulation.h"

namespace cuda_emulation {
namespace {

struct Access {
  Moment at;
  const void* instruction;  // null: none
};

// The last accesses to one byte by this block. Two readers are enough: any thread's write meets one
// that is not its own.
struct Byte {
  Access write, reads[2];
};
std::unordered_map<const char*, Byte> shadow;

thread_local char any_shared_variable;  // so that the library has thread-local storage at all
const char* shared_begin;
const char* shared_end;
const char* dynamic_begin;
const char* dynamic_end;

// This library's thread-local variables, which are its __shared__ ones.
int find_shared(dl_phdr_info* module, size_t, void*) {
  const char* const begin = static_cast<const char*>(module->dlpi_tls_data);
  for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = module->dlpi_phdr[i];
    if (segment.p_type != PT_TLS) continue;
    const char* const end = begin + segment.p_memsz;
    if (&any_shared_variable < begin || &any_shared_variable >= end) continue;
    shared_begin = begin;
    shared_end = end;
    return 1;
  }
  return 0;
}

bool ordered(const Access& earlier, const Moment& now) {
  if (earlier.instruction == nullptr) return true;
  const Moment& then = earlier.at;
  if (then.thread == now.thread || then.block_syncs != now.block_syncs) return true;
  return then.warp == now.warp && then.warp_syncs != now.warp_syncs;
}

[[noreturn]] void fail_race(bool write, const void* instruction, bool other_write,
                            const Access& other) {
  fail_access(std::string(write ? "writes" : "reads") + " shared memory at\n    " +
              source_lines(instruction) + "\n  that thread " + std::to_string(other.at.thread) +
              (other_write ? " wrote at\n    " : " read at\n    ") +
              source_lines(other.instruction) + "\n  with no barrier between them");
}

void record(Byte& byte, bool write, const void* instruction) {
  const Moment at = now();
  if (!ordered(byte.write, at)) fail_race(write, instruction, true, byte.write);
  if (write) {
    for (const Access& read : byte.reads) {
      if (!ordered(read, at)) fail_race(true, instruction, false, read);
    }
    byte = {{at, instruction}, {}};
    return;
  }
  if (byte.write.instruction == nullptr) {
    fail_access("reads shared memory that no thread of its block has written, at\n    " +
                source_lines(instruction));
  }
  byte.reads[ordered(byte.reads[0], at) ? 0 : 1] = {at, instruction};
}

void on_access(const void* address, size_t bytes, bool write, const void* instruction) {
  const char* const begin = static_cast<const char*>(address);
  const bool shared = (begin >= shared_begin && begin < shared_end) ||
                      (begin >= dynamic_begin && begin < dynamic_end);
  if (!shared || !thread_is_running()) return;
  const bool dynamic = begin >= dynamic_begin && begin < dynamic_end;
  banks_record(now(), begin - (dynamic ? dynamic_begin : shared_begin), bytes, instruction);
  for (size_t i = 0; i < bytes; ++i) record(shadow[begin + i], write, instruction);
}

}  // namespace

void races_begin_launch(const char* dynamic_shared, size_t bytes) {
  dynamic_begin = dynamic_shared;
  dynamic_end = dynamic_shared + bytes;
  any_shared_variable = 0;  // gives this thread its copy
  dl_iterate_phdr(find_shared, nullptr);
}

void races_begin_block() {
  shadow.clear();
  std::memset(const_cast<char*>(shared_begin), 0xFF, shared_end - shared_begin);
}

}  // namespace cuda_emulation

using cuda_emulation::on_access;

#define ACCESS_HOOKS(size)                                                                    \
  void __tsan_read##size(void* p) { on_access(p, size, false, __builtin_return_address(0)); } \
  void __tsan_write##size(void* p) { on_access(p, size, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) {                                                 \
    on_access(p, size, false, __builtin_return_address(0));                                   \
  }                                                                                           \
  void __tsan_unaligned_write##size(void* p) {                                                \
    on_access(p, size, true, __builtin_return_address(0));                                    \
  }

extern "C" {
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { on_access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { on_access(p, n, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of host code; kernels have none. The last argument is a memory order.
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
void __tsan_atomic32_store(volatile int* p, int v, int) {
  __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
}
