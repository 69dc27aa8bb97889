// What the C++ tests share: checks that count, models whose buffers end exactly where the data
// does, so that a read or write past the end is caught, and expected sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/delta.h"
#include "core/numeric.h"
#include "core/tables.h"
#include "cpu/parallel.h"

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

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Float32 arena, aligned as torch's allocator does, and not a byte longer than `elements`.
inline std::unique_ptr<float[], Free> arena_of(std::int64_t elements) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<std::size_t>(elements ? elements : 1) * 4) != 0) {
    std::abort();
  }
  std::memset(memory, 0, static_cast<std::size_t>(elements) * 4);
  return std::unique_ptr<float[], Free>(static_cast<float*>(memory));
}

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

struct Tensor {
  DType dtype;
  std::int64_t length;
  std::vector<char> memory;  // starts `shift` elements before the data
  std::int64_t shift;
  char* data() { return memory.data() + shift * size_of(dtype); }
};

// Tensors, their tables, and three arenas.
struct Model {
  std::vector<Tensor> tensors;
  std::vector<Chunk> chunks;
  std::vector<std::int64_t> tensor_chunks{0}, offsets;
  std::vector<double> weights;
  std::int64_t elements = 0;
  std::unique_ptr<float[], Free> running, previous, third;

  Model(const std::vector<std::pair<DType, std::int64_t>>& shapes, std::int64_t shift,
        std::int64_t chunk_elements, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (const auto& [dtype, length] : shapes) {
      Tensor tensor{dtype, length, {}, shift};
      tensor.memory.resize(static_cast<std::size_t>((length + shift) * size_of(dtype)));
      for (std::int64_t i = 0; i < length; ++i) {
        set_element(tensor.data(), dtype, i, normal(random));
      }
      tensors.push_back(std::move(tensor));
    }
    for (Tensor& tensor : tensors) {
      offsets.push_back(elements);
      for (std::int64_t start = 0; start < tensor.length; start += chunk_elements) {
        const std::int64_t n = std::min(chunk_elements, tensor.length - start);
        chunks.push_back(
            {reinterpret_cast<std::int64_t>(tensor.data() + start * size_of(tensor.dtype)),
             elements + start, n, static_cast<std::int64_t>(tensor.dtype)});
      }
      tensor_chunks.push_back(static_cast<std::int64_t>(chunks.size()));
      weights.push_back(1.0 + static_cast<double>(weights.size()) / 8);
      elements += (tensor.length + 31) / 32 * 32;
    }
    // The last tensor's padding is cut off: nothing may touch it.
    const std::int64_t used = tensors.empty() ? 0 : offsets.back() + tensors.back().length;
    running = arena_of(used);
    previous = arena_of(used);
    third = arena_of(used);
  }

  double weight(const Tensor& tensor) const {
    return weights[static_cast<std::size_t>(&tensor - tensors.data())];
  }

  void move(double factor) {
    for (Tensor& tensor : tensors) {
      for (std::int64_t i = 0; i < tensor.length; ++i) {
        set_element(tensor.data(), tensor.dtype, i,
                    element(tensor.data(), tensor.dtype, i) * factor);
      }
    }
  }

  template <class Visit>
  void each(Visit visit) {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      for (std::int64_t i = 0; i < tensors[t].length; ++i) visit(tensors[t], i, offsets[t] + i);
    }
  }
};

inline bool same(float a, float b) {
  return numeric::bit_cast<std::uint32_t>(a) == numeric::bit_cast<std::uint32_t>(b) ||
         (a != a && b != b);
}

// What the sums should be, added up in order.
struct Expected {
  long double dot = 0, norm = 0, previous_norm = 0, mean_norm = 0;
  void add(double displacement_weight, double d0, double d1, double mean_weight, double m) {
    dot += displacement_weight * d0 * d1;
    norm += displacement_weight * d0 * d0;
    previous_norm += displacement_weight * d1 * d1;
    mean_norm += mean_weight * m * m;
  }
};

inline void check_sums(const Sums& got, const Expected& wanted, const char* what) {
  // float64 against long double over at most 1e5 terms.
  const auto close = [what](double g, long double w, long double scale, const char* sum) {
    CHECK(std::abs(g - w) <= 1e-12L * (scale + 1e-300L), "%s %s: %.17g, not %.17Lg", what, sum, g,
          w);
  };
  close(got.dot, wanted.dot, std::sqrt(wanted.norm * wanted.previous_norm), "dot");
  close(got.norm, wanted.norm, wanted.norm, "norm");
  close(got.previous_norm, wanted.previous_norm, wanted.previous_norm, "previous_norm");
  close(got.mean_norm, wanted.mean_norm, wanted.mean_norm, "mean_norm");
}

inline cpu::Plan plan_of(const Model& model) {
  return {model.chunks.data(), static_cast<std::int64_t>(model.chunks.size()),
          model.tensor_chunks.data(), model.weights.data(),
          static_cast<std::int64_t>(model.tensors.size())};
}

}  // namespace autodrop::testing
