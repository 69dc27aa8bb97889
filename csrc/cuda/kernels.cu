#include <type_traits>

#include "core/thread_work.h"
#include "cuda/kernels.h"

namespace autodrop::cuda {
namespace {

using thread_work::load_row;

// 8 warps share a tile. Two blocks a multiprocessor is what ptxas may count on: told nothing, or
// three, it trades registers for spills on sm_80 to sm_120; and 512 threads with 128 bytes each in
// flight are 64 KiB, twice what latency times bandwidth of an H200's multiprocessor asks for.
constexpr int kThreads = 256;
constexpr int kBlocks = 2;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The runtime keeps the last error of a thread and reports it to whoever asks next, torch among
// them. Whoever gets the error from here needs no second report.
cudaError_t settled(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Switches to the plan's device and back. The caller has made that device current where going back
// could make a context on another one (autodrop_ext/ops/streams.py); here it costs one query.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = settled(cudaGetDevice(&previous_));
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = settled(cudaSetDevice(device));
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) settled(cudaSetDevice(previous_));
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
__device__ void for_chunks(const Tile tile, const Work& work) {
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
  for_chunks(load_row(tiles + blockIdx.x), [&](std::int64_t c, int lane, int lanes) {
    thread_work::accumulate<kDelta, kFirst, kWeighted>(load_row(chunks + c), running, mean, weight,
                                                       lane, lanes);
  });
}

// Partial sums per chunk, each in its own slot: no atomics, the same bits run after run.
template <class Close>
__device__ void close_tile(const Tile tile, Sums* partials, const Close& close) {
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
  close_tile(load_row(tiles + blockIdx.x), partials, [&](std::int64_t c, int lane, int lanes) {
    return thread_work::close_sum(load_row(chunks + c), running, previous, before, lane, lanes);
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    close_delta_kernel(const Chunk* chunks, const Tile* tiles, float* running, float* previous,
                       float* mean, double window, Sums* partials) {
  close_tile(load_row(tiles + blockIdx.x), partials, [&](std::int64_t c, int lane, int lanes) {
    return thread_work::close_delta(load_row(chunks + c), running, previous, mean, window, lane,
                                    lanes);
  });
}

// One block per row of the sums.
__global__ void __launch_bounds__(kThreads, kBlocks)
    row_kernel(const std::int64_t* row_chunks, const Sums* partials, double displacement_scale,
               double mean_scale, Sums* per_row) {
  const std::int64_t r = blockIdx.x;
  Sums sums = block_sum(thread_work::add_rows(partials, nullptr, row_chunks[r], row_chunks[r + 1],
                                              static_cast<int>(threadIdx.x), kThreads));
  if (threadIdx.x == 0) {
    sums.dot *= displacement_scale;
    sums.norm *= displacement_scale;
    sums.previous_norm *= displacement_scale;
    sums.mean_norm *= mean_scale;
    per_row[r] = sums;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads, kBlocks)
    total_kernel(const Sums* per_row, const double* weights, std::int64_t num_rows, Sums* total) {
  const Sums sums = block_sum(thread_work::add_rows(per_row, weights, 0, num_rows,
                                                    static_cast<int>(threadIdx.x), kThreads));
  if (threadIdx.x == 0) *total = sums;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    write_back_kernel(const Chunk* chunks, const Tile* tiles, const float* arena, const float* mean,
                      double scale) {
  for_chunks(load_row(tiles + blockIdx.x), [&](std::int64_t c, int lane, int lanes) {
    thread_work::write_back(load_row(chunks + c), arena, mean, scale, lane, lanes);
  });
}

__global__ void nothing_kernel() {}

template <class... P>
cudaError_t launch(void (*kernel)(P...), std::int64_t blocks, cudaStream_t stream,
                   std::common_type_t<P>... arguments) {
  void* pointers[] = {&arguments..., nullptr};
  return settled(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                  pointers, 0, stream));
}

template <bool kDelta, bool kFirst>
cudaError_t launch_accumulate(const Plan& plan, float* running, const float* mean, float weight,
                              cudaStream_t stream) {
  const auto kernel = weight == 1.0f ? accumulate_kernel<kDelta, kFirst, false>
                                     : accumulate_kernel<kDelta, kFirst, true>;
  return launch(kernel, plan.num_tiles, stream, plan.chunks, plan.tiles, running, mean, weight);
}

// Calls visit(kernel) for every kernel that a step, a close or a write-back launches.
template <class Visit>
cudaError_t for_kernels(const Visit& visit) {
  cudaError_t error = cudaSuccess;
  const auto next = [&](auto* kernel) {
    if (error == cudaSuccess) error = visit(kernel);
  };
  next(accumulate_kernel<false, false, false>);
  next(accumulate_kernel<false, false, true>);
  next(accumulate_kernel<false, true, false>);
  next(accumulate_kernel<false, true, true>);
  next(accumulate_kernel<true, false, false>);
  next(accumulate_kernel<true, false, true>);
  next(accumulate_kernel<true, true, false>);
  next(accumulate_kernel<true, true, true>);
  next(close_sum_kernel);
  next(close_delta_kernel);
  next(row_kernel);
  next(total_kernel);
  next(write_back_kernel);
  return error;
}

// A close waits for its stream, which a capture would not survive: it is refused before it harms.
cudaError_t refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaError_t error = settled(cudaStreamIsCapturing(stream, &status)); error != cudaSuccess) {
    return error;
  }
  return status == cudaStreamCaptureStatusNone ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

// The second and third pass of a close, and the one synchronisation of a window.
cudaError_t finish(const Plan& plan, double displacement_scale, double mean_scale,
                   const CloseBuffers& buffers, cudaStream_t stream) {
  if (plan.num_rows > 0) {
    if (cudaError_t error =
            launch(row_kernel, plan.num_rows, stream, plan.row_chunks, buffers.partials,
                   displacement_scale, mean_scale, buffers.per_row);
        error != cudaSuccess) {
      return error;
    }
  }
  if (cudaError_t error = launch(total_kernel, 1, stream, buffers.per_row, plan.row_weights,
                                 plan.num_rows, buffers.total);
      error != cudaSuccess) {
    return error;
  }
  if (cudaError_t error = settled(cudaMemcpyAsync(buffers.host_total, buffers.total, sizeof(Sums),
                                                  cudaMemcpyDeviceToHost, stream));
      error != cudaSuccess) {
    return error;
  }
  return settled(cudaStreamSynchronize(stream));
}

}  // namespace

cudaError_t accumulate(const Plan& plan, float* running, const float* mean, bool first,
                       float weight, cudaStream_t stream) {
  if (plan.num_tiles == 0) return cudaSuccess;
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (mean != nullptr) {
    return first ? launch_accumulate<true, true>(plan, running, mean, weight, stream)
                 : launch_accumulate<true, false>(plan, running, mean, weight, stream);
  }
  return first ? launch_accumulate<false, true>(plan, running, mean, weight, stream)
               : launch_accumulate<false, false>(plan, running, mean, weight, stream);
}

cudaError_t close_sum(const Plan& plan, const float* running, const float* previous,
                      const float* before, double window, const CloseBuffers& buffers,
                      cudaStream_t stream) {
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (cudaError_t error = refuse_capture(stream); error != cudaSuccess) return error;
  if (plan.num_tiles > 0) {
    if (cudaError_t error = launch(close_sum_kernel, plan.num_tiles, stream, plan.chunks,
                                   plan.tiles, running, previous, before, buffers.partials);
        error != cudaSuccess) {
      return error;
    }
  }
  const double scale = 1.0 / (window * window);
  return finish(plan, scale, scale, buffers, stream);
}

cudaError_t close_delta(const Plan& plan, float* running, float* previous, float* mean,
                        double window, const CloseBuffers& buffers, cudaStream_t stream) {
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (cudaError_t error = refuse_capture(stream); error != cudaSuccess) return error;
  if (plan.num_tiles > 0) {
    if (cudaError_t error = launch(close_delta_kernel, plan.num_tiles, stream, plan.chunks,
                                   plan.tiles, running, previous, mean, window, buffers.partials);
        error != cudaSuccess) {
      return error;
    }
  }
  return finish(plan, 1.0 / (window * window), 1.0, buffers, stream);
}

cudaError_t write_back(const Plan& plan, const float* arena, const float* mean, double scale,
                       cudaStream_t stream) {
  if (plan.num_tiles == 0) return cudaSuccess;
  const DeviceGuard guard(plan.device);
  if (guard.error() != cudaSuccess) return guard.error();
  return launch(write_back_kernel, plan.num_tiles, stream, plan.chunks, plan.tiles, arena, mean,
                scale);
}

cudaError_t probe_arenas(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  // By default CUDA loads a kernel at its first launch, which is an error inside a capture.
  const cudaError_t error = for_kernels([](auto* kernel) {
    cudaFuncAttributes attributes;
    return settled(cudaFuncGetAttributes(&attributes, kernel));
  });
  if (error != cudaSuccess) return error;
  if (cudaError_t launched = launch(nothing_kernel, 1, nullptr); launched != cudaSuccess) {
    return launched;
  }
  return settled(cudaStreamSynchronize(nullptr));
}

}  // namespace autodrop::cuda
