// Walks the cursors of csrc/cuda through states of more than 2^31 elements, touching no memory, and
// compares where they are with plain arithmetic on 128 bits.
#include <cstdint>
#include <cstdio>
#include <string>

#include "emulation.h"
#include "items.cuh"
#include "reduce.cuh"

namespace {

using Wide = __int128;

std::string first_error;

void expect(const char* what, int64_t batch, int64_t per_chain, int64_t actual, Wide expected) {
  if (static_cast<Wide>(actual) == expected || !first_error.empty()) return;
  char text[256];
  std::snprintf(text, sizeof(text), "%s is %lld, not %lld, in a state of %lld chains of %lld", what,
                static_cast<long long>(actual), static_cast<long long>(expected),
                static_cast<long long>(batch), static_cast<long long>(per_chain));
  first_error = text;
}

struct Walk {
  int64_t batch, per_chain;
  int64_t blocks;
};

template <int kCount>
void walk_items(const Walk& walk) {
  const Wide threads = static_cast<Wide>(walk.blocks) * coopflow::kBlockThreads;
  const coopflow::ItemGrid grid =
      coopflow::make_item_grid<kCount>(walk.batch, walk.per_chain, static_cast<int64_t>(threads));
  const Wide items = (static_cast<Wide>(walk.per_chain) + kCount - 1) / kCount;
  Wide k = static_cast<Wide>(blockIdx.x) * blockDim.x + threadIdx.x;
  int steps = 3;
  for (coopflow::ItemCursor<kCount> at(grid); at.valid() && steps > 0; at.next(), --steps) {
    const Wide chain = k / items;
    const Wide item = k % items;
    const Wide left = walk.per_chain - item * kCount;
    const auto check = [&](const char* what, int64_t actual, Wide expected) {
      expect(what, walk.batch, walk.per_chain, actual, expected);
    };
    check("ItemCursor::chain", at.chain(), chain);
    check("ItemCursor::item", at.item(), item);
    check("ItemCursor::offset", at.offset(), chain * walk.per_chain + item * kCount);
    check("ItemCursor::size", at.size(), left < kCount ? left : Wide{kCount});
    k += threads;
  }
}

void walk_chunks(const Walk& walk) {
  const Wide chunk_length = coopflow::kReductionChunk;
  const Wide chunks = (walk.per_chain + chunk_length - 1) / chunk_length;
  Wide k = blockIdx.x;
  int steps = 3;
  for (coopflow::ChunkCursor at(walk.batch, walk.per_chain); at.valid() && steps > 0;
       at.next(), --steps) {
    const Wide begin = k % chunks * chunk_length;
    const Wide end = begin + chunk_length < walk.per_chain ? begin + chunk_length : walk.per_chain;
    const auto check = [&](const char* what, int64_t actual, Wide expected) {
      expect(what, walk.batch, walk.per_chain, actual, expected);
    };
    check("ChunkCursor::chain", at.chain(), k / chunks);
    check("ChunkCursor::index", at.index(), k);
    check("ChunkCursor::begin", at.begin(), begin);
    check("ChunkCursor::end", at.end(), end);
    Wide expected = begin + static_cast<Wide>(threadIdx.x) * 4;
    coopflow::for_each_item<4>(at, [&](int64_t e, int) {
      check("for_each_item's element", e, expected);
      expected += static_cast<Wide>(blockDim.x) * 4;
    });
    k += gridDim.x;
  }
}

void run(const Walk& walk, void (*walk_thread)(const void*)) {
  cuda_emulation::run({{static_cast<unsigned>(walk.blocks), 1, 1},
                       {coopflow::kBlockThreads, 1, 1},
                       0,
                       nullptr,
                       walk_thread,
                       &walk});
}

}  // namespace

// Runs the blocks that cuda_emulation_set_blocks names; "" when every index is right.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulation_wrong_index() {
  first_error.clear();
  constexpr int64_t kBlocks = 1 << 23;
  for (const Walk& walk :
       {Walk{int64_t{1} << 31, 17, kBlocks}, Walk{3, (int64_t{1} << 33) + 5, kBlocks},
        Walk{int64_t{5} << 20, 16391, kBlocks}}) {
    run(walk, [](const void* data) { walk_items<4>(*static_cast<const Walk*>(data)); });
    run(walk, [](const void* data) { walk_items<8>(*static_cast<const Walk*>(data)); });
    run(walk, [](const void* data) { walk_chunks(*static_cast<const Walk*>(data)); });
  }
  return first_error.c_str();
}
