// Runs csrc/cuda/softmax.cuh on the CPU for test_cuda_on_cpu.py: arrays come and go through files.
//
//     program forward  DTYPE M N PERIOD SCALE x y
//     program backward DTYPE M N SCALE dy y dx
//
// Each array has an allocation of its own of exactly its size, so that AddressSanitizer sees a
// kernel that leaves it. An odd OFFSET in the environment shifts it off the 16-byte boundary.
#include <fstream>
#include <iostream>
#include <string>

#include "softmax.cuh"

using namespace slimkernels;

template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), offset_(std::getenv("OFFSET") ? 1 : 0) {
    bytes_ = static_cast<char*>(std::malloc((size + offset_) * sizeof(T)));
    std::memset(bytes_, 0xff, (size + offset_) * sizeof(T));  // NaN
  }
  ~Array() { std::free(bytes_); }
  Array(const Array&) = delete;

  T* values() { return reinterpret_cast<T*>(bytes_) + offset_; }
  void read(const char* path) {
    std::ifstream(path, std::ios::binary).read((char*)values(), size_ * sizeof(T));
  }
  void write(const char* path) {
    std::ofstream(path, std::ios::binary).write((char*)values(), size_ * sizeof(T));
  }

 private:
  int64_t size_, offset_;
  char* bytes_;
};

int main(int argc, char** argv) {
  const std::string direction = argv[1];
  const int64_t M = std::atoll(argv[3]), N = std::atoll(argv[4]);
  try {
    with_type(std::atoi(argv[2]), [&](auto zero) {
      using T = decltype(zero);
      Array<T> a(M * N), b(M * N), c(M * N);
      if (direction == "forward") {
        a.read(argv[7]);
        const float scale = std::atof(argv[6]);
        softmax_forward_rows(a.values(), b.values(), M, N, std::atoll(argv[5]), scale, nullptr);
        b.write(argv[8]);
      } else {
        a.read(argv[6]);
        b.read(argv[7]);
        const float scale = std::atof(argv[5]);
        softmax_backward_rows(a.values(), b.values(), c.values(), M, N, scale, nullptr);
        c.write(argv[8]);
      }
    });
  } catch (const std::runtime_error& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
