// What one thread of a GPU block does, as host and device code: csrc/tests/test_threads.cpp runs
// exactly this on the CPU for every block and thread of the real launch shapes.
//
// A thread is `lane` of `lanes` that share a chunk: a whole block for a large chunk, a warp for a
// small one. A packet is four elements: 16 bytes of every arena, so that neighbouring lanes touch
// neighbouring 16 bytes whatever the parameters' type. (Eight elements of half precision would be
// 16 bytes of parameters, but 32 of the arena, of which each store would fill one half.) A lane has
// several packets in flight before it uses the first, because the latency of device memory is
// hundreds of cycles. Arenas are aligned to 128 bytes; parameters may start anywhere, and where
// they do not start at a packet's boundary they alone are read one element at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/delta.h"
#include "core/numeric.h"
#include "core/tables.h"

#if defined(__CUDA_ARCH__)
#define AUTODROP_UNROLL _Pragma("unroll")
#else
#define AUTODROP_UNROLL
#endif

namespace autodrop::thread_work {

constexpr int kPacket = 4;  // elements

// Loaded and stored at once, 16 bytes at most: four doubles are two accesses.
template <class T, int kCount = kPacket>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Packet {
  T element[kCount];
};
using Floats = Packet<float>;

// Packets in flight: 16 elements in sum form, 8 in delta form, which also holds means. Twice as
// many made ptxas spill on sm_80.
template <bool kDelta>
constexpr int kInFlight = (kDelta ? 8 : 16) / kPacket;

// Packets of each of the three arenas that a close has in flight, and of one or two arenas that
// write_back has.
constexpr int kClosing = 2;
constexpr int kWriting = 2;

template <class T>
AUTODROP_HD static inline Packet<T> load_packet(const T* p) {
  return *reinterpret_cast<const Packet<T>*>(p);
}
template <class T>
AUTODROP_HD static inline void store_packet(T* p, const Packet<T>& packet) {
  *reinterpret_cast<Packet<T>*>(p) = packet;
}

// Arenas are next touched a whole step later. The hint lets the second-level cache drop them first
// and keep the parameters, which the next forward pass reads.
AUTODROP_HD static inline Floats load_arena(const float* p) {
#if defined(AUTODROP_DEVICE_CODE)
  return numeric::bit_cast<Floats>(__ldcs(reinterpret_cast<const float4*>(p)));
#else
  return load_packet(p);
#endif
}
AUTODROP_HD static inline void store_arena(float* p, const Floats& packet) {
#if defined(AUTODROP_DEVICE_CODE)
  __stcs(reinterpret_cast<float4*>(p), numeric::bit_cast<float4>(packet));
#else
  store_packet(p, packet);
#endif
}

// A row of a table, with 16 bytes a load; tables of GPU plans are aligned to 16 bytes.
AUTODROP_HD static inline Chunk load_row(const Chunk* row) {
  const auto* halves = reinterpret_cast<const Packet<std::int64_t, 2>*>(row);
  const Packet<std::int64_t, 2> first = halves[0], second = halves[1];
  return {first.element[0], first.element[1], second.element[0], second.element[1]};
}
AUTODROP_HD static inline Tile load_row(const Tile* row) {
  const auto whole = *reinterpret_cast<const Packet<std::int64_t, 2>*>(row);
  return {whole.element[0], whole.element[1]};
}

// A chunk's parameters from its row. A plain cast would leave nvcc with generic loads, which look
// up the kind of memory first; __isGlobal with __builtin_assume was forgotten where rows are
// passed by value.
template <class T>
AUTODROP_HD static inline T* parameters(const Chunk& chunk) {
#if defined(AUTODROP_DEVICE_CODE)
  return static_cast<T*>(__cvta_global_to_generic(static_cast<std::size_t>(chunk.param)));
#else
  return reinterpret_cast<T*>(chunk.param);
#endif
}

template <class T>
AUTODROP_HD static inline bool is_aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % alignof(Packet<T>) == 0;
}

