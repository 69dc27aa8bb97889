// The CPU core under AddressSanitizer and UBSan: every kernel set that runs here, odd lengths,
// misaligned starts, empty tensors, values that are not finite. Buffers end exactly where the data
// does, so that a read or write past the end is caught; results are compared with plain loops.
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
#include "cpu/parallel.h"

namespace {

using namespace autodrop;

int failures = 0;
long checks = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    ++checks;                                                     \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Float32 arena, aligned as torch's allocator does, and not a byte longer than `elements`.
std::unique_ptr<float[], Free> arena_of(std::int64_t elements) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<std::size_t>(elements ? elements : 1) * 4) != 0) {
    std::abort();
  }
  std::memset(memory, 0, static_cast<std::size_t>(elements) * 4);
  return std::unique_ptr<float[], Free>(static_cast<float*>(memory));
}

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

double element(const char* data, DType dtype, std::int64_t i) {
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

void set_element(char* data, DType dtype, std::int64_t i, double value) {
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

  cpu::Plan plan() const {
    return {chunks.data(), static_cast<std::int64_t>(chunks.size()), tensor_chunks.data(),
            weights.data(), static_cast<std::int64_t>(tensors.size())};
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

bool same(float a, float b) {
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

void check_sums(const Sums& got, const Expected& wanted, const char* what) {
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

void test_model(const cpu::Kernels* kernels, Model& model, int threads) {
  const cpu::Plan plan = model.plan();
  const double window = 4.0;
  std::vector<Sums> partials(model.chunks.size()), per_tensor(model.tensors.size());

  // Sum form: overwrite, add, add with a weight.
  cpu::accumulate(plan, model.running.get(), nullptr, true, 1.0f, threads, kernels);
  std::vector<float> expected(static_cast<std::size_t>(model.elements));
  model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
    expected[static_cast<std::size_t>(at)] = static_cast<float>(element(t.data(), t.dtype, i));
  });
  const auto compare = [&](const float* arena, const char* what) {
    model.each([&](Tensor&, std::int64_t i, std::int64_t at) {
      const float wanted = expected[static_cast<std::size_t>(at)];
      CHECK(same(arena[at], wanted), "%s element %lld: %a, not %a", what, static_cast<long long>(i),
            arena[at], wanted);
    });
  };
  compare(model.running.get(), "first");
  model.move(1.0625);
  cpu::accumulate(plan, model.running.get(), nullptr, false, 1.0f, threads, kernels);
  model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
    expected[static_cast<std::size_t>(at)] += static_cast<float>(element(t.data(), t.dtype, i));
  });
  compare(model.running.get(), "added");
  cpu::accumulate(plan, model.running.get(), nullptr, false, 0.3f, threads, kernels);
  model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
    const float term = static_cast<float>(element(t.data(), t.dtype, i)) * 0.3f;
    expected[static_cast<std::size_t>(at)] += term;
  });
  compare(model.running.get(), "weighted");

  // close_sum
  model.move(0.9375);
  cpu::accumulate(plan, model.previous.get(), nullptr, true, 2.0f, threads, kernels);
  model.move(1.25);
  cpu::accumulate(plan, model.third.get(), nullptr, true, 2.5f, threads, kernels);
  const Sums sums =
      cpu::close_sum(plan, model.running.get(), model.previous.get(), model.third.get(), window,
                     partials.data(), per_tensor.data(), threads, kernels);
  Expected wanted;
  model.each([&](Tensor& t, std::int64_t, std::int64_t at) {
    const double w = model.weight(t) / (window * window);
    wanted.add(w, model.running[at] - model.previous[at], model.previous[at] - model.third[at], w,
               model.running[at]);
  });
  check_sums(sums, wanted, "close_sum");

  // Delta form: first, add, close against the element function on copies.
  cpu::accumulate(plan, model.third.get(), nullptr, true, 1.0f, threads, kernels);
  model.move(1.001);
  cpu::accumulate(plan, model.running.get(), model.third.get(), true, 1.0f, threads, kernels);
  model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
    const double difference = element(t.data(), t.dtype, i) - model.third[at];
    expected[static_cast<std::size_t>(at)] = static_cast<float>(difference);
  });
  compare(model.running.get(), "delta first");
  cpu::accumulate(plan, model.running.get(), model.third.get(), false, 1.0f, threads, kernels);
  model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
    const double difference = element(t.data(), t.dtype, i) - model.third[at];
    expected[static_cast<std::size_t>(at)] += static_cast<float>(difference);
  });
  compare(model.running.get(), "delta added");
  std::vector<float> copies[3];
  for (auto& copy : copies) copy.resize(static_cast<std::size_t>(model.elements));
  wanted = Expected{};
  model.each([&](Tensor& t, std::int64_t, std::int64_t at) {
    const auto j = static_cast<std::size_t>(at);
    copies[0][j] = model.running[at];
    copies[1][j] = model.previous[at];
    copies[2][j] = model.third[at];
    const ClosedElement closed =
        close_delta_element(copies[0][j], copies[1][j], copies[2][j], window, 1.0 / window);
    wanted.add(model.weight(t) / (window * window), closed.displacement,
               closed.previous_displacement, model.weight(t), closed.mean);
  });
  const Sums closed =
      cpu::close_delta(plan, model.running.get(), model.previous.get(), model.third.get(), window,
                       partials.data(), per_tensor.data(), threads, kernels);
  check_sums(closed, wanted, "close_delta");
  expected = copies[0];
  compare(model.running.get(), "packed");
  expected = copies[1];
  compare(model.previous.get(), "next running");
  expected = copies[2];
  compare(model.third.get(), "mean");

  // write_back, with and without a mean
  for (const bool with_mean : {false, true}) {
    const float* mean = with_mean ? model.third.get() : nullptr;
    cpu::write_back(plan, model.previous.get(), mean, 0.125, threads, kernels);
    model.each([&](Tensor& t, std::int64_t i, std::int64_t at) {
      char value[8] = {};
      set_element(value, t.dtype, 0,
                  (with_mean ? double{model.third[at]} : 0.0) + 0.125 * model.previous[at]);
      CHECK(std::memcmp(value, t.data() + i * size_of(t.dtype),
                        static_cast<std::size_t>(size_of(t.dtype))) == 0,
            "write_back element %lld", static_cast<long long>(i));
    });
  }
}

