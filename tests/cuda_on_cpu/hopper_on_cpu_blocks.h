// Of hopper_on_cpu.h: barriers by name, setmaxnreg, bulk copies, and what a block must not leave
// behind.
#pragma once

namespace slimkernels::hopper_on_cpu {

inline void arrive(int barrier, int threads, bool waits) {
  if (barrier < 1 || barrier > 15 || threads % 32) fail("a named barrier has 1 to 15 for a name");
  NamedBarrier& it = state().named[barrier];
  if (it.arrived == 0) it.threads = threads;
  if (it.threads != threads) fail("threads of one named barrier count differently");
  it.waiting += waits;
  if (++it.arrived < threads) return;
  if (it.waiting == 0) fail("nobody waits at a named barrier at which all have arrived");
  it.arrived = it.waiting = 0;
  ++it.rounds;
  ++cuda_on_cpu::events;
}

// Bulk copies to global memory. Those a thread waits for are done one after another, each in two
// steps.

inline void read_bulk(BulkCopy& copy) {
  copy.values.resize(copy.bytes / 4);
  std::memcpy(copy.values.data(), at(copy.shared, copy.bytes), copy.bytes);
  copy.is_read = true;
}

inline void write_bulk(const BulkCopy& copy) {
  for (size_t i = 0; i < copy.values.size(); ++i)
    copy.global[i] = copy.adds ? copy.global[i] + copy.values[i] : copy.values[i];
}

inline void issue_bulk(float* to, uint32_t shared, int bytes, bool adds) {
  if (bytes <= 0 || bytes % 16 || shared % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    fail("a bulk copy wants 16-byte boundaries");
  for (int byte = 0; byte < bytes; byte += 16) check_fenced(shared + byte);
  BulkCopy copy{to, shared, bytes, adds};
  if (!mode('l')) {
    read_bulk(copy);
    write_bulk(copy);
  }
  state().bulk_copies[thread()].issued.push_back(std::move(copy));
  ++cuda_on_cpu::events;
}

inline void wait_for_bulk(bool for_all, cuda_on_cpu::Place place) {
  BulkCopies& copies = state().bulk_copies[thread()];
  if (!mode('l')) {
    if (for_all) copies.committed.clear();
    return;
  }
  cuda_on_cpu::running->waits = place;
  (for_all ? copies.awaits_all : copies.awaits_read) = true;
  while (copies.awaits_all || copies.awaits_read) cuda_on_cpu::yield();
}

// One step of a thread that waits: all is read, or what was read first is written.
inline bool copy_bulk_late() {
  for (auto& [thread, copies] : state().bulk_copies) {
    if (!copies.awaits_read && !copies.awaits_all) continue;
    const bool is_read = std::all_of(copies.committed.begin(), copies.committed.end(),
                                     [](const BulkCopy& copy) { return copy.is_read; });
    if (!is_read)
      for (BulkCopy& copy : copies.committed) read_bulk(copy);
    copies.awaits_read = false;
    if (is_read && !copies.committed.empty()) {
      write_bulk(copies.committed.front());
      copies.committed.pop_front();
    }
    if (copies.committed.empty()) copies.awaits_all = false;
    return true;
  }
  return false;
}

inline void set_registers(int count) {
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg takes multiples of 8, 24 to 256");
  state().registers[thread()].push_back(count);
}

// Nothing gets on: one load lands, or else one warp's products are done, or else one thread's bulk
// copies get on.
inline bool do_late() {
  if (land_one()) return true;
  auto& waiting = state().waiting;
  if (waiting.empty()) return copy_bulk_late();
  perform_up_to(waiting.front().warp, waiting.front().end);
  waiting.pop_front();
  return true;
}

inline void start_block(int threads) {
  const char* wanted = std::getenv("HOPPER_ON_CPU");
  letters = wanted ? wanted : "";
  cuda_on_cpu::here->more = std::make_shared<BlockState>();
  state().product_warps.resize((threads + 31) / 32);
  state().registers.resize(threads);
}

// A sentence, or nothing.
inline std::string left_behind() {
  const BlockState& block = state();
  const auto& registers = block.registers;
  const auto& product_warps = block.product_warps;
  if (!block.loads.empty()) return "a block ends before its copies have landed";
  for (const NamedBarrier& barrier : block.named)
    if (barrier.arrived) return "a named barrier is left with threads that arrived at it";
  for (const auto& [thread, copies] : block.bulk_copies)
    if (!copies.issued.empty() || !copies.committed.empty())
      return "a block ends before its bulk copies are waited for";
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
