#include "core/thread_work.h"
#include "cuda/kernels.h"

namespace autodrop::cuda {
namespace {

// 8 warps share a tile. Two blocks a multiprocessor is what ptxas may count on: told nothing, or
// three, it trades registers for spills on sm_80 to sm_120; and 512 threads with 128 bytes each in
// flight are 64 KiB, twice what latency times bandwidth of an H200's multiprocessor asks for.
constexpr int kThreads = 256;
constexpr int kBlocks = 2;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Switches to the plan's device and back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_;
};

// Calls work(chunk index, lane, lanes) for this thread's part of the block's tile.
template <class Work>
__device__ void for_chunks(const Tile& tile, const Work& work) {
  if (tile.num_chunks == 1) {
    work(tile.first_chunk, static_cast<int>(threadIdx.x), kThreads);
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (std::int64_t c = warp; c < tile.num_chunks; c += kThreads / kWarp) {
    work(tile.first_chunk + c, static_cast<int>(threadIdx.x) % kWarp, kWarp);
  }
}

// Sum over the warp in a fixed tree; valid in lane 0.
__device__ Sums warp_sum(Sums sums) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Sums other;
    other.dot = __shfl_down_sync(kAllLanes, sums.dot, offset);
    other.norm = __shfl_down_sync(kAllLanes, sums.norm, offset);
    other.previous_norm = __shfl_down_sync(kAllLanes, sums.previous_norm, offset);
    other.mean_norm = __shfl_down_sync(kAllLanes, sums.mean_norm, offset);
    thread_work::add_sums(sums, other);
  }
  return sums;
}

// Sum over the block, warp after warp; valid in thread 0.
__device__ Sums block_sum(Sums sums) {
  __shared__ Sums of_warp[kThreads / kWarp];
  sums = warp_sum(sums);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) thread_work::add_sums(sums, of_warp[w]);
  }
  return sums;
}

template <bool kDelta, bool kFirst, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocks)
    accumulate_kernel(const Chunk* chunks, const Tile* tiles, float* running, const float* mean,
                      float weight) {
  for_chunks(tiles[blockIdx.x], [&](std::int64_t c, int lane, int lanes) {
    thread_work::accumulate<kDelta, kFirst, kWeighted>(chunks[c], running, mean, weight, lane,
                                                       lanes);
  });
}

