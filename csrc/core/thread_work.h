// What one thread of a GPU block does, as host and device code: csrc/tests/test_threads.cpp runs
// exactly this on the CPU for every block and thread of the real launch shapes.
//
// A thread is `lane` of `lanes` that share a chunk: a whole block for a large chunk, a warp for a
// small one. Neighbouring lanes touch neighbouring 16-byte packets, and a lane has several packets
// in flight before it uses the first, because the latency of device memory is hundreds of cycles.
// Arenas are aligned to 128 bytes; parameters may start anywhere.
#pragma once

#include <cstdint>

#include "core/delta.h"
#include "core/numeric.h"
#include "core/tables.h"

namespace autodrop::thread_work {

// `kCount` elements that are loaded and stored 16 bytes at a time.
template <class T, int kCount>
struct alignas(16) Packet {
  T element[kCount];
};

// Elements per packet: 16 bytes of half precision, of float32, and twice 16 bytes of float64.
template <class T>
constexpr int kPacket = sizeof(T) == 2 ? 8 : 4;

// Packets in flight: 16 elements in sum form, 8 in delta form, which also holds means. Twice as
// many made ptxas spill on sm_80.
template <class T, bool kDelta>
constexpr int kInFlight = (kDelta ? 8 : 16) / kPacket<T>;

template <class P, class T>
AUTODROP_HD static inline P load_packet(const T* p) {
  return *reinterpret_cast<const P*>(p);
}
template <class P, class T>
AUTODROP_HD static inline void store_packet(T* p, const P& packet) {
  *reinterpret_cast<P*>(p) = packet;
}

// A chunk's parameters from its row. Without the hint nvcc must load them through generic
// addresses.
template <class T>
AUTODROP_HD static inline T* parameters(const Chunk& chunk) {
  T* const x = reinterpret_cast<T*>(chunk.param);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(x));
#endif
  return x;
}

AUTODROP_HD static inline bool is_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// ---- accumulate -----------------------------------------------------------------------------

template <class T, bool kDelta, bool kFirst, bool kWeighted>
AUTODROP_HD static inline float added(T x, float sum, float mean, float weight) {
  float term = kDelta ? numeric::minus_mean(x, mean) : numeric::to_float(x);
  if (kWeighted) term = term * weight;
  return kFirst ? term : sum + term;
}

// kCount packets, `stride` packets apart: first all loads, then arithmetic and stores.
template <class T, bool kDelta, bool kFirst, bool kWeighted, int kCount>
AUTODROP_HD static inline void accumulate_packets(const T* x, float* a, const float* m,
                                                  float weight, std::int64_t stride) {
  constexpr int kSize = kPacket<T>;
  using Parameters = Packet<T, kSize>;
  using Floats = Packet<float, kSize>;
  Parameters xs[kCount];
  Floats sums[kCount], means[kCount];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int u = 0; u < kCount; ++u) {
    const std::int64_t at = u * stride * kSize;
    xs[u] = load_packet<Parameters>(x + at);
    if (!kFirst) sums[u] = load_packet<Floats>(a + at);
    if (kDelta) means[u] = load_packet<Floats>(m + at);
  }
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int u = 0; u < kCount; ++u) {
    Floats result;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int j = 0; j < kSize; ++j) {
      result.element[j] =
          added<T, kDelta, kFirst, kWeighted>(xs[u].element[j], kFirst ? 0.0f : sums[u].element[j],
                                              kDelta ? means[u].element[j] : 0.0f, weight);
    }
    store_packet(a + u * stride * kSize, result);
  }
}

template <class T, bool kDelta, bool kFirst, bool kWeighted>
AUTODROP_HD static inline void accumulate_chunk(const Chunk& chunk, float* running,
                                                const float* mean, float weight, int lane,
                                                int lanes) {
  const T* x = parameters<const T>(chunk);
  float* a = running + chunk.arena;
  const float* m = kDelta ? mean + chunk.arena : nullptr;
  std::int64_t rest = 0;  // first element that packets do not cover
  if (is_aligned(x)) {
    constexpr int kSize = kPacket<T>, kCount = kInFlight<T, kDelta>;
    const std::int64_t packets = chunk.length / kSize;
    std::int64_t p = lane;
    for (; p + (kCount - 1) * lanes < packets; p += kCount * lanes) {
      accumulate_packets<T, kDelta, kFirst, kWeighted, kCount>(
          x + p * kSize, a + p * kSize, kDelta ? m + p * kSize : nullptr, weight, lanes);
    }
    for (; p < packets; p += lanes) {
      accumulate_packets<T, kDelta, kFirst, kWeighted, 1>(
          x + p * kSize, a + p * kSize, kDelta ? m + p * kSize : nullptr, weight, lanes);
    }
    rest = packets * kSize;
  }
  for (std::int64_t i = rest + lane; i < chunk.length; i += lanes) {
    a[i] = added<T, kDelta, kFirst, kWeighted>(x[i], kFirst ? 0.0f : a[i], kDelta ? m[i] : 0.0f,
                                               weight);
  }
}

template <bool kDelta, bool kFirst, bool kWeighted>
AUTODROP_HD static inline void accumulate(const Chunk& chunk, float* running, const float* mean,
                                          float weight, int lane, int lanes) {
  switch (static_cast<DType>(chunk.dtype)) {
    case DType::kFloat32:
      accumulate_chunk<float, kDelta, kFirst, kWeighted>(chunk, running, mean, weight, lane, lanes);
      break;
    case DType::kFloat64:
      accumulate_chunk<double, kDelta, kFirst, kWeighted>(chunk, running, mean, weight, lane,
                                                          lanes);
      break;
    case DType::kFloat16:
      accumulate_chunk<Half, kDelta, kFirst, kWeighted>(chunk, running, mean, weight, lane, lanes);
      break;
    case DType::kBFloat16:
      accumulate_chunk<BFloat16, kDelta, kFirst, kWeighted>(chunk, running, mean, weight, lane,
                                                            lanes);
      break;
  }
}

