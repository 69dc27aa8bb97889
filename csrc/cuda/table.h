// The table's operations on one CUDA device: launches only. Every function enqueues on `stream`,
// allocates nothing, and returns the first error, of which the runtime keeps no memory. All
// addresses are of device memory, those of tables aligned to 16 bytes. Nothing waits for the stream
// but probe.
#pragma once

#include <cuda_runtime_api.h>

#include "core/tables.h"

namespace autodrop::cuda {

// Adds pieces to a sketch: one launch, or two where `splits` blocks share a row.
struct Accumulate {
  const Piece* pieces;       // sorted by (row, swap)
  const std::int64_t* runs;  // [num_rows * 8 + 1]
  std::int64_t num_rows;
  std::int64_t splits;        // at least 1; block s has pieces s, s + splits, ... of every run
  const std::int64_t* bases;  // [num_tensors]
  double* partials;           // [splits, num_rows * kLanes], overwritten; not used if splits is 1
  double* table;              // [num_rows * kLanes]
};
cudaError_t accumulate(int device, const Accumulate& work, cudaStream_t stream);

// Adds spans to a table that has a bucket for every element: one launch.
cudaError_t accumulate_exact(int device, const Span* spans, std::int64_t num_spans,
                             const std::int64_t* bases, double* table, cudaStream_t stream);

// Closes a window: m = running / divisor, s = m - mean, then displacement = s, mean = m,
// running = 0. One launch.
struct Close {
  double* running;  // [n]
  double* mean;
  double* displacement;
  double divisor;
  const std::int64_t* blocks;  // [num_blocks, 2]: begin and end of what one block adds up
  std::int64_t num_blocks;
  double* block_sums;  // [num_blocks, 2]: of s times the old displacement, and of s squared
};
// The caller waits for block_sums, which a capture does not survive: in a capture this returns
// cudaErrorStreamCaptureUnsupported, and the capture goes on.
cudaError_t close(int device, const Close& work, cudaStream_t stream);

// Loads every kernel and launches one that does nothing: whether this binary has code for a device,
// and what makes a capture possible from the first step on. Waits for the default stream.
cudaError_t probe(int device);

}  // namespace autodrop::cuda
