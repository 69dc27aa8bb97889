// Checks that count, and elements of any type, for the C++ tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/numeric.h"
#include "core/tables.h"

namespace autodrop::testing {

inline int failures = 0;
inline long checks = 0;
constexpr int kMostFailures = 50;  // that are printed; what is wrong once is wrong a million times

#define CHECK(condition, ...)                                       \
  do {                                                              \
    ++checks;                                                       \
    if (!(condition)) {                                             \
      ++failures;                                                   \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);   \
      std::printf(__VA_ARGS__);                                     \
      std::printf("\n");                                            \
      if (failures == kMostFailures) {                              \
        std::printf("%ld checks, %d failures\n", checks, failures); \
        std::exit(1);                                               \
      }                                                             \
    }                                                               \
  } while (false)

inline std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

inline double element(const char* data, DType dtype, std::int64_t i) {
  const char* at = data + i * size_of(dtype);
  switch (dtype) {
    case DType::kFloat64: {
      double value;
      std::memcpy(&value, at, 8);
      return value;
    }
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    case DType::kFloat16: {
      Half value;
      std::memcpy(&value, at, 2);
      return numeric::to_float(value);
    }
    default: {
      BFloat16 value;
      std::memcpy(&value, at, 2);
      return numeric::to_float(value);
    }
  }
}

inline void set_element(char* data, DType dtype, std::int64_t i, double value) {
  char* at = data + i * size_of(dtype);
  const auto put = [&](auto converted) {
    numeric::from_double(value, &converted);
    std::memcpy(at, &converted, sizeof(converted));
  };
  switch (dtype) {
    case DType::kFloat64:
      return put(double{});
    case DType::kFloat32:
      return put(float{});
    case DType::kFloat16:
      return put(Half{});
    default:
      return put(BFloat16{});
  }
}

}  // namespace autodrop::testing
