// The loops over a range of chunks, compiled once per instruction set (see CMakeLists.txt) and
// chosen at run time. They are single-threaded and give the same bits for every instruction set.
#pragma once

#include "core/tables.h"

namespace autodrop::cpu {

struct Kernels {
  const char* isa;
  // running (=|+=) weight * x, or weight * (x - mean) where mean is not null. `stream` writes a
  // first step past the cache.
  void (*accumulate)(const Chunk* begin, const Chunk* end, float* running, const float* mean,
                     bool first, float weight, bool stream);
  // Unscaled sums per chunk: of A - P, P - PP and A.
  void (*close_sum)(const Chunk* begin, const Chunk* end, const float* running,
                    const float* previous, const float* before, Sums* out);
  // Unscaled sums per chunk: of A and S, and of the new mean. See core/delta.h for the arenas.
  void (*close_delta)(const Chunk* begin, const Chunk* end, float* running, float* previous,
                      float* mean, double window, Sums* out);
  // x = mean + scale * arena, or scale * arena where mean is null.
  void (*write_back)(const Chunk* begin, const Chunk* end, const float* arena, const float* mean,
                     double scale);
};

// The widest set that this processor runs; `name` asks for one and gives nullptr if it is absent.
const Kernels* best_kernels();
const Kernels* kernels_named(const char* name);

}  // namespace autodrop::cpu
