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
