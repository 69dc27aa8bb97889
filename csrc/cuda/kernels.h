// The three operations on one CUDA device: launches only. Every function enqueues on `stream`,
// allocates nothing, and returns what the launch returned; only close_* waits for the stream.
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
  const std::int64_t* tensor_chunks;  // [num_tensors + 1], tensor t has chunks [t], [t + 1)
  const double* weights;              // [num_tensors]
  std::int64_t num_tensors;
};

// Where a close puts its sums.
struct CloseBuffers {
  Sums* partials;    // [num_chunks], device: one fixed slot per chunk
  Sums* per_tensor;  // [num_tensors], device: unweighted
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

// Launches a kernel that does nothing: whether this binary has code for a device.
cudaError_t probe(int device);

}  // namespace autodrop::cuda
