// How CPU kernels share their rows among OpenMP threads.
//
// torch ships libgomp under its plain name, so this extension and torch share one thread pool; each
// call uses as many of it as torch would (bindings.cpp).
#pragma once
#include <omp.h>

#include <cstdint>

namespace slimkernels::SLIM_ISA {

// Below this many elements a thread, waking another costs more than it saves.
inline constexpr int64_t kGrain = 16384;

// No standard-library templates in files compiled for one instruction set: the linker keeps one
// copy of such a function for the whole extension, and it may be the AVX-512 one.
inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

inline int threads_for(int64_t elements) {
  return int(clamp(elements / kGrain, 1, omp_get_max_threads()));
}

// body(begin, end) over [0, rows) in equal parts.
template <typename Body>
void for_rows(int64_t rows, int64_t elements_per_row, Body body) {
  const int threads = threads_for(rows * elements_per_row);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part)
    body(rows * part / threads, rows * (part + 1) / threads);
}

// Rows are summed into partial gradients of weight and bias in chunks whose number depends on the
// shape alone: the result is the same bits for any number of threads.
inline int64_t chunks_for(int64_t rows) { return clamp(rows / 16, 1, 32); }

template <typename Body>
void for_chunks(int64_t rows, int64_t elements_per_row, Body body) {
  const int64_t chunks = chunks_for(rows);
#pragma omp parallel for num_threads(threads_for(rows* elements_per_row)) schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    body(chunk, rows * chunk / chunks, rows * (chunk + 1) / chunks);
}

}  // namespace slimkernels::SLIM_ISA
