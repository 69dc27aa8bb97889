// The three operations over a whole plan on the CPU: chooses the instruction set, splits the chunks
// over threads, adds the partial sums in a fixed order.
#pragma once

#include "core/tables.h"
#include "cpu/kernels.h"

namespace autodrop::cpu {

// Raw views of a plan's tables.
struct Plan {
  const Chunk* chunks;  // [num_chunks], in the order of the arenas
  std::int64_t num_chunks;
  const std::int64_t* tensor_chunks;  // [num_tensors + 1], tensor t has chunks [t], [t + 1)
  const double* weights;              // [num_tensors], weight of a tensor in the total
  std::int64_t num_tensors;
};

// Bytes that must be read and written for each thread before another one is used. On cores that
// other processes use, such as those of a data loader, the threads of a team wait for each other
// until the system lets all of them run, 8 ms where it was measured, and so 4 MB on two threads
// took 200 times as long as on one. What a second thread gains on two quiet cores is 20 us at 8 MB
// where everything is in the caches, and 7 us where it is not: memory is as fast for one thread as
// for two. With 1 MiB here, 2 MB would be divided for a gain of 3 us.
constexpr std::int64_t kBytesPerThread = std::int64_t{4} << 20;

// Into how many threads of at most `num_threads` an operation that moves `bytes` is divided.
int useful_threads(std::int64_t bytes, int num_threads);

void accumulate(const Plan& plan, float* running, const float* mean, bool first, float weight,
                int num_threads, const Kernels* kernels);

// Sums of displacements and means, scaled. `partials` [num_chunks] is scratch, `per_tensor`
// [num_tensors] is unweighted; the weighted total is returned. The result does not depend on
// num_threads. See Kernels for what happens to the arenas.
Sums close_sum(const Plan& plan, const float* running, const float* previous, const float* before,
               double window, Sums* partials, Sums* per_tensor, int num_threads,
               const Kernels* kernels);
Sums close_delta(const Plan& plan, float* running, float* previous, float* mean, double window,
                 Sums* partials, Sums* per_tensor, int num_threads, const Kernels* kernels);

void write_back(const Plan& plan, const float* arena, const float* mean, double scale,
                int num_threads, const Kernels* kernels);

}  // namespace autodrop::cpu
