// The CPU core under AddressSanitizer and UBSan: every kernel set that runs here, odd lengths,
// misaligned starts, empty tensors, values that are not finite, compared with plain loops.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <thread>
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

// Which chunks each thread was given, by kernels that touch no memory.
struct Recorded {
  std::mutex mutex;
  std::vector<std::pair<const Chunk*, const Chunk*>> shares;
  std::set<std::thread::id> threads;

  void add(const Chunk* begin, const Chunk* end) {
    const std::lock_guard<std::mutex> lock(mutex);
    shares.emplace_back(begin, end);
    threads.insert(std::this_thread::get_id());
  }
};
Recorded* recorded = nullptr;

const cpu::Kernels kRecording = {
    "recording",
    [](const Chunk* begin, const Chunk* end, float*, const float*, bool, float, bool) {
      recorded->add(begin, end);
    },
    [](const Chunk* begin, const Chunk* end, const float*, const float*, const float*, Sums*) {
      recorded->add(begin, end);
    },
    [](const Chunk* begin, const Chunk* end, float*, float*, float*, double, Sums*) {
      recorded->add(begin, end);
    },
    [](const Chunk* begin, const Chunk* end, const float*, const float*, double) {
      recorded->add(begin, end);
    },
};

// How many threads an operation uses follows from the bytes it moves, and every chunk is in one
// share.
void test_number_of_threads() {
  struct Operation {
    const char* name;
    std::int64_t bytes;  // moved for each element
    void (*run)(const cpu::Plan&, int threads, Sums* partials, Sums* per_tensor);
  };
  static float arena[1];  // stands for any: kRecording reads none
  const Operation operations[] = {
      {"accumulate", 12,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::accumulate(plan, arena, nullptr, false, 1.0f, threads, &kRecording);
       }},
      {"accumulate, first", 8,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::accumulate(plan, arena, nullptr, true, 1.0f, threads, &kRecording);
       }},
      {"accumulate, delta", 16,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::accumulate(plan, arena, arena, false, 1.0f, threads, &kRecording);
       }},
      {"accumulate, delta, first", 12,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::accumulate(plan, arena, arena, true, 1.0f, threads, &kRecording);
       }},
      {"close_sum", 12,
       [](const cpu::Plan& plan, int threads, Sums* partials, Sums* per_tensor) {
         cpu::close_sum(plan, arena, arena, arena, 2.0, partials, per_tensor, threads, &kRecording);
       }},
      {"close_delta", 24,
       [](const cpu::Plan& plan, int threads, Sums* partials, Sums* per_tensor) {
         cpu::close_delta(plan, arena, arena, arena, 2.0, partials, per_tensor, threads,
                          &kRecording);
       }},
      {"write_back", 8,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::write_back(plan, arena, nullptr, 1.0, threads, &kRecording);
       }},
      {"write_back, delta", 12,
       [](const cpu::Plan& plan, int threads, Sums*, Sums*) {
         cpu::write_back(plan, arena, arena, 1.0, threads, &kRecording);
       }},
  };
  const std::int64_t share = cpu::kBytesPerThread;
  for (const Operation& operation : operations) {
    for (const int allowed : {1, 2, 5}) {
      for (const std::int64_t bytes :
           {std::int64_t{0}, std::int64_t{1} << 20, share, 2 * share - 24, 2 * share,
            3 * share - 24, 3 * share, 5 * share, 100 * share}) {
        // 64 elements a chunk, all in one tensor.
        const std::int64_t elements = (bytes + operation.bytes - 1) / operation.bytes;
        std::vector<Chunk> chunks;
        for (std::int64_t at = 0; at < elements; at += 64) {
          chunks.push_back({0, at, std::min<std::int64_t>(64, elements - at), 0});
        }
        const std::int64_t n = static_cast<std::int64_t>(chunks.size());
        const std::int64_t tensor_chunks[] = {0, n};
        const double weight = 1.0;
        const cpu::Plan plan{chunks.data(), n, tensor_chunks, &weight, 1};
        std::vector<Sums> partials(chunks.size()), per_tensor(1);
        Recorded now;
        recorded = &now;
        operation.run(plan, allowed, partials.data(), per_tensor.data());
        recorded = nullptr;

        const std::int64_t wanted = std::clamp<std::int64_t>(bytes / share, 1, allowed);
        CHECK(static_cast<std::int64_t>(now.threads.size()) == wanted,
              "%s of %lld bytes used %zu of %d threads, not %lld", operation.name,
              static_cast<long long>(bytes), now.threads.size(), allowed,
              static_cast<long long>(wanted));
        CHECK(static_cast<std::int64_t>(now.shares.size()) == wanted, "%zu shares",
              now.shares.size());
        std::sort(now.shares.begin(), now.shares.end());
        const Chunk* end = chunks.data();
        for (const auto& [first, last] : now.shares) {
          CHECK(first == end && last >= first, "%s: a chunk is missing or done twice",
                operation.name);
          CHECK((last - first) <= (n + wanted - 1) / wanted + 1, "%s: %lld of %lld chunks at once",
                operation.name, static_cast<long long>(last - first), static_cast<long long>(n));
          end = last;
        }
        CHECK(end == chunks.data() + n, "%s: the last chunks are missing", operation.name);
      }
    }
  }
}

