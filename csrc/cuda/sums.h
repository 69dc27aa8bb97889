// Sums of lanes that a thread of a GPU block holds in registers: in float64, or in two float32 each
// if the multiprocessors have too few float64 units to keep up with the memory.
//
// Two float32 numbers, `high` and `low`, take an element x in ten additions:
//
//   s = high + x, e its rounding error           TwoSum (Knuth, TAOCP 2, 4.2.2), exact
//   v = low + e                                  rounded
//   high = s + v, low its rounding error         Fast2Sum (Dekker 1971), exact
//
// This is Algorithm 4 of Joldes, Muller and Popescu, "Tight and rigorous error bounds for basic
// building blocks of double-word arithmetic" (ACM TOMS 44, 2017). Only v is rounded. Let u = 2^-24
// and M the largest power of two that is at most |high| or at most |s|. Then |low| <= u M and
// |e| <= u M, because each is the error of a rounding to a number of that size. So
// |low + e| <= 2 u M, and v is either exact or wrong by u (u M) at most. M is at most the sum of
// absolute values so far, up to a factor of 1 + 2 u. After n additions the error is
//
//   n 2^-48 of the sum of absolute values at most, 2^-40 = 9.1e-13 for n = kMostAdditions,
//
// and about sqrt(n) 2^-48 for errors of random signs. Nothing underflows: sums of float32 are
// multiples of the smallest one. A sum of more than 3.4e38, and an infinite element, become NaN.
//
// Weights are not applied here but when sums are added to the table, in float64: a product with an
// element would need a third number.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace autodrop::sums {

// Compute capabilities 6.0, 7.0, 8.0, 9.0 and 10.0 have 32 or 64 float64 units a multiprocessor;
// others have two. docs/kernels.md has the bandwidths that follow.
#if defined(__CUDA_ARCH__)
constexpr bool kTwoFloats = __CUDA_ARCH__ != 600 && __CUDA_ARCH__ != 700 && __CUDA_ARCH__ != 800 &&
                            __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000;
#elif defined(AUTODROP_TWO_FLOATS)  // for the emulator
constexpr bool kTwoFloats = true;
#else
constexpr bool kTwoFloats = false;
#endif

// Instructions that add two pairs of float32, which halves the additions of 10.3; ptxas takes them
// apart for 12.0. The functions came with CUDA 13.
#if defined(__CUDA_ARCH__) && defined(__CUDACC_VER_MAJOR__)
#if __CUDA_ARCH__ >= 1000 && __CUDACC_VER_MAJOR__ >= 13
#define AUTODROP_PAIRS 1
#endif
#endif

constexpr int kMostAdditions = 256;

struct Floats {
  float first, second;
};
struct alignas(16) Two {
  double element[2];
};

#if defined(AUTODROP_PAIRS)
AUTODROP_HD static inline Floats plus(Floats a, Floats b) {
  const float2 sum = __fadd2_rn({a.first, a.second}, {b.first, b.second});
  return {sum.x, sum.y};
}
// There is no subtraction of pairs; a product with -1 is exact.
AUTODROP_HD static inline Floats minus(Floats a, Floats b) {
  const float2 difference = __ffma2_rn({b.first, b.second}, {-1.0f, -1.0f}, {a.first, a.second});
  return {difference.x, difference.y};
}
#elif defined(AUTODROP_DEVICE_CODE)
// Functions that no compiler reorders or fuses.
AUTODROP_HD static inline Floats plus(Floats a, Floats b) {
  return {__fadd_rn(a.first, b.first), __fadd_rn(a.second, b.second)};
}
AUTODROP_HD static inline Floats minus(Floats a, Floats b) {
  return {__fsub_rn(a.first, b.first), __fsub_rn(a.second, b.second)};
}
#else
AUTODROP_HD static inline Floats plus(Floats a, Floats b) {
  return {a.first + b.first, a.second + b.second};
}
AUTODROP_HD static inline Floats minus(Floats a, Floats b) {
  return {a.first - b.first, a.second - b.second};
}
#endif

// sum + weight * x, rounded once: it costs what an addition costs, so that a variant without
// weights would gain nothing.
AUTODROP_HD static inline double added(double sum, double x, double weight) {
#if defined(AUTODROP_DEVICE_CODE)
  return __fma_rn(x, weight, sum);
#else
  return sum + weight * x;
#endif
}

template <int kPairs>
struct Float64 {
  double sum[2 * kPairs] = {};

  // Adds to the lanes 2 * pair and 2 * pair + 1.
  AUTODROP_HD inline void add(int pair, double first, double second, double weight) {
    sum[2 * pair] = added(sum[2 * pair], first, weight);
    sum[2 * pair + 1] = added(sum[2 * pair + 1], second, weight);
  }
  AUTODROP_HD inline Two total(int pair, double /*weight*/) const {
    return {{sum[2 * pair], sum[2 * pair + 1]}};
  }
};

template <int kPairs>
struct TwoFloats {
  Floats high[kPairs] = {}, low[kPairs] = {};

  AUTODROP_HD inline void add(int pair, float first, float second, double /*weight*/) {
    const Floats x{first, second}, h = high[pair];
    const Floats s = plus(h, x);
    const Floats of_x = minus(s, h);
    const Floats e = plus(minus(h, minus(s, of_x)), minus(x, of_x));
    const Floats v = plus(low[pair], e);
    high[pair] = plus(s, v);
    low[pair] = minus(v, minus(high[pair], s));
  }
  AUTODROP_HD inline Two total(int pair, double weight) const {
    const Floats h = high[pair], l = low[pair];
    return {{weight * (static_cast<double>(h.first) + static_cast<double>(l.first)),
             weight * (static_cast<double>(h.second) + static_cast<double>(l.second))}};
  }
};

}  // namespace autodrop::sums
