// Compiled once per instruction set with AUTODROP_ISA naming the namespace. Nothing here may call
// an inline function from a shared header that is also compiled elsewhere: the linker could keep
// the copy that uses instructions an older processor lacks. numeric.h is `static inline` for that.
#include "cpu/kernels.h"

#include "core/delta.h"
#include "core/numeric.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace autodrop::cpu::AUTODROP_ISA {
namespace {

using numeric::from_double;
using numeric::minus_mean;
using numeric::to_float;

// ---- accumulate -----------------------------------------------------------------------------

template <class T, bool kDelta, bool kFirst, bool kWeighted>
inline void accumulate_span(const T* __restrict x, float* out, const float* in, const float* mean,
                            std::int64_t n, float weight) {
  // `out` and `in` are the same arena, or `out` is a block on the stack and `in` is not read.
  // `mean` may be that arena too: a running mean moves by a share of its distance from `x`.
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    float term;
    if constexpr (kDelta) {
      term = minus_mean(x[i], mean[i]);
    } else {
      term = to_float(x[i]);
    }
    if constexpr (kWeighted) term *= weight;
    out[i] = kFirst ? term : in[i] + term;
  }
}

// Non-temporal stores spare the first step of a window the reading of lines it overwrites.
inline void copy_streaming(float* out, const float* in, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__AVX__)
  for (; i + 8 <= n; i += 8) _mm256_stream_ps(out + i, _mm256_load_ps(in + i));
#elif defined(__SSE2__)
  for (; i + 4 <= n; i += 4) _mm_stream_ps(out + i, _mm_load_ps(in + i));
#endif
  for (; i < n; ++i) out[i] = in[i];
}

template <class T, bool kDelta, bool kFirst, bool kWeighted>
void accumulate_chunk(const Chunk& chunk, float* running, const float* mean, float weight,
                      bool stream) {
  const T* x = reinterpret_cast<const T*>(chunk.param);
  float* a = running + chunk.arena;
  const float* m = kDelta ? mean + chunk.arena : nullptr;
  if (kFirst && stream) {
    constexpr std::int64_t kBlock = 1024;  // 4 KiB stay in the first-level cache
    alignas(64) float block[kBlock];
    for (std::int64_t done = 0; done < chunk.length; done += kBlock) {
      const std::int64_t n = chunk.length - done < kBlock ? chunk.length - done : kBlock;
      accumulate_span<T, kDelta, kFirst, kWeighted>(x + done, block, nullptr,
                                                    kDelta ? m + done : nullptr, n, weight);
      copy_streaming(a + done, block, n);
    }
    return;
  }
  // Asking for the lines ahead gains 5 to 7 % at memory speed over the hardware's own prefetching,
  // and a third for many small tensors, whose starts it cannot foresee.
  constexpr std::int64_t kBlock = 64, kAhead = 512;  // elements
  std::int64_t i = 0;
  for (; i + kBlock <= chunk.length; i += kBlock) {
    for (std::int64_t line = 0; line < kBlock; line += 16) {
      __builtin_prefetch(a + i + kAhead + line, 1);
      __builtin_prefetch(x + i + kAhead + line, 0);
    }
    accumulate_span<T, kDelta, kFirst, kWeighted>(x + i, a + i, a + i, kDelta ? m + i : nullptr,
                                                  kBlock, weight);
  }
  accumulate_span<T, kDelta, kFirst, kWeighted>(x + i, a + i, a + i, kDelta ? m + i : nullptr,
                                                chunk.length - i, weight);
}