// A model that is large enough for several threads in every operation has the same bits whatever
// their number.
void test_bits_do_not_depend_on_threads(const cpu::Kernels* kernels) {
  const std::int64_t large = 3 * cpu::kBytesPerThread / 8;  // three threads where 8 bytes are moved
  const std::vector<std::pair<DType, std::int64_t>> shapes = {{DType::kFloat32, large / 2 + 3},
                                                              {DType::kBFloat16, 30'007},
                                                              {DType::kFloat64, 9'999},
                                                              {DType::kFloat16, large / 4},
                                                              {DType::kFloat32, large / 4}};
  Model one(shapes, 1, 16'384, 5);
  std::vector<Sums> partials(one.chunks.size()), per_tensor(one.tensors.size());
  const auto run = [&](Model& model, int threads) {
    const cpu::Plan plan = plan_of(model);
    std::vector<Sums> sums;
    cpu::accumulate(plan, model.third.get(), nullptr, true, 1.0f, threads, kernels);
    cpu::accumulate(plan, model.previous.get(), nullptr, true, 0.5f, threads, kernels);
    cpu::accumulate(plan, model.running.get(), model.third.get(), true, 3.0f, threads, kernels);
    model.move(1.001);
    cpu::accumulate(plan, model.running.get(), model.third.get(), false, 1.0f, threads, kernels);
    sums.push_back(cpu::close_sum(plan, model.running.get(), model.previous.get(),
                                  model.third.get(), 4.0, partials.data(), per_tensor.data(),
                                  threads, kernels));
    sums.push_back(cpu::close_delta(plan, model.running.get(), model.previous.get(),
                                    model.third.get(), 4.0, partials.data(), per_tensor.data(),
                                    threads, kernels));
    sums.insert(sums.end(), per_tensor.begin(), per_tensor.end());
    cpu::write_back(plan, model.previous.get(), model.third.get(), 0.125, threads, kernels);
    return sums;
  };
  const std::vector<Sums> wanted = run(one, 1);
  for (const int threads : {2, 3, 5}) {
    Model model(shapes, 1, 16'384, 5);
    const std::vector<Sums> got = run(model, threads);
    const std::size_t bytes = static_cast<std::size_t>(one.offsets.back()) * sizeof(float);
    CHECK(std::memcmp(got.data(), wanted.data(), got.size() * sizeof(Sums)) == 0,
          "other sums with %d threads", threads);
    CHECK(std::memcmp(model.running.get(), one.running.get(), bytes) == 0, "running");
    CHECK(std::memcmp(model.previous.get(), one.previous.get(), bytes) == 0, "previous");
    CHECK(std::memcmp(model.third.get(), one.third.get(), bytes) == 0, "third");
    for (std::size_t t = 0; t < model.tensors.size(); ++t) {
      CHECK(model.tensors[t].memory == one.tensors[t].memory, "tensor %zu written back", t);
    }
  }
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
  test_number_of_threads();
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
    test_bits_do_not_depend_on_threads(kernels);
    test_not_finite(kernels);
  }
  std::printf("%ld checks with %d kernel sets, %d failures\n", checks, sets, failures);
  return failures == 0 && sets > 0 ? 0 : 1;
}
