// One element of close() in delta form.
//
// The mean m of a window is rarely a float32. What rounding it to M takes away, M - m, is as large
// as the displacement itself where steps are tiny, so it must not be lost: it starts the next sum,
// and it is needed once more when that sum is closed. A fourth arena would hold it; instead the low
// byte of `previous` does, as a multiple of |M| 2^-31 (|M - m| is at most |M| 2^-24). The 16 bits
// of mantissa that this leaves to the previous displacement move an angle by less than 1e-5 of a
// radian, divided by the square root of the number of elements.
//
// Every operation is rounded as written: compile without contraction.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/numeric.h"

namespace autodrop {

constexpr double kResidualUnit = 0x1p-31;
constexpr double kLargestCode = 127.0;

// k s_{i-1}, from the upper 24 bits of a packed element.
AUTODROP_HD static inline float unpack_displacement(float packed) {
  const std::uint32_t bits = numeric::bit_cast<std::uint32_t>(packed);
  return numeric::bit_cast<float>(bits & 0xffffff00u);
}

// (M - m) / (|M| 2^-31), from its low byte.
AUTODROP_HD static inline double unpack_code(float packed) {
  const std::uint32_t bits = numeric::bit_cast<std::uint32_t>(packed);
  return static_cast<double>(static_cast<std::int32_t>(bits << 24) >> 24);
}

AUTODROP_HD static inline float pack(float displacement, double code) {
  const std::uint32_t bits = numeric::bit_cast<std::uint32_t>(displacement);
  const std::uint32_t low = static_cast<std::uint32_t>(static_cast<std::int32_t>(code)) & 0xffu;
  return numeric::bit_cast<float>(((bits + 0x80u) & 0xffffff00u) | low);
}

AUTODROP_HD static inline double magnitude(float x) {
  return static_cast<double>(
      numeric::bit_cast<float>(numeric::bit_cast<std::uint32_t>(x) & 0x7fffffffu));
}

struct ClosedElement {
  double displacement;           // k s_i
  double previous_displacement;  // k s_{i-1}
  double mean;                   // m_i rounded to float32
};

// `running` holds k s_i. Moves `mean` on, packs `running` for its life as the next `previous`, and
// leaves in `previous` the start of the next running sum.
AUTODROP_HD static inline ClosedElement close_delta_element(float& running, float& previous,
                                                            float& mean, double window,
                                                            double per_step) {
  const double d0 = static_cast<double>(running);
  const double d1 = static_cast<double>(unpack_displacement(previous));
  const double residual = unpack_code(previous) * (magnitude(mean) * kResidualUnit);
  const double exact = (static_cast<double>(mean) - residual) + d0 * per_step;
  const float rounded = static_cast<float>(exact);
  const double unit = magnitude(rounded) * kResidualUnit;
  const double ratio = (static_cast<double>(rounded) - exact) / unit;
  const double nearest = (ratio + 0x1.8p52) - 0x1.8p52;  // to even
  double code = nearest < -kLargestCode ? -kLargestCode : nearest;
  code = code > kLargestCode ? kLargestCode : code;
  code = ratio == ratio ? code : 0.0;  // 0 / 0 where the mean is exactly zero
  running = pack(running, code);
  previous = static_cast<float>((code * unit) * window);
  mean = rounded;
  return {d0, d1, static_cast<double>(rounded)};
}

// ---- the same element on a GPU -----------------------------------------------------------------
//
// float64 instructions are what close_delta_element has too many of for a consumer GPU, and a
// float64 division alone is a dozen of them. The code is a small integer, so the quotient is
// estimated in float32, and divided in float64 only where the estimate is too near the middle
// between two codes. Every result has the bits of close_delta_element.

// a / b to 2 units in the last place, for b from 2^-126 to 2^126.
AUTODROP_HD static inline float divide_roughly(float a, float b) {
#if defined(AUTODROP_DEVICE_CODE)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// Inlined for every element, the division would be a quarter of close_delta's instructions, for one
// element in thousands.
#if defined(__CUDACC__)
#define AUTODROP_RARE __noinline__
#else
#define AUTODROP_RARE inline
#endif

// The code as close_delta_element finds it, for values of any size.
[[maybe_unused]] AUTODROP_HD static AUTODROP_RARE float divided_code(double lost, double unit) {
  const double ratio = lost / unit;
  const double nearest = (ratio + 0x1.8p52) - 0x1.8p52;  // to even
  double code = nearest < -kLargestCode ? -kLargestCode : nearest;
  code = code > kLargestCode ? kLargestCode : code;
  return ratio == ratio ? static_cast<float>(code) : 0.0f;
}

// The same code. `lost` is M - m, `unit` is |M| 2^-31.
AUTODROP_HD static inline float residual_code(double lost, double unit, float rounded) {
  // Where |M| is in this range, `lost` and the quotient are normal float32 numbers or far below
  // half a code, and nothing overflows.
  const float size =
      numeric::bit_cast<float>(numeric::bit_cast<std::uint32_t>(rounded) & 0x7fffffffu);
  const float estimate = divide_roughly(static_cast<float>(lost) * 0x1p31f, size);
  const float nearest = (estimate + 0x1.8p23f) - 0x1.8p23f;
  const float distance = estimate - nearest;  // exact
  // |lost| is at most |M| 2^-24, so the quotient is at most 128, and three roundings of 2^-22 at
  // most make the estimate wrong by less than 2^-13.
  constexpr float kSure = 0.5f - 0x1p-13f;
  if (size > 0x1p-60f && size < 0x1p90f && distance > -kSure && distance < kSure) {
    const float code = nearest < -127.0f ? -127.0f : nearest;
    return code > 127.0f ? 127.0f : code;
  }
  return divided_code(lost, unit);
}

AUTODROP_HD static inline ClosedElement close_delta_element_on_gpu(float& running, float& previous,
                                                                   float& mean, double window,
                                                                   double per_step) {
  const double d0 = static_cast<double>(running);
  const double d1 = static_cast<double>(unpack_displacement(previous));
  const double residual = unpack_code(previous) * (magnitude(mean) * kResidualUnit);
  const double exact = (static_cast<double>(mean) - residual) + d0 * per_step;
  const float rounded = static_cast<float>(exact);
  const double new_mean = static_cast<double>(rounded);
  const double unit = std::fabs(new_mean) * kResidualUnit;
  const float code = residual_code(new_mean - exact, unit, rounded);
  const std::uint32_t low = static_cast<std::uint32_t>(static_cast<std::int32_t>(code)) & 0xffu;
  const std::uint32_t bits = numeric::bit_cast<std::uint32_t>(running);
  running = numeric::bit_cast<float>(((bits + 0x80u) & 0xffffff00u) | low);
  previous = static_cast<float>((static_cast<double>(code) * unit) * window);
  mean = rounded;
  return {d0, d1, new_mean};
}

}  // namespace autodrop