template <bool kDelta, bool kFirst, bool kWeighted>
void accumulate_range(const Chunk* begin, const Chunk* end, float* running, const float* mean,
                      float weight, bool stream) {
  for (const Chunk* chunk = begin; chunk != end; ++chunk) {
    switch (static_cast<DType>(chunk->dtype)) {
      case DType::kFloat32:
        accumulate_chunk<float, kDelta, kFirst, kWeighted>(*chunk, running, mean, weight, stream);
        break;
      case DType::kFloat64:
        accumulate_chunk<double, kDelta, kFirst, kWeighted>(*chunk, running, mean, weight, stream);
        break;
      case DType::kFloat16:
        accumulate_chunk<Half, kDelta, kFirst, kWeighted>(*chunk, running, mean, weight, stream);
        break;
      case DType::kBFloat16:
        accumulate_chunk<BFloat16, kDelta, kFirst, kWeighted>(*chunk, running, mean, weight,
                                                              stream);
        break;
    }
  }
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

template <bool kDelta, bool kFirst>
void accumulate_weighted(const Chunk* begin, const Chunk* end, float* running, const float* mean,
                         float weight, bool stream) {
  if (weight == 1.0f) {
    accumulate_range<kDelta, kFirst, false>(begin, end, running, mean, weight, stream);
  } else {
    accumulate_range<kDelta, kFirst, true>(begin, end, running, mean, weight, stream);
  }
}

void accumulate(const Chunk* begin, const Chunk* end, float* running, const float* mean, bool first,
                float weight, bool stream) {
  if (mean != nullptr) {
    if (first) {
      accumulate_weighted<true, true>(begin, end, running, mean, weight, stream);
    } else {
      accumulate_weighted<true, false>(begin, end, running, mean, weight, false);
    }
  } else if (first) {
    accumulate_weighted<false, true>(begin, end, running, mean, weight, stream);
  } else {
    accumulate_weighted<false, false>(begin, end, running, mean, weight, false);
  }
}

// ---- close ----------------------------------------------------------------------------------

// Eight float64 lanes per sum whatever the register width, added up in one fixed order. The factors
// are float32, so their float64 product is exact and a fused multiply-add changes no bit.
constexpr int kLanes = 8;
#if defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kParts = kLanes / kWidth;

typedef float Float __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef double Double __attribute__((vector_size(kWidth * 8)));
typedef double LooseDouble __attribute__((vector_size(kWidth * 8), aligned(8), may_alias));

inline Float load(const float* p) { return *reinterpret_cast<const Float*>(p); }
inline Double load(const double* p) { return *reinterpret_cast<const LooseDouble*>(p); }

// GCC 12 splits a generic vector conversion in halves, which made close() compute-bound.
#if defined(__AVX2__)
inline Double widen(Float x) { return (Double)_mm256_cvtps_pd((__m128)x); }
inline Double multiply_add(Double a, Double b, Double sum) {
  return (Double)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
}
#else
inline Double widen(Float x) { return __builtin_convertvector(x, Double); }
inline Double multiply_add(Double a, Double b, Double sum) { return sum + a * b; }
#endif

struct Accumulators {
  Double dot[kParts] = {}, norm[kParts] = {}, previous_norm[kParts] = {}, mean_norm[kParts] = {};

  void add(int part, Double d0, Double d1, Double m) {
    dot[part] = multiply_add(d0, d1, dot[part]);
    norm[part] = multiply_add(d0, d0, norm[part]);
    previous_norm[part] = multiply_add(d1, d1, previous_norm[part]);
    mean_norm[part] = multiply_add(m, m, mean_norm[part]);
  }
  Sums total() const { return {fold(dot), fold(norm), fold(previous_norm), fold(mean_norm)}; }

  static double fold(const Double (&part)[kParts]) {
    double lane[kLanes];
    for (int p = 0; p < kParts; ++p) {
      for (int j = 0; j < kWidth; ++j) lane[p * kWidth + j] = part[p][j];
    }
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
           ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }
};

// Eight elements at a time; a rest shorter than that is padded with zeros, which add nothing.
inline void copy_padded(float* to, const float* from, std::int64_t n) {
  for (std::int64_t i = 0; i < kLanes; ++i) to[i] = i < n ? from[i] : 0.0f;
}

inline void step_sum(Accumulators& sums, const float* a, const float* p, const float* b) {
  for (int part = 0; part < kParts; ++part) {
    const int j = part * kWidth;
    const Float sum = load(a + j), last = load(p + j);
    sums.add(part, widen(sum - last), widen(last - load(b + j)), widen(sum));
  }
}

void close_sum(const Chunk* begin, const Chunk* end, const float* running, const float* previous,
               const float* before, Sums* out) {
  for (const Chunk* chunk = begin; chunk != end; ++chunk, ++out) {
    const float* a = running + chunk->arena;
    const float* p = previous + chunk->arena;
    const float* b = before + chunk->arena;
    const std::int64_t whole = chunk->length / kLanes * kLanes;
    Accumulators sums;
    for (std::int64_t i = 0; i < whole; i += kLanes) step_sum(sums, a + i, p + i, b + i);
    if (const std::int64_t rest = chunk->length - whole) {
      float last[3][kLanes];
      copy_padded(last[0], a + whole, rest);
      copy_padded(last[1], p + whole, rest);
      copy_padded(last[2], b + whole, rest);
      step_sum(sums, last[0], last[1], last[2]);
    }
    *out = sums.total();
  }
}

inline void step_delta(Accumulators& sums, float* a, float* s, float* m, double window,
                       double per_step) {
  double d0[kLanes], d1[kLanes], mean[kLanes];
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) {
    const ClosedElement closed = close_delta_element(a[i], s[i], m[i], window, per_step);
    d0[i] = closed.displacement;
    d1[i] = closed.previous_displacement;
    mean[i] = closed.mean;
  }
  for (int part = 0; part < kParts; ++part) {
    const int j = part * kWidth;
    sums.add(part, load(d0 + j), load(d1 + j), load(mean + j));
  }
}

