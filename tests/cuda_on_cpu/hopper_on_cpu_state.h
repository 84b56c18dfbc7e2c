// Of hopper_on_cpu.h: what is kept of a block, of which several may run.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace slimkernels {

struct Mbarrier {
  uint64_t bits;
};

struct TensorMap {
  unsigned char* start = nullptr;
  int element = 0, rank = 0;  // bytes of an element
  std::array<int64_t, 5> sizes{}, strides{};
  std::array<int, 5> box{};
  bool swizzled = true;
};

namespace hopper_on_cpu {

// mbarrier.

struct Phases {
  int arrivals, pending;
  int64_t bytes;
  uint32_t parity;  // of the phase that has not ended

  void end_if_complete() {
    if (pending || bytes) return;
    pending = arrivals;
    parity ^= 1;
    ++cuda_on_cpu::events;
  }
};

// TMA.

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// A load.
struct Transfer {
  TensorMap map;
  uint32_t shared;
  Mbarrier* barrier;
  std::array<int, 5> first;

  // Calls run(address, global, inside) for each 16 bytes of the box; `inside` of its elements are
  // in the tensor.
  template <typename Run>
  int each_chunk(Run run) const {
    const int per_chunk = 16 / map.element;
    std::array<int, 5> i{};
    uint32_t address = shared;
    int bytes = map.element;
    for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
    for (; address < shared + bytes; address += 16) {
      unsigned char* global = map.start;
      int64_t inside = map.sizes[0] - (first[0] + i[0]);
      if (first[0] + i[0] < 0) inside = 0;  // kernels here start boxes inside rows
      for (int d = 0; d < map.rank; ++d) {
        const int64_t c = int64_t(first[d]) + i[d];
        if (d > 0 && (c < 0 || c >= map.sizes[d])) inside = 0;
        global += c * map.strides[d];
      }
      inside = std::max<int64_t>(0, std::min<int64_t>(inside, per_chunk));
      run(map.swizzled ? swizzle_128(address) : address, global, int(inside));
      i[0] += per_chunk;
      for (int d = 0; d + 1 < map.rank && i[d] >= map.box[d]; ++d) i[d] = 0, ++i[d + 1];
    }
    return bytes;
  }
};

// wgmma.

// Registers that an accumulator has while products are under way, and how many those are.
struct Accumulator {
  std::vector<float> values;
  int users = 0;
};

struct Product {
  int columns, kind_a, kind_b;  // kind_a: a Major, or -1 for registers
  bool is_half, accumulate;
  uint64_t a, b;
  std::array<float*, 32> d{};
  std::array<const uint32_t*, 32> registers_a{};
  int issued = 0;
  bool done = false;

  bool is_like(const Product& x) const {
    return columns == x.columns && kind_a == x.kind_a && kind_b == x.kind_b && a == x.a &&
           b == x.b && accumulate == x.accumulate && is_half == x.is_half;
  }
};

struct Lane {
  int issued = 0, committed = 0;  // products, groups
  bool fenced = false;
};

struct WarpProducts {
  std::deque<Product> products;  // of which a lane has issued its first `issued`
  std::vector<int> group_ends;
  std::array<Lane, 32> lanes;
  int performed = 0;
  std::map<std::pair<int, float*>, Accumulator> in_flight;
};

struct WaitingWarp {
  int warp, end;
};

// Named barriers.

struct NamedBarrier {
  int arrived = 0, threads = 0, waiting = 0;
  unsigned rounds = 0;
};

// Bulk copies.

// To global memory: read, then written or added.
struct BulkCopy {
  float* global;
  uint32_t shared;
  int bytes;
  bool adds;
  bool is_read = false;
  std::vector<float> values;
};
// A thread's, those it waits for included.
struct BulkCopies {
  std::deque<BulkCopy> issued, committed;
  bool awaits_read = false, awaits_all = false;
};

struct BlockState {
  unsigned char* shared_memory = nullptr;  // once it was asked for
  // Shared memory that ordinary stores wrote and no proxy fence has shown to TMA and wgmma: the
  // thread that wrote, by address / 16.
  std::map<uint32_t, int> unfenced;
  std::map<const Mbarrier*, Phases> barriers;
  std::deque<Transfer> loads;             // not landed
  std::map<int, BulkCopies> bulk_copies;  // by thread
  std::vector<WarpProducts> product_warps;
  std::deque<WaitingWarp> waiting;
  std::array<NamedBarrier, 16> named{};
  std::vector<std::vector<int>> registers;  // what each thread set
};

SLIM_UNSANITIZED inline BlockState& state() {
  return *static_cast<BlockState*>(cuda_on_cpu::here->more.get());
}

}  // namespace hopper_on_cpu
}  // namespace slimkernels
