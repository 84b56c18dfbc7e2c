// What csrc/cuda/hopper.cuh wraps, for g++: each function does to bytes of shared memory what the
// PTX ISA says under the heading named there. Included by hopper.cuh instead of its own bodies.
//
// Asynchrony has two faces, chosen by letters in the environment's HOPPER_ON_CPU. "l": copies of
// TMA land when no thread can get on without them, with "r" the last first; else as they are
// issued. "w": wgmma reads and writes when its warp waits for it and no other thread can get on,
// and its registers are NaN until then; else as it is issued. So a wait, a barrier or a fence that
// is missing gives wrong numbers under one of them, or stops the kernel. wgmma works by warps, each
// with its 16 of the 64 rows, since a warp that waits knows nothing of the other three.
//
// A broken rule that a GPU would pass over in silence (a descriptor that does not fit its operand,
// shared memory written by stores and read by TMA without a proxy fence, warps of a group that do
// different things) is an error with a sentence.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <map>
#include <string>

#include "cuda_on_cpu.h"

#undef __grid_constant__
#define __grid_constant__

namespace slimkernels {

using cuda_on_cpu::fail;

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

inline std::string letters;  // HOPPER_ON_CPU's, when the block started

inline bool mode(char letter) { return letters.find(letter) != std::string::npos; }

// Of the block, which is its own cluster.
inline int thread() { return int(cuda_on_cpu::running - cuda_on_cpu::fibers.data()); }

// Where dynamic shared memory starts, as if 384 bytes of static shared memory lay before it.
constexpr uint32_t kSharedStart = 384;

inline unsigned char* shared_memory = nullptr;  // the block's, once it was asked for

SLIM_UNSANITIZED inline unsigned char* dynamic_start() {
  if (!shared_memory) shared_memory = cuda_on_cpu::dynamic_shared<unsigned char>();
  return shared_memory;
}

SLIM_UNSANITIZED inline unsigned char* at(uint32_t address, int bytes) {
  if (address < kSharedStart || address + bytes > kSharedStart + cuda_on_cpu::dynamic_bytes)
    fail("shared memory has no address " + std::to_string(address));
  return dynamic_start() + (address - kSharedStart);
}

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Shared memory that ordinary stores wrote and no proxy fence has shown to TMA and wgmma.

inline std::map<uint32_t, int> unfenced;  // thread that wrote, by address / 16

inline void check_fenced(uint32_t address) {
  if (unfenced.empty()) return;
  const auto found = unfenced.find(address / 16);
  if (found != unfenced.end())
    fail("fence_proxy_async is missing after a store of thread " + std::to_string(found->second));
}

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

inline std::map<const Mbarrier*, Phases> barriers;
constexpr uint64_t kLive = 0x6d62617272696572;  // whoever overwrites a barrier is found out

inline Phases& phases_of(const Mbarrier* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end() || barrier->bits != kLive)
    fail("an mbarrier is used that was not initialised, or overwritten");
  return found->second;
}

// TMA.

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

  void perform() const {
    const int bytes = each_chunk([&](uint32_t address, unsigned char* global, int inside) {
      check_fenced(address);
      unsigned char* here = at(address, 16);
      std::memset(here, 0, 16);
      std::memcpy(here, global, inside * map.element);
    });
    Phases& phases = phases_of(barrier);
    phases.bytes -= bytes;
    phases.end_if_complete();
  }
};

inline std::deque<Transfer> loads;  // not landed

inline bool land_one() {
  if (loads.empty()) return false;
  if (mode('r')) std::rotate(loads.begin(), loads.end() - 1, loads.end());
  loads.front().perform();
  loads.pop_front();
  return true;
}

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

inline std::vector<WarpProducts> product_warps;

inline WarpProducts& my_products() { return product_warps[thread() / 32]; }
inline Lane& my_lane() { return my_products().lanes[cuda_on_cpu::running->lane]; }

inline float widen_bits(uint16_t bits, bool is_half) {
  if (is_half) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Calls run(mn, k, values) for each 8 neighbours of a shared operand's `count` rows or columns from
// `first` on: neighbours along k of kK, along mn of kMN. "Matrix Descriptor Format", and "Strides"
// for the layouts.
template <typename Run>
void each_eight(uint64_t descriptor, int kind, bool is_half, int first, int count, Run run) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor's layout is not the 128-byte swizzle");
  if ((start >> 7 & 7) != 0 || (descriptor >> 49 & 7) != 0)
    fail("an operand starts inside the swizzle's pattern");
  const bool along_k = kind == 0;
  for (int mn = first; mn < first + count; mn += along_k ? 1 : 8)
    for (int k = 0; k < 16; k += along_k ? 8 : 1) {
      uint32_t address = start;
      if (along_k)
        address += mn / 8 * stride + mn % 8 * 128 + k * 2;
      else
        address += mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
      address = swizzle_128(address);
      check_fenced(address);
      uint16_t bits[8];
      std::memcpy(bits, at(address, 16), 16);
      float values[8];
      for (int i = 0; i < 8; ++i) values[i] = widen_bits(bits[i], is_half);
      run(mn, k, values);
    }
}