void close_delta(const Chunk* begin, const Chunk* end, float* running, float* previous, float* mean,
                 double window, Sums* out) {
  const double per_step = 1.0 / window;
  for (const Chunk* chunk = begin; chunk != end; ++chunk, ++out) {
    float* const arena[3] = {running + chunk->arena, previous + chunk->arena, mean + chunk->arena};
    const std::int64_t whole = chunk->length / kLanes * kLanes;
    Accumulators sums;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      step_delta(sums, arena[0] + i, arena[1] + i, arena[2] + i, window, per_step);
    }
    if (const std::int64_t rest = chunk->length - whole) {
      float last[3][kLanes];
      for (int j = 0; j < 3; ++j) copy_padded(last[j], arena[j] + whole, rest);
      step_delta(sums, last[0], last[1], last[2], window, per_step);
      for (int j = 0; j < 3; ++j) {
        for (std::int64_t i = 0; i < rest; ++i) arena[j][whole + i] = last[j][i];
      }
    }
    *out = sums.total();
  }
}

// ---- write_back -----------------------------------------------------------------------------

template <class T>
void write_back_chunk(const Chunk& chunk, const float* arena, const float* mean, double scale) {
  T* x = reinterpret_cast<T*>(chunk.param);
  const float* a = arena + chunk.arena;
  const float* m = mean == nullptr ? nullptr : mean + chunk.arena;
  for (std::int64_t i = 0; i < chunk.length; ++i) {
    const double offset = m == nullptr ? 0.0 : m[i];
    from_double(offset + scale * a[i], x + i);
  }
}

void write_back(const Chunk* begin, const Chunk* end, const float* arena, const float* mean,
                double scale) {
  for (const Chunk* chunk = begin; chunk != end; ++chunk) {
    switch (static_cast<DType>(chunk->dtype)) {
      case DType::kFloat32:
        write_back_chunk<float>(*chunk, arena, mean, scale);
        break;
      case DType::kFloat64:
        write_back_chunk<double>(*chunk, arena, mean, scale);
        break;
      case DType::kFloat16:
        write_back_chunk<Half>(*chunk, arena, mean, scale);
        break;
      case DType::kBFloat16:
        write_back_chunk<BFloat16>(*chunk, arena, mean, scale);
        break;
    }
  }
}

#define AUTODROP_STRING_(x) #x
#define AUTODROP_STRING(x) AUTODROP_STRING_(x)

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {AUTODROP_STRING(AUTODROP_ISA), accumulate, close_sum, close_delta,
                          write_back};

}  // namespace autodrop::cpu::AUTODROP_ISA
