// The CPU core under AddressSanitizer and UBSan: every kernel set that runs here, odd lengths,
// misaligned starts, empty tensors, values that are not finite, compared with plain loops.
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/delta.h"
#include "cpu/parallel.h"
#include "tests/support.h"

namespace {

using namespace autodrop;
using namespace autodrop::testing;

void test_model(const cpu::Kernels* kernels, Model& model, int threads) {
  const cpu::Plan plan = plan_of(model);
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
  cpu::accumulate(plan_of(model), model.running.get(), nullptr, true, 1.0f, 2, kernels);
  CHECK(std::memcmp(model.running.get(), model.tensors[0].data(),
                    static_cast<std::size_t>(model.tensors[0].length) * 4) == 0,
        "a streamed first step differs from the parameters");
}

void test_not_finite(const cpu::Kernels* kernels) {
  Model model({{DType::kFloat32, 20}, {DType::kFloat32, 9}}, 0, 32, 7);
  set_element(model.tensors[1].data(), DType::kFloat32, 8,
              std::numeric_limits<double>::quiet_NaN());
  const cpu::Plan plan = plan_of(model);
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