// A packet of parameters, from an address that is aligned to its size or not.
template <bool kAligned, class T>
AUTODROP_HD static inline Packet<T> load_parameters(const T* p) {
  if constexpr (kAligned) {
    return load_packet(p);
  } else {
    Packet<T> packet;
    AUTODROP_UNROLL
    for (int j = 0; j < kPacket; ++j) packet.element[j] = p[j];
    return packet;
  }
}
template <bool kAligned, class T>
AUTODROP_HD static inline void store_parameters(T* p, const Packet<T>& packet) {
  if constexpr (kAligned) {
    store_packet(p, packet);
  } else {
    AUTODROP_UNROLL
    for (int j = 0; j < kPacket; ++j) p[j] = packet.element[j];
  }
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls work(Count of packets, first element of the first of them) for this lane's packets: kCount
// at a time, `lanes` packets apart, then one at a time. Returns the first element that no packet
// covers; fewer than kPacket elements are left, so that a lane has one at most.
template <int kCount, class Work>
AUTODROP_HD static inline std::int64_t for_packets(std::int64_t length, int lane, int lanes,
                                                   const Work& work) {
  const std::int64_t packets = length / kPacket;
  std::int64_t p = lane;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (; p + (kCount - 1) * lanes < packets; p += kCount * lanes) {
    work(Count<kCount>{}, p * kPacket);
  }
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (; p < packets; p += lanes) work(Count<1>{}, p * kPacket);
  return packets * kPacket;
}

// ---- accumulate -----------------------------------------------------------------------------

template <class T, bool kDelta, bool kFirst, bool kWeighted>
AUTODROP_HD static inline float added(T x, float sum, float mean, float weight) {
  float term = kDelta ? numeric::minus_mean(x, mean) : numeric::to_float(x);
  if (kWeighted) term = term * weight;
  return kFirst ? term : sum + term;
}

// kCount packets, `stride` elements apart: first all loads, then arithmetic and stores.
template <class T, bool kDelta, bool kFirst, bool kWeighted, bool kAligned, int kCount>
AUTODROP_HD static inline void accumulate_packets(const T* x, float* a, const float* m,
                                                  float weight, std::int64_t stride) {
  Packet<T> xs[kCount];
  Floats sums[kCount], means[kCount];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    xs[u] = load_parameters<kAligned>(x + u * stride);
    if (!kFirst) sums[u] = load_arena(a + u * stride);
    if (kDelta) means[u] = load_arena(m + u * stride);
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    Floats result;
    AUTODROP_UNROLL
    for (int j = 0; j < kPacket; ++j) {
      result.element[j] =
          added<T, kDelta, kFirst, kWeighted>(xs[u].element[j], kFirst ? 0.0f : sums[u].element[j],
                                              kDelta ? means[u].element[j] : 0.0f, weight);
    }
    store_arena(a + u * stride, result);
  }
}

template <class T, bool kDelta, bool kFirst, bool kWeighted, bool kAligned>
AUTODROP_HD static inline void accumulate_elements(const T* x, float* a, const float* m,
                                                   float weight, std::int64_t length, int lane,
                                                   int lanes) {
  const std::int64_t rest =
      for_packets<kInFlight<kDelta>>(length, lane, lanes, [&](auto count, std::int64_t at) {
        accumulate_packets<T, kDelta, kFirst, kWeighted, kAligned, decltype(count)::value>(
            x + at, a + at, kDelta ? m + at : nullptr, weight, std::int64_t{lanes} * kPacket);
      });
  if (const std::int64_t i = rest + lane; i < length) {
    a[i] = added<T, kDelta, kFirst, kWeighted>(x[i], kFirst ? 0.0f : a[i], kDelta ? m[i] : 0.0f,
                                               weight);
  }
}

template <class T, bool kDelta, bool kFirst, bool kWeighted>
AUTODROP_HD static inline void accumulate_chunk(const Chunk& chunk, float* running,
                                                const float* mean, float weight, int lane,
                                                int lanes) {
  const T* x = parameters<const T>(chunk);
  float* a = running + chunk.arena;
  const float* m = kDelta ? mean + chunk.arena : nullptr;
  if (is_aligned(x)) {
    accumulate_elements<T, kDelta, kFirst, kWeighted, true>(x, a, m, weight, chunk.length, lane,
                                                            lanes);
  } else {
    accumulate_elements<T, kDelta, kFirst, kWeighted, false>(x, a, m, weight, chunk.length, lane,
                                                             lanes);
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
#if defined(AUTODROP_DEVICE_CODE)
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
  const float* a = running + chunk.arena;
  const float* p = previous + chunk.arena;
  const float* b = before + chunk.arena;
  const std::int64_t stride = std::int64_t{lanes} * kPacket;
  Sums sums{};
  const std::int64_t rest =
      for_packets<kClosing>(chunk.length, lane, lanes, [&](auto count, std::int64_t at) {
        constexpr int kCount = decltype(count)::value;
        Floats xs[kCount], ys[kCount], zs[kCount];
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          xs[u] = load_arena(a + at + u * stride);
          ys[u] = load_arena(p + at + u * stride);
          zs[u] = load_arena(b + at + u * stride);
        }
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          AUTODROP_UNROLL
          for (int j = 0; j < kPacket; ++j) {
            const float x = xs[u].element[j], y = ys[u].element[j], z = zs[u].element[j];
            add_products(sums, x - y, y - z, x);
          }
        }
      });
  if (const std::int64_t i = rest + lane; i < chunk.length) {
    add_products(sums, a[i] - p[i], p[i] - b[i], a[i]);
  }
  return sums;
}

