// CUDA's extensions of C++ that csrc/cuda/table.cu and csrc/core use, by means of the emulator.
// Included before them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define AUTODROP_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define __syncthreads() ::emulator::barrier(__LINE__)
#define __shfl_down_sync(mask, value, offset) \
  ::emulator::shuffle_down_value(mask, value, offset, __LINE__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_) : x(x_) {}  // NOLINT: implicit in CUDA
};

inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// Operations on float32 that round once each. The flags of tests/emulated.py forbid to fuse them.
static_assert(FLT_EVAL_METHOD == 0, "float32 is not computed in float32");
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

struct alignas(8) float2 {
  float x, y;
};
inline float2 __fadd2_rn(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
inline float2 __ffma2_rn(float2 a, float2 b, float2 c) {
  return {std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y)};
}

inline void* __cvta_global_to_generic(std::size_t address) {
  return reinterpret_cast<void*>(address);
}

namespace emulator {

template <class T>
T shuffle_down_value(unsigned mask, T value, int offset, int site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  std::uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  raw = shuffle_down(mask, raw, static_cast<unsigned>(offset), site);
  std::memcpy(&value, &raw, sizeof(T));
  return value;
}

template <class... P, std::size_t... i>
std::function<void()> bound(void (*kernel)(P...), void** arguments, std::index_sequence<i...>) {
  return [kernel, copies = std::tuple<P...>(*static_cast<P*>(arguments[i])...)] {
    std::apply(kernel, copies);
  };
}

}  // namespace emulator

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                             std::size_t, cudaStream_t stream) {
  return emulator::launch(reinterpret_cast<const void*>(kernel), grid.x, block.x, stream,
                          emulator::bound(kernel, arguments, std::index_sequence_for<P...>{}));
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  attributes->maxThreadsPerBlock = 1024;
  return emulator::load(reinterpret_cast<const void*>(kernel));
}