// ---- close ----------------------------------------------------------------------------------

// sum + a * b for factors that are float32: their product is exact, so fusing changes no bit and
// halves the float64 instructions, which consumer GPUs have few units for.
AUTODROP_HD static inline double add_product(double sum, double a, double b) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, sum);
#else
  return sum + a * b;
#endif
}

AUTODROP_HD static inline void add_products(Sums& sums, double d0, double d1, double mean) {
  sums.dot = add_product(sums.dot, d0, d1);
  sums.norm = add_product(sums.norm, d0, d0);
  sums.previous_norm = add_product(sums.previous_norm, d1, d1);
  sums.mean_norm = add_product(sums.mean_norm, mean, mean);
}

AUTODROP_HD static inline void add_sums(Sums& total, const Sums& sums) {
  total.dot += sums.dot;
  total.norm += sums.norm;
  total.previous_norm += sums.previous_norm;
  total.mean_norm += sums.mean_norm;
}

// Differences are rounded to float32 and their float64 products are exact, as on the CPU.
AUTODROP_HD static inline Sums close_sum(const Chunk& chunk, const float* running,
                                         const float* previous, const float* before, int lane,
                                         int lanes) {
  using Floats = Packet<float, 4>;
  const float* a = running + chunk.arena;
  const float* p = previous + chunk.arena;
  const float* b = before + chunk.arena;
  Sums sums{};
  const std::int64_t packets = chunk.length / 4;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  for (std::int64_t q = lane; q < packets; q += lanes) {
    const Floats x = load_packet<Floats>(a + 4 * q), y = load_packet<Floats>(p + 4 * q),
                 z = load_packet<Floats>(b + 4 * q);
    for (int j = 0; j < 4; ++j) {
      add_products(sums, x.element[j] - y.element[j], y.element[j] - z.element[j], x.element[j]);
    }
  }
  for (std::int64_t i = packets * 4 + lane; i < chunk.length; i += lanes) {
    add_products(sums, a[i] - p[i], p[i] - b[i], a[i]);
  }
  return sums;
}

AUTODROP_HD static inline Sums close_delta(const Chunk& chunk, float* running, float* previous,
                                           float* mean, double window, int lane, int lanes) {
  using Floats = Packet<float, 4>;
  float* a = running + chunk.arena;
  float* s = previous + chunk.arena;
  float* m = mean + chunk.arena;
  const double per_step = 1.0 / window;
  Sums sums{};
  const std::int64_t packets = chunk.length / 4;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (std::int64_t q = lane; q < packets; q += lanes) {
    Floats x = load_packet<Floats>(a + 4 * q), y = load_packet<Floats>(s + 4 * q),
           z = load_packet<Floats>(m + 4 * q);
    for (int j = 0; j < 4; ++j) {
      const ClosedElement closed =
          close_delta_element(x.element[j], y.element[j], z.element[j], window, per_step);
      add_products(sums, closed.displacement, closed.previous_displacement, closed.mean);
    }
    store_packet(a + 4 * q, x);
    store_packet(s + 4 * q, y);
    store_packet(m + 4 * q, z);
  }
  for (std::int64_t i = packets * 4 + lane; i < chunk.length; i += lanes) {
    const ClosedElement closed = close_delta_element(a[i], s[i], m[i], window, per_step);
    add_products(sums, closed.displacement, closed.previous_displacement, closed.mean);
  }
  return sums;
}

// This lane's share of rows [begin, end), in a fixed order.
AUTODROP_HD static inline Sums add_rows(const Sums* rows, const double* weights, std::int64_t begin,
                                        std::int64_t end, int lane, int lanes) {
  Sums sums{};
  for (std::int64_t i = begin + lane; i < end; i += lanes) {
    const double weight = weights == nullptr ? 1.0 : weights[i];
    sums.dot += weight * rows[i].dot;
    sums.norm += weight * rows[i].norm;
    sums.previous_norm += weight * rows[i].previous_norm;
    sums.mean_norm += weight * rows[i].mean_norm;
  }
  return sums;
}

// ---- write_back -----------------------------------------------------------------------------

template <class T>
AUTODROP_HD static inline void write_back_chunk(const Chunk& chunk, const float* arena,
                                                const float* mean, double scale, int lane,
                                                int lanes) {
  T* x = parameters<T>(chunk);
  const float* a = arena + chunk.arena;
  const float* m = mean == nullptr ? nullptr : mean + chunk.arena;
  for (std::int64_t i = lane; i < chunk.length; i += lanes) {
    const double offset = m == nullptr ? 0.0 : static_cast<double>(m[i]);
    numeric::from_double(offset + scale * static_cast<double>(a[i]), x + i);
  }
}

AUTODROP_HD static inline void write_back(const Chunk& chunk, const float* arena, const float* mean,
                                          double scale, int lane, int lanes) {
  switch (static_cast<DType>(chunk.dtype)) {
    case DType::kFloat32:
      write_back_chunk<float>(chunk, arena, mean, scale, lane, lanes);
      break;
    case DType::kFloat64:
      write_back_chunk<double>(chunk, arena, mean, scale, lane, lanes);
      break;
    case DType::kFloat16:
      write_back_chunk<Half>(chunk, arena, mean, scale, lane, lanes);
      break;
    case DType::kBFloat16:
      write_back_chunk<BFloat16>(chunk, arena, mean, scale, lane, lanes);
      break;
  }
}

}  // namespace autodrop::thread_work
