// The functions of csrc/cuda/hopper.cuh and wgmma.cuh, by the names that kernels know them by;
// hopper_on_cpu.h is what they stand on.
#pragma once

namespace slimkernels {

inline uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  return hopper_on_cpu::kSharedStart + uint32_t(byte - hopper_on_cpu::dynamic_start());
}

inline unsigned char* aligned_shared() {
  const uint32_t start = hopper_on_cpu::kSharedStart;
  return hopper_on_cpu::dynamic_start() + (1024 - start % 1024) % 1024;
}

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  hopper_on_cpu::at(shared_address(barrier), 8);
  barrier->bits = hopper_on_cpu::kLive;
  hopper_on_cpu::state().barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}

inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  auto& phases = hopper_on_cpu::phases_of(barrier);
  if (--phases.pending < 0) fail("more threads arrive at an mbarrier than it was made for");
  phases.bytes += bytes;
  phases.end_if_complete();
}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_arrive_expect(barrier, 0); }

inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity,
                          cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::running->waits = place;
  while (hopper_on_cpu::phases_of(barrier).parity == parity) cuda_on_cpu::yield();
}

inline void named_barrier_arrive(int barrier, int threads) {
  hopper_on_cpu::arrive(barrier, threads, false);
}
inline void named_barrier_sync(int barrier, int threads,
                               cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  const unsigned round = hopper_on_cpu::state().named[barrier].rounds;
  cuda_on_cpu::running->waits = place;
  hopper_on_cpu::arrive(barrier, threads, true);
  while (round == hopper_on_cpu::state().named[barrier].rounds) cuda_on_cpu::yield();
}

template <int kRegisters>
void registers_grow() {
  hopper_on_cpu::set_registers(kRegisters);
}
template <int kRegisters>
void registers_shrink() {
  hopper_on_cpu::set_registers(kRegisters);
}

inline void store_words(void* to, const void* words, int bytes) {
  std::memcpy(to, words, bytes);
  hopper_on_cpu::state().unfenced[shared_address(to) / 16] = hopper_on_cpu::thread();
}
inline void store_shared(void* to, uint4 value) { store_words(to, &value, 16); }
inline void fence_proxy_async() {
  auto& unfenced = hopper_on_cpu::state().unfenced;
  for (auto it = unfenced.begin(); it != unfenced.end();)
    it = it->second == hopper_on_cpu::thread() ? unfenced.erase(it) : std::next(it);
}

inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  const int lane = cuda_on_cpu::running->lane;
  for (int matrix = 0; matrix < 4; ++matrix) {
    auto* const at = cuda_on_cpu::exchange(static_cast<unsigned char*>(row), matrix * 8 + lane / 4);
    store_words(at + lane % 4 * 4, &words[matrix], 4);
  }
}

// Bulk copies.

inline void bulk_store(float* to, const void* from, int bytes) {
  hopper_on_cpu::issue_bulk(to, shared_address(from), bytes, false);
}
inline void bulk_add(float* to, const void* from, int bytes) {
  hopper_on_cpu::issue_bulk(to, shared_address(from), bytes, true);
}
inline void bulk_commit() {
  auto& copies = hopper_on_cpu::state().bulk_copies[hopper_on_cpu::thread()];
  for (auto& copy : copies.issued) copies.committed.push_back(std::move(copy));
  copies.issued.clear();
}
inline void bulk_wait_read(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  hopper_on_cpu::wait_for_bulk(false, place);
}
inline void bulk_wait(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  hopper_on_cpu::wait_for_bulk(true, place);
}

inline void wait_turn(const int* passed, int turn,
                      cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::running->waits = place;
  while (*passed < turn) cuda_on_cpu::yield();
}
inline void pass_turn(int* passed) {
  ++*passed;
  ++cuda_on_cpu::events;
}

// TMA.

inline void prefetch_map(const TensorMap*) {}

template <typename... C>
void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, C... c) {
  if (sizeof...(c) != map->rank) fail("a box has as many coordinates as its tensor");
  const uint32_t address = shared_address(to);
  if (address % 128) fail("TMA wants 128-byte boundaries in shared memory");
  const hopper_on_cpu::Transfer transfer{*map, address, barrier, {int(c)...}};
  if (hopper_on_cpu::mode('l'))
    hopper_on_cpu::state().loads.push_back(transfer);
  else
    hopper_on_cpu::land(transfer);
  ++cuda_on_cpu::events;
}

template <typename T, size_t kRank>
TensorMap tensor_map(const T* start, std::array<int64_t, kRank> sizes,
                     std::array<int64_t, kRank - 1> strides, std::array<int, kRank> box) {
  TensorMap map;
  map.start = reinterpret_cast<unsigned char*>(const_cast<T*>(start));
  map.element = sizeof(T);
  map.rank = kRank;
  bool fits = reinterpret_cast<uintptr_t>(start) % 16 == 0 && box[0] * sizeof(T) % 16 == 0;
  fits = fits && box[0] * sizeof(T) <= 128;
  for (size_t d = 0; d < kRank; ++d) {
    map.sizes[d] = sizes[d];
    map.box[d] = box[d];
    map.strides[d] = (d == 0 ? 1 : strides[d - 1]) * int64_t(sizeof(T));
    fits = fits && sizes[d] >= 1 && box[d] >= 1 && box[d] <= 256;
    fits = fits && (d == 0 || (map.strides[d] % 16 == 0 && map.strides[d] < int64_t(1) << 40));
  }
  if (!fits) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this tensor");
  return map;
}

// wgmma.

inline void wgmma_fence() { hopper_on_cpu::my_lane().fenced = true; }

inline void wgmma_commit() {
  auto& lane = hopper_on_cpu::my_lane();
  auto& ends = hopper_on_cpu::my_products().group_ends;
  if (int(ends.size()) == lane.committed) ends.push_back(lane.issued);
  if (ends[lane.committed++] != lane.issued) fail("lanes of a warp commit different wgmmas");
}

template <int kPending>
void wgmma_wait(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::wait(*cuda_on_cpu::running->warp, place);
  auto& lane = hopper_on_cpu::my_lane();
  lane.fenced = false;  // registers may be touched now
  const int groups = lane.committed - kPending;
  if (groups > 0)
    hopper_on_cpu::wait_for_products(hopper_on_cpu::my_products().group_ends[groups - 1], place);
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

template <typename T, int kA, int kB, int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  hopper_on_cpu::issue({2 * kCount, kA, kB, kIsHalf<T>, accumulate, a, b}, d, nullptr);
}
template <typename T, int kB, int kCount>
void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  hopper_on_cpu::issue({2 * kCount, -1, kB, kIsHalf<T>, accumulate, 0, b}, d, a);
}

template <typename X>
void fence_registers(X&) {}

inline float reciprocal_approximate(float x) { return 1.f / x; }

}  // namespace slimkernels