// A plan large enough for the streaming stores of a first step.
void test_streaming(const cpu::Kernels* kernels) {
  Model model({{DType::kFloat32, (std::int64_t{8} << 20) + 77}}, 1, 16'384, 4);
  cpu::accumulate(model.plan(), model.running.get(), nullptr, true, 1.0f, 2, kernels);
  CHECK(std::memcmp(model.running.get(), model.tensors[0].data(),
                    static_cast<std::size_t>(model.tensors[0].length) * 4) == 0,
        "a streamed first step differs from the parameters");
}

void test_not_finite(const cpu::Kernels* kernels) {
  Model model({{DType::kFloat32, 20}, {DType::kFloat32, 9}}, 0, 32, 7);
  set_element(model.tensors[1].data(), DType::kFloat32, 8,
              std::numeric_limits<double>::quiet_NaN());
  const cpu::Plan plan = model.plan();
  std::vector<Sums> partials(model.chunks.size()), per_tensor(2);
  cpu::accumulate(plan, model.running.get(), nullptr, true, 1.0f, 1, kernels);
  const Sums sums =
      cpu::close_sum(plan, model.running.get(), model.previous.get(), model.third.get(), 1.0,
                     partials.data(), per_tensor.data(), 1, kernels);
  CHECK(std::isnan(sums.norm), "NaN must reach the total, got %g", sums.norm);
  CHECK(std::isfinite(per_tensor[0].norm), "a clean tensor got %g", per_tensor[0].norm);
  CHECK(std::isnan(per_tensor[1].norm), "NaN must reach its tensor, got %g", per_tensor[1].norm);
}

}  // namespace

int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  int sets = 0;
  for (const char* name : {"baseline", "avx2"}) {
    const cpu::Kernels* kernels = cpu::kernels_named(name);
    if (kernels == nullptr) {
      std::printf("skipped: this processor does not run the %s kernels\n", name);
      continue;
    }
    ++sets;
    for (const int threads : {1, 2, 5}) {
      for (const std::int64_t shift : {0, 1, 3}) {
        for (const DType dtype : dtypes) {
          std::vector<std::pair<DType, std::int64_t>> shapes;
          for (const std::int64_t n : {0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 130}) {
            shapes.emplace_back(dtype, n);
          }
          Model odd(shapes, shift, 64, 1);
          test_model(kernels, odd, threads);
        }
        Model mixed({{DType::kFloat32, 45'001},
                     {DType::kBFloat16, 30'007},
                     {DType::kFloat64, 0},
                     {DType::kFloat16, 20'011},
                     {DType::kFloat64, 9'999}},
                    shift, 4096, 2);
        test_model(kernels, mixed, threads);
      }
    }
    Model nothing({}, 0, 64, 3);
    test_model(kernels, nothing, 2);
    test_streaming(kernels);
    test_not_finite(kernels);
  }
  std::printf("%ld checks with %d kernel sets, %d failures\n", checks, sets, failures);
  return failures == 0 && sets > 0 ? 0 : 1;
}
