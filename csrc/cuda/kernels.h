// The three operations on one CUDA device: launches only. Every function enqueues on `stream`,
// allocates nothing, and returns the first error, of which the runtime keeps no memory. Only
// close_* waits for the stream; a stream that is being captured is refused with
// cudaErrorStreamCaptureUnsupported, and its capture goes on.
#pragma once

#include <cuda_runtime_api.h>

#include "core/tables.h"

namespace autodrop::cuda {

// Raw views of a plan's tables, all in device memory.
struct Plan {
  int device;
  const Chunk* chunks;  // [num_chunks]
  const Tile* tiles;    // [num_tiles]
  std::int64_t num_tiles;
  const std::int64_t* row_chunks;  // [num_rows + 1], row r of the sums has chunks [r] to [r + 1]
  const double* row_weights;       // [num_rows]
  std::int64_t num_rows;           // tensors, or in a sampled plan chunks
};

// Where a close puts its sums.
struct CloseBuffers {
  Sums* partials;    // [num_chunks], device: one fixed slot per chunk
  Sums* per_row;     // [num_rows], device: unweighted
  Sums* total;       // [1], device: weighted
  Sums* host_total;  // [1], pinned host memory
};

cudaError_t accumulate(const Plan& plan, float* running, const float* mean, bool first,
                       float weight, cudaStream_t stream);
cudaError_t close_sum(const Plan& plan, const float* running, const float* previous,
                      const float* before, double window, const CloseBuffers& buffers,
                      cudaStream_t stream);
cudaError_t close_delta(const Plan& plan, float* running, float* previous, float* mean,
                        double window, const CloseBuffers& buffers, cudaStream_t stream);
cudaError_t write_back(const Plan& plan, const float* arena, const float* mean, double scale,
                       cudaStream_t stream);

// Loads every kernel and launches one that does nothing: whether this binary has code for a device,
// and what makes a capture possible from the first step on.
cudaError_t probe_arenas(int device);

}  // namespace autodrop::cuda