// Partial sums per chunk, each in its own slot: no atomics, the same bits run after run.
template <class Close>
__device__ void close_tile(const Tile& tile, Sums* partials, const Close& close) {
  if (tile.num_chunks == 1) {
    const Sums sums = block_sum(close(tile.first_chunk, static_cast<int>(threadIdx.x), kThreads));
    if (threadIdx.x == 0) partials[tile.first_chunk] = sums;
    return;
  }
  for_chunks(tile, [&](std::int64_t c, int lane, int lanes) {
    const Sums sums = warp_sum(close(c, lane, lanes));
    if (lane == 0) partials[c] = sums;
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    close_sum_kernel(const Chunk* chunks, const Tile* tiles, const float* running,
                     const float* previous, const float* before, Sums* partials) {
  close_tile(tiles[blockIdx.x], partials, [&](std::int64_t c, int lane, int lanes) {
    return thread_work::close_sum(chunks[c], running, previous, before, lane, lanes);
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    close_delta_kernel(const Chunk* chunks, const Tile* tiles, float* running, float* previous,
                       float* mean, double window, Sums* partials) {
  close_tile(tiles[blockIdx.x], partials, [&](std::int64_t c, int lane, int lanes) {
    return thread_work::close_delta(chunks[c], running, previous, mean, window, lane, lanes);
  });
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads, kBlocks)
    tensor_kernel(const std::int64_t* tensor_chunks, const Sums* partials,
                  double displacement_scale, double mean_scale, Sums* per_tensor) {
  const std::int64_t t = blockIdx.x;
  Sums sums =
      block_sum(thread_work::add_rows(partials, nullptr, tensor_chunks[t], tensor_chunks[t + 1],
                                      static_cast<int>(threadIdx.x), kThreads));
  if (threadIdx.x == 0) {
    sums.dot *= displacement_scale;
    sums.norm *= displacement_scale;
    sums.previous_norm *= displacement_scale;
    sums.mean_norm *= mean_scale;
    per_tensor[t] = sums;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads, kBlocks)
    total_kernel(const Sums* per_tensor, const double* weights, std::int64_t num_tensors,
                 Sums* total) {
  const Sums sums = block_sum(thread_work::add_rows(per_tensor, weights, 0, num_tensors,
                                                    static_cast<int>(threadIdx.x), kThreads));
  if (threadIdx.x == 0) *total = sums;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    write_back_kernel(const Chunk* chunks, const Tile* tiles, const float* arena, const float* mean,
                      double scale) {
  for_chunks(tiles[blockIdx.x], [&](std::int64_t c, int lane, int lanes) {
    thread_work::write_back(chunks[c], arena, mean, scale, lane, lanes);
  });
}

__global__ void nothing_kernel() {}

unsigned blocks(std::int64_t count) { return static_cast<unsigned>(count); }

template <bool kDelta, bool kFirst>
void launch_accumulate(const Plan& plan, float* running, const float* mean, float weight,
                       cudaStream_t stream) {
  if (weight == 1.0f) {
    accumulate_kernel<kDelta, kFirst, false><<<blocks(plan.num_tiles), kThreads, 0, stream>>>(
        plan.chunks, plan.tiles, running, mean, weight);
  } else {
    accumulate_kernel<kDelta, kFirst, true><<<blocks(plan.num_tiles), kThreads, 0, stream>>>(
        plan.chunks, plan.tiles, running, mean, weight);
  }
}

// The second and third pass of a close, and the one synchronisation of a window.
cudaError_t finish(const Plan& plan, double displacement_scale, double mean_scale,
                   const CloseBuffers& buffers, cudaStream_t stream) {
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (plan.num_tensors > 0) {
    tensor_kernel<<<blocks(plan.num_tensors), kThreads, 0, stream>>>(
        plan.tensor_chunks, buffers.partials, displacement_scale, mean_scale, buffers.per_tensor);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  total_kernel<<<1, kThreads, 0, stream>>>(buffers.per_tensor, plan.weights, plan.num_tensors,
                                           buffers.total);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (cudaError_t error = cudaMemcpyAsync(buffers.host_total, buffers.total, sizeof(Sums),
                                          cudaMemcpyDeviceToHost, stream);
      error != cudaSuccess) {
    return error;
  }
  return cudaStreamSynchronize(stream);
}

}  // namespace

cudaError_t accumulate(const Plan& plan, float* running, const float* mean, bool first,
                       float weight, cudaStream_t stream) {
  if (plan.num_tiles == 0) return cudaSuccess;
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (mean != nullptr) {
    first ? launch_accumulate<true, true>(plan, running, mean, weight, stream)
          : launch_accumulate<true, false>(plan, running, mean, weight, stream);
  } else {
    first ? launch_accumulate<false, true>(plan, running, mean, weight, stream)
          : launch_accumulate<false, false>(plan, running, mean, weight, stream);
  }
  return cudaGetLastError();
}

cudaError_t close_sum(const Plan& plan, const float* running, const float* previous,
                      const float* before, double window, const CloseBuffers& buffers,
                      cudaStream_t stream) {
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (plan.num_tiles > 0) {
    close_sum_kernel<<<blocks(plan.num_tiles), kThreads, 0, stream>>>(
        plan.chunks, plan.tiles, running, previous, before, buffers.partials);
  }
  const double scale = 1.0 / (window * window);
  return finish(plan, scale, scale, buffers, stream);
}

cudaError_t close_delta(const Plan& plan, float* running, float* previous, float* mean,
                        double window, const CloseBuffers& buffers, cudaStream_t stream) {
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (plan.num_tiles > 0) {
    close_delta_kernel<<<blocks(plan.num_tiles), kThreads, 0, stream>>>(
        plan.chunks, plan.tiles, running, previous, mean, window, buffers.partials);
  }
  return finish(plan, 1.0 / (window * window), 1.0, buffers, stream);
}

cudaError_t write_back(const Plan& plan, const float* arena, const float* mean, double scale,
                       cudaStream_t stream) {
  if (plan.num_tiles == 0) return cudaSuccess;
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  write_back_kernel<<<blocks(plan.num_tiles), kThreads, 0, stream>>>(plan.chunks, plan.tiles, arena,
                                                                     mean, scale);
  return cudaGetLastError();
}

cudaError_t probe(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  nothing_kernel<<<1, 1>>>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

}  // namespace autodrop::cuda
