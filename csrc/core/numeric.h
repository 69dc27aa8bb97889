// Conversions of the parameter types: exact to float32, and rounded to nearest even from float64.
// Written with integer arithmetic so that every compiler vectorises them, no matter whether the
// processor has instructions for half precision.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define AUTODROP_HD __host__ __device__
#else
#define AUTODROP_HD
#endif

// Where CUDA's own functions may be used: in the code for a GPU, and in csrc/tests/emulator, which
// compiles that code with a host compiler and brings those functions along.
#if defined(__CUDA_ARCH__) || defined(AUTODROP_EMULATOR)
#define AUTODROP_DEVICE_CODE 1
#endif

namespace autodrop {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

namespace numeric {

template <class To, class From>
AUTODROP_HD static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

AUTODROP_HD static inline float to_float(float x) { return x; }
AUTODROP_HD static inline float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
AUTODROP_HD static inline float to_float(Half x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; both are exact.
  const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t special = magnitude | 0x7f800000u;  // Inf and NaN keep their payload
  return bit_cast<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
}

AUTODROP_HD static inline void from_double(double x, float* out) { *out = static_cast<float>(x); }
AUTODROP_HD static inline void from_double(double x, double* out) { *out = x; }
// Half precision is rounded from float32, as a cast in torch does.
AUTODROP_HD static inline void from_double(double x, BFloat16* out) {
  const float value = static_cast<float>(x);
  std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if (value != value) {
    out->bits = 0x7fc0u;
    return;
  }
  bits += 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<std::uint16_t>(bits >> 16);
}
AUTODROP_HD static inline void from_double(double x, Half* out) {
  const float value = static_cast<float>(x);
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 2^-1 leaves the subnormal's bits
    half = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(half | sign);
}

}  // namespace numeric
}  // namespace autodrop