AUTODROP_HD static inline Sums close_delta(const Chunk& chunk, float* running, float* previous,
                                           float* mean, double window, int lane, int lanes) {
  float* a = running + chunk.arena;
  float* s = previous + chunk.arena;
  float* m = mean + chunk.arena;
  const double per_step = 1.0 / window;
  const std::int64_t stride = std::int64_t{lanes} * kPacket;
  Sums sums{};
  const std::int64_t rest =
      for_packets<kClosing>(chunk.length, lane, lanes, [&](auto count, std::int64_t at) {
        constexpr int kCount = decltype(count)::value;
        Floats xs[kCount], ys[kCount], zs[kCount];
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          xs[u] = load_arena(a + at + u * stride);
          ys[u] = load_arena(s + at + u * stride);
          zs[u] = load_arena(m + at + u * stride);
        }
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          AUTODROP_UNROLL
          for (int j = 0; j < kPacket; ++j) {
            const ClosedElement closed = close_delta_element_on_gpu(
                xs[u].element[j], ys[u].element[j], zs[u].element[j], window, per_step);
            add_products(sums, closed.displacement, closed.previous_displacement, closed.mean);
          }
          store_arena(a + at + u * stride, xs[u]);
          store_arena(s + at + u * stride, ys[u]);
          store_arena(m + at + u * stride, zs[u]);
        }
      });
  if (const std::int64_t i = rest + lane; i < chunk.length) {
    const ClosedElement closed = close_delta_element_on_gpu(a[i], s[i], m[i], window, per_step);
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
AUTODROP_HD static inline T written(float sum, double mean, double scale) {
  T x;
  numeric::from_double(mean + scale * static_cast<double>(sum), &x);
  return x;
}

template <class T, bool kAligned>
AUTODROP_HD static inline void write_back_elements(T* x, const float* a, const float* m,
                                                   double scale, std::int64_t length, int lane,
                                                   int lanes) {
  const std::int64_t stride = std::int64_t{lanes} * kPacket;
  const std::int64_t rest =
      for_packets<kWriting>(length, lane, lanes, [&](auto count, std::int64_t at) {
        constexpr int kCount = decltype(count)::value;
        Floats sums[kCount], means[kCount] = {};
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          sums[u] = load_arena(a + at + u * stride);
          if (m != nullptr) means[u] = load_arena(m + at + u * stride);
        }
        AUTODROP_UNROLL
        for (int u = 0; u < kCount; ++u) {
          Packet<T> result;
          AUTODROP_UNROLL
          for (int j = 0; j < kPacket; ++j) {
            result.element[j] =
                written<T>(sums[u].element[j], static_cast<double>(means[u].element[j]), scale);
          }
          store_parameters<kAligned>(x + at + u * stride, result);
        }
      });
  if (const std::int64_t i = rest + lane; i < length) {
    x[i] = written<T>(a[i], m == nullptr ? 0.0 : static_cast<double>(m[i]), scale);
  }
}

template <class T>
AUTODROP_HD static inline void write_back_chunk(const Chunk& chunk, const float* arena,
                                                const float* mean, double scale, int lane,
                                                int lanes) {
  T* x = parameters<T>(chunk);
  const float* a = arena + chunk.arena;
  const float* m = mean == nullptr ? nullptr : mean + chunk.arena;
  if (is_aligned(x)) {
    write_back_elements<T, true>(x, a, m, scale, chunk.length, lane, lanes);
  } else {
    write_back_elements<T, false>(x, a, m, scale, chunk.length, lane, lanes);
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