// d (16, N) += a (16, 16) @ b (16, N), rows of 256.
__attribute__((optimize("O3"))) SLIM_UNSANITIZED inline void multiply(float (&d)[16][256],
                                                                      const float (&a)[16][16],
                                                                      const float (&b)[16][256],
                                                                      int N) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) d[i][n] += a[i][k] * b[k][n];
}

// The 16 rows of D that warp `warp` of its group owns.
SLIM_UNSANITIZED inline void perform(WarpProducts& warp, Product& product, int index_in_group) {
  static float a[16][16], b[16][256], d[16][256];
  const int N = product.columns;
  each_eight(product.b, product.kind_b, product.is_half, 0, N,
             [&](int n, int k, const float (&values)[8]) {
               for (int i = 0; i < 8; ++i)
                 (product.kind_b == 0 ? b[k + i][n] : b[k][n + i]) = values[i];
             });
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 8 && product.kind_a < 0; ++e) {
      const uint32_t word = product.registers_a[lane][e / 2];
      a[lane / 4 + e / 2 % 2 * 8][lane % 4 * 2 + e / 4 * 8 + e % 2] =
          widen_bits(e % 2 ? word >> 16 : word & 0xffff, product.is_half);
    }
  if (product.kind_a >= 0)
    each_eight(product.a, product.kind_a, product.is_half, index_in_group * 16, 16,
               [&](int m, int k, const float (&values)[8]) {
                 for (int i = 0; i < 8; ++i)
                   (product.kind_a == 0 ? a[m % 16][k + i] : a[m % 16 + i][k]) = values[i];
               });
  const auto each = [&](auto run) {
    for (int lane = 0; lane < 32; ++lane) {
      const auto found = warp.in_flight.find({lane, product.d[lane]});
      float* values = found == warp.in_flight.end() ? product.d[lane] : found->second.values.data();
      for (int i = 0; i < N / 2; ++i)
        run(values[i], d[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
  };
  each([&](float& mine, float& place) { place = product.accumulate ? mine : 0.f; });
  multiply(d, a, b, N);
  each([&](float& mine, float& place) { mine = place; });
  product.done = true;
  for (int lane = 0; lane < 32; ++lane) {
    const auto found = warp.in_flight.find({lane, product.d[lane]});
    if (found == warp.in_flight.end() || --found->second.users) continue;
    std::copy(found->second.values.begin(), found->second.values.end(), product.d[lane]);
    warp.in_flight.erase(found);
  }
  ++cuda_on_cpu::events;
}

inline void perform_up_to(int warp, int end) {
  WarpProducts& products = product_warps[warp];
  for (; products.performed < end; ++products.performed)
    perform(products, products.products[products.performed], warp % 4);
}

struct WaitingWarp {
  int warp, end;
};
inline std::deque<WaitingWarp> waiting;

// Until the products of a warp up to `end` are done, which has met here.
inline void wait_for_products(int end) {
  const int warp = thread() / 32;
  if (!mode('w')) return perform_up_to(warp, end);
  if (cuda_on_cpu::running->lane == 0) waiting.push_back({warp, end});
  while (my_products().performed < end) cuda_on_cpu::yield();
}

inline void issue(Product product, float* d, const uint32_t* registers_a) {
  WarpProducts& warp = my_products();
  Lane& lane = my_lane();
  const int id = cuda_on_cpu::running->lane, index = lane.issued++;
  if (!lane.fenced) fail("wgmma_fence is missing before a wgmma");
  if (index == int(warp.products.size())) warp.products.push_back(product);
  Product& shared = warp.products[index];
  if (!shared.is_like(product)) fail("lanes of a warp issue different wgmmas");
  shared.d[id] = d;
  shared.registers_a[id] = registers_a;
  if (mode('w')) {
    Accumulator& held = warp.in_flight[{id, d}];
    if (held.users++ == 0) {
      held.values.assign(d, d + product.columns / 2);
      std::fill(d, d + product.columns / 2, std::numeric_limits<float>::quiet_NaN());
    }
  }
  if (++shared.issued == 32 && !mode('w')) perform_up_to(thread() / 32, index + 1);
}

}  // namespace hopper_on_cpu
}  // namespace slimkernels

#include "hopper_on_cpu_blocks.h"
#include "hopper_on_cpu_functions.h"
