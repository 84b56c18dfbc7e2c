// Of hopper_on_cpu.h: barriers by name, setmaxnreg, and what a block must not leave behind.
#pragma once

namespace slimkernels::hopper_on_cpu {

struct NamedBarrier {
  int arrived = 0, threads = 0, waiting = 0;
  unsigned rounds = 0;
};

inline std::array<NamedBarrier, 16> named;
inline std::vector<std::vector<int>> registers;  // what each thread set

inline void arrive(int barrier, int threads, bool waits) {
  if (barrier < 1 || barrier > 15 || threads % 32) fail("a named barrier has 1 to 15 for a name");
  NamedBarrier& it = named[barrier];
  if (it.arrived == 0) it.threads = threads;
  if (it.threads != threads) fail("threads of one named barrier count differently");
  it.waiting += waits;
  if (++it.arrived < threads) return;
  if (it.waiting == 0) fail("nobody waits at a named barrier at which all have arrived");
  it.arrived = it.waiting = 0;
  ++it.rounds;
  ++cuda_on_cpu::events;
}

inline void set_registers(int count) {
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg takes multiples of 8, 24 to 256");
  registers[thread()].push_back(count);
}

// Nothing gets on: one load lands, or else one warp's products are done.
inline bool do_late() {
  if (land_one()) return true;
  if (waiting.empty()) return false;
  perform_up_to(waiting.front().warp, waiting.front().end);
  waiting.pop_front();
  return true;
}

inline void start_block(int threads) {
  barriers.clear();
  unfenced.clear();
  loads.clear();
  waiting.clear();
  shared_memory = nullptr;
  const char* wanted = std::getenv("HOPPER_ON_CPU");
  letters = wanted ? wanted : "";
  named.fill({});
  product_warps.assign((threads + 31) / 32, {});
  registers.assign(threads, {});
}

// A sentence, or nothing.
inline std::string left_behind() {
  if (!loads.empty()) return "a block ends before its copies have landed";
  for (const NamedBarrier& barrier : named)
    if (barrier.arrived) return "a named barrier is left with threads that arrived at it";
  int total = 0;
  for (size_t t = 0; t < registers.size(); t += 128) {
    for (size_t i = t; i < std::min(registers.size(), t + 128); ++i)
      if (registers[i] != registers[t]) return "setmaxnreg: not all warps of a group take part";
    total += registers[t].empty() ? 0 : registers[t].back() * 128;
  }
  // What the launch gave all threads alike, in units of 8 a thread; setmaxnreg hands out no others.
  const int given = 65536 / int(registers.size()) / 8 * 8 * int(registers.size());
  if (total > given) return "setmaxnreg: more registers than the block started with, a hang";
  for (size_t w = 0; w < product_warps.size(); ++w) {
    const WarpProducts& warp = product_warps[w];
    if (warp.performed < int(warp.products.size()) && mode('w'))
      return "a block ends before its wgmmas are waited for";
    if (warp.products.size() != product_warps[w / 4 * 4].products.size())
      return "warps of a group issue different numbers of wgmmas";
    for (size_t i = 0; i < warp.products.size(); ++i)
      if (!warp.products[i].is_like(product_warps[w / 4 * 4].products[i]))
        return "warps of a group issue different wgmmas";
  }
  return "";
}

inline const bool installed = [] {
  cuda_on_cpu::at_start = start_block;
  cuda_on_cpu::at_end = left_behind;
  cuda_on_cpu::when_idle = do_late;
  return true;
}();

}  // namespace slimkernels::hopper_on_cpu
