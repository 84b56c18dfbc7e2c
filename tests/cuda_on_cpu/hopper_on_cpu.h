// What csrc/cuda/hopper.cuh wraps, for g++: each function does to bytes of shared memory what the
// PTX ISA says under the heading named there. Included by hopper.cuh instead of its own bodies.
//
// Asynchrony has two faces, chosen by letters in the environment's HOPPER_ON_CPU. "l": copies of
// TMA land when no thread can get on without them, with "r" the last first; else as they are
// issued. So do bulk copies to global memory: they read, and then write, when their thread waits
// for that and no other can get on. "w": wgmma reads and writes when its warp waits for it and no
// other thread can get on, and its registers are NaN until then; else as it is issued. So a wait, a
// barrier or a fence that is missing gives wrong numbers under one of them, or stops the kernel.
// wgmma works by warps, each with its 16 of the 64 rows, since a warp that waits knows nothing of
// the other three.
//
// A broken rule that a GPU would pass over in silence (a descriptor that does not fit its operand,
// shared memory written by stores and read by TMA without a proxy fence, warps of a group that do
// different things) is an error with a sentence.
#pragma once
#include <limits>

#include "cuda_on_cpu.h"
#include "hopper_on_cpu_state.h"

#undef __grid_constant__
#define __grid_constant__

namespace slimkernels {

using cuda_on_cpu::fail;

namespace hopper_on_cpu {

inline std::string letters;  // HOPPER_ON_CPU's, when the block started

inline bool mode(char letter) { return letters.find(letter) != std::string::npos; }

// Of the block, which is its own cluster.
inline int thread() { return cuda_on_cpu::running->index; }

// Where dynamic shared memory starts, as if 384 bytes of static shared memory lay before it.
constexpr uint32_t kSharedStart = 384;

SLIM_UNSANITIZED inline unsigned char* dynamic_start() {
  unsigned char*& start = state().shared_memory;
  if (!start) start = cuda_on_cpu::dynamic_shared<unsigned char>();
  return start;
}

SLIM_UNSANITIZED inline unsigned char* at(uint32_t address, int bytes) {
  if (address < kSharedStart || address + bytes > kSharedStart + cuda_on_cpu::dynamic_bytes)
    fail("shared memory has no address " + std::to_string(address));
  return dynamic_start() + (address - kSharedStart);
}

inline void check_fenced(uint32_t address) {
  const auto& unfenced = state().unfenced;
  if (unfenced.empty()) return;
  const auto found = unfenced.find(address / 16);
  if (found != unfenced.end())
    fail("fence_proxy_async is missing after a store of thread " + std::to_string(found->second));
}

// mbarrier.

constexpr uint64_t kLive = 0x6d62617272696572;  // whoever overwrites a barrier is found out

inline Phases& phases_of(const Mbarrier* barrier) {
  auto& barriers = state().barriers;
  const auto found = barriers.find(barrier);
  if (found == barriers.end() || barrier->bits != kLive)
    fail("an mbarrier is used that was not initialised, or overwritten");
  return found->second;
}

// TMA.

inline void land(const Transfer& load) {
  const int bytes = load.each_chunk([&](uint32_t address, unsigned char* global, int inside) {
    check_fenced(address);
    unsigned char* to = at(address, 16);
    std::memset(to, 0, 16);
    std::memcpy(to, global, inside * load.map.element);
  });
  Phases& phases = phases_of(load.barrier);
  phases.bytes -= bytes;
  phases.end_if_complete();
}

inline bool land_one() {
  auto& loads = state().loads;
  if (loads.empty()) return false;
  if (mode('r')) std::rotate(loads.begin(), loads.end() - 1, loads.end());
  land(loads.front());
  loads.pop_front();
  return true;
}

// wgmma.

inline WarpProducts& my_products() { return state().product_warps[thread() / 32]; }
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
  WarpProducts& products = state().product_warps[warp];
  for (; products.performed < end; ++products.performed)
    perform(products, products.products[products.performed], warp % 4);
}

// Until the products of a warp up to `end` are done, which has met here.
inline void wait_for_products(int end, cuda_on_cpu::Place place) {
  cuda_on_cpu::running->waits = place;
  const int warp = thread() / 32;
  if (!mode('w')) return perform_up_to(warp, end);
  if (cuda_on_cpu::running->lane == 0) state().waiting.push_back({warp, end});
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
