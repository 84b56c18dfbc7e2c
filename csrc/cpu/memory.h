// Memory for the length of a call, or an exception where there is none.
#pragma once
#include <cstdlib>

#include "../ops.h"

namespace slimkernels::SLIM_ISA {

// An array that lives as long as this object, of zeros if asked for. Not for use inside an OpenMP
// region, which no exception may leave.
template <typename T>
class Owned {
 public:
  Owned() = default;
  explicit Owned(int64_t count) { allocate(count); }
  Owned(const Owned&) = delete;
  ~Owned() { std::free(values_); }

  // At most once, for an object made without.
  void allocate(int64_t count, bool zeroed = false) {
    count += !count;  // malloc(0) may be null
    values_ = (T*)(zeroed ? std::calloc(count, sizeof(T)) : std::malloc(count * sizeof(T)));
    if (!values_) out_of_memory();
  }
  T* get() const { return values_; }
  T& operator[](int64_t i) const { return values_[i]; }

 private:
  T* values_ = nullptr;
};

}  // namespace slimkernels::SLIM_ISA
