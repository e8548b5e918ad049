// Bank conflicts of shared memory, counted. The hooks of races.cpp see each access of each thread;
// here the k-th accesses that the lanes of a warp make by one instruction become one request. What
// hardware needs for it: 32 banks of 4 bytes give one word each at a time, lanes of one word share
// it, and wider accesses go by parts of 128 bytes (8 bytes: half a warp, 16 bytes: a quarter).
// Where lanes diverge, so that one of them makes more such accesses than another, the pairing is a
// guess. Addresses are those of the emulation: shared memory begins at bank 0 on a GPU too.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulation.h"

namespace cuda_emulation {
namespace {

constexpr size_t kBankBytes = 4, kBanks = 32;

struct Request {
  size_t bytes = 0;  // of one lane
  bool active[kWarpSize] = {};
  size_t first_word[kWarpSize] = {};
};

struct Count {
  uint64_t requests = 0, passes = 0, floor = 0;
};

bool counting = false;
// Of the running block: by instruction and warp the requests, and how many each thread has made.
std::unordered_map<const void*, std::vector<std::vector<Request>>> requests;
std::unordered_map<const void*, std::vector<size_t>> made;
std::map<const void*, Count> counts;

// Adds what these words need: passes, and how few they could be for as many words.
void add_part(const std::set<size_t>& words, Count& count) {
  size_t of_bank[kBanks] = {};
  for (size_t word : words) ++of_bank[word % kBanks];
  count.passes += *std::max_element(of_bank, of_bank + kBanks);
  count.floor += (words.size() + kBanks - 1) / kBanks;
}

void add(const Request& request, Count& count) {
  const size_t words_of_a_lane = std::max(request.bytes / kBankBytes, size_t{1});
  const size_t lanes = kBanks / words_of_a_lane;
  for (size_t begin = 0; begin < kWarpSize; begin += lanes) {
    std::set<size_t> words;
    for (size_t lane = begin; lane < begin + lanes; ++lane) {
      if (!request.active[lane]) continue;
      for (size_t w = 0; w < words_of_a_lane; ++w) words.insert(request.first_word[lane] + w);
    }
    add_part(words, count);
  }
  ++count.requests;
}

}  // namespace

void banks_record(const Moment& at, size_t offset, size_t bytes, const void* instruction) {
  if (!counting) return;
  std::vector<size_t>& own = made[instruction];
  own.resize(std::max<size_t>(own.size(), at.thread + 1));
  std::vector<std::vector<Request>>& warps = requests[instruction];
  warps.resize(std::max<size_t>(warps.size(), at.warp + 1));
  const size_t k = own[at.thread]++;
  if (warps[at.warp].size() == k) warps[at.warp].emplace_back();
  Request& request = warps[at.warp][k];
  const int lane = static_cast<int>(at.thread) % kWarpSize;
  request.bytes = bytes;
  request.active[lane] = true;
  request.first_word[lane] = offset / kBankBytes;
}

void banks_end_block() {
  for (const auto& [instruction, warps] : requests) {
    for (const auto& warp : warps) {
      for (const Request& request : warp) add(request, counts[instruction]);
    }
  }
  requests.clear();
  made.clear();
}

}  // namespace cuda_emulation

// --- called from Python (harness.py) -----------------------------------------------------------
#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Begins to count.
EXPORTED void cuda_emulation_count_banks() {
  cuda_emulation::counts.clear();
  cuda_emulation::counting = true;
}

// Ends it and hands out, for each instruction: its address, requests, passes, the fewest passes;
// returns how many instructions there are and writes at most `capacity` of them.
EXPORTED size_t cuda_emulation_counted_banks(uint64_t (*numbers)[4], size_t capacity) {
  const auto& counts = cuda_emulation::counts;
  size_t i = 0;
  for (auto at = counts.begin(); at != counts.end() && i < capacity; ++at, ++i) {
    const uint64_t row[] = {reinterpret_cast<uint64_t>(at->first), at->second.requests,
                            at->second.passes, at->second.floor};
    std::copy(row, row + 4, numbers[i]);
  }
  cuda_emulation::counting = false;
  return counts.size();
}

// Where an instruction stands in the sources.
EXPORTED const char* cuda_emulation_place(uint64_t instruction) {
  static std::string place;
  place = cuda_emulation::source_lines(reinterpret_cast<const void*>(instruction));
  return place.c_str();
}
}
