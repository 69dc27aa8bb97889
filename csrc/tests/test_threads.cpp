// The per-thread work of the CUDA kernels (core/thread_work.h), run on the CPU for every block and
// thread of the real launch shapes, under AddressSanitizer and UBSan. The arenas must have the bits
// of the CPU kernels, and no element may be touched by two threads.
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/thread_work.h"
#include "cpu/parallel.h"
#include "tests/support.h"

namespace {

using namespace autodrop;
using namespace autodrop::testing;

// As in cuda/kernels.cu and autodrop_ext/ops/plan.py.
constexpr int kThreads = 256, kWarp = 32;
constexpr std::int64_t kSmallChunk = 1024, kSmallChunksPerTile = 16;

std::vector<Tile> tiles_of(const Model& model) {
  std::vector<Tile> tiles;
  bool open = false;
  for (std::size_t c = 0; c < model.chunks.size(); ++c) {
    const bool small = model.chunks[c].length <= kSmallChunk;
    if (small && open && tiles.back().num_chunks < kSmallChunksPerTile) {
      ++tiles.back().num_chunks;
    } else {
      tiles.push_back({static_cast<std::int64_t>(c), 1});
    }
    open = small;
  }
  return tiles;
}

// Calls work(chunk index, lane, lanes) for every block and thread, as for_chunks does on a GPU.
template <class Work>
void for_threads(const Model& model, const Work& work) {
  for (const Tile& tile : tiles_of(model)) {
    for (int thread = 0; thread < kThreads; ++thread) {
      if (tile.num_chunks == 1) {
        work(tile.first_chunk, thread, kThreads);
        continue;
      }
      for (std::int64_t c = thread / kWarp; c < tile.num_chunks; c += kThreads / kWarp) {
        work(tile.first_chunk + c, thread % kWarp, kWarp);
      }
    }
  }
}

template <bool kDelta, bool kFirst>
void accumulate(Model& model, float weight) {
  for_threads(model, [&](std::int64_t c, int lane, int lanes) {
    const Chunk& chunk = model.chunks[static_cast<std::size_t>(c)];
    const float* mean = kDelta ? model.third.get() : nullptr;
    if (weight == 1.0f) {
      thread_work::accumulate<kDelta, kFirst, false>(chunk, model.running.get(), mean, weight, lane,
                                                     lanes);
    } else {
      thread_work::accumulate<kDelta, kFirst, true>(chunk, model.running.get(), mean, weight, lane,
                                                    lanes);
    }
  });
}

void compare(Model& got, Model& wanted, const char* what) {
  got.each([&](Tensor&, std::int64_t i, std::int64_t at) {
    const float* pairs[3][2] = {{got.running.get(), wanted.running.get()},
                                {got.previous.get(), wanted.previous.get()},
                                {got.third.get(), wanted.third.get()}};
    for (const auto& [a, b] : pairs) {
      CHECK(same(a[at], b[at]), "%s element %lld: %a, not %a", what, static_cast<long long>(i),
            a[at], b[at]);
    }
  });
}

// The three passes of a close, with the same lanes adding the same rows.
template <class CloseChunk>
Sums close(Model& model, double displacement_scale, double mean_scale, const CloseChunk& chunk) {
  std::vector<Sums> partials(model.chunks.size()), per_tensor;
  for_threads(model, [&](std::int64_t c, int lane, int lanes) {
    thread_work::add_sums(partials[static_cast<std::size_t>(c)],
                          chunk(model.chunks[static_cast<std::size_t>(c)], lane, lanes));
  });
  const auto block = [&](const std::vector<Sums>& rows, const double* weights, std::int64_t begin,
                         std::int64_t end) {
    Sums sums{};
    for (int lane = 0; lane < kThreads; ++lane) {
      thread_work::add_sums(
          sums, thread_work::add_rows(rows.data(), weights, begin, end, lane, kThreads));
    }
    return sums;
  };
  for (std::size_t t = 0; t < model.tensors.size(); ++t) {
    Sums sums = block(partials, nullptr, model.tensor_chunks[t], model.tensor_chunks[t + 1]);
    sums.dot *= displacement_scale;
    sums.norm *= displacement_scale;
    sums.previous_norm *= displacement_scale;
    sums.mean_norm *= mean_scale;
    per_tensor.push_back(sums);
  }
  return block(per_tensor, model.weights.data(), 0,
               static_cast<std::int64_t>(model.tensors.size()));
}

Expected as_expected(const Sums& sums) {
  Expected expected;
  expected.dot = sums.dot;
  expected.norm = sums.norm;
  expected.previous_norm = sums.previous_norm;
  expected.mean_norm = sums.mean_norm;
  return expected;
}

using Shapes = std::vector<std::pair<DType, std::int64_t>>;

void test_model(const Shapes& shapes, std::int64_t shift, std::int64_t chunk_elements,
                double poison) {
  Model gpu(shapes, shift, chunk_elements, 11), cpu(shapes, shift, chunk_elements, 11);
  if (poison != 0.0 && !gpu.tensors.empty()) {
    for (Model* model : {&gpu, &cpu}) {
      Tensor& last = model->tensors.back();
      if (last.length > 0) set_element(last.data(), last.dtype, last.length - 1, poison);
    }
  }
  const cpu::Kernels* kernels = cpu::kernels_named("baseline");
  const cpu::Plan plan = plan_of(cpu);
  const auto move = [&](double factor) {
    gpu.move(factor);
    cpu.move(factor);
  };
  const double window = 3.0;
  std::vector<Sums> partials(cpu.chunks.size()), per_tensor(cpu.tensors.size());

  // Delta form first: its mean is the first iterate, its previous displacement starts from zero.
  cpu::accumulate(plan, cpu.third.get(), nullptr, true, 1.0f, 1, kernels);
  gpu.each([&](Tensor&, std::int64_t, std::int64_t at) { gpu.third[at] = cpu.third[at]; });
  for (int closed = 0; closed < 2; ++closed) {
    for (int step = 0; step < 3; ++step) {
      move(1.0 + 1e-3 * (step + closed));
      const bool first = closed == 0 && step == 0;
      const float weight = step == 1 ? 0.3f : 1.0f;
      first ? accumulate<true, true>(gpu, weight) : accumulate<true, false>(gpu, weight);
      cpu::accumulate(plan, cpu.running.get(), cpu.third.get(), first, weight, 1, kernels);
      compare(gpu, cpu, "delta accumulate");
    }
    const Sums got = close(gpu, 1 / (window * window), 1.0, [&](const Chunk& c, int lane, int n) {
      return thread_work::close_delta(c, gpu.running.get(), gpu.previous.get(), gpu.third.get(),
                                      window, lane, n);
    });
    const Sums wanted =
        cpu::close_delta(plan, cpu.running.get(), cpu.previous.get(), cpu.third.get(), window,
                         partials.data(), per_tensor.data(), 1, kernels);
    compare(gpu, cpu, "close_delta");
    if (poison == 0.0) check_sums(got, as_expected(wanted), "close_delta");
    for (Model* model : {&gpu, &cpu}) model->running.swap(model->previous);
  }

  // Sum form
  for (int step = 0; step < 3; ++step) {
    move(0.97);
    const float weight = step == 2 ? 2.5f : 1.0f;
    step == 0 ? accumulate<false, true>(gpu, weight) : accumulate<false, false>(gpu, weight);
    cpu::accumulate(plan, cpu.running.get(), nullptr, step == 0, weight, 1, kernels);
    compare(gpu, cpu, "sum accumulate");
  }
  const double scale = 1 / (window * window);
  const Sums got = close(gpu, scale, scale, [&](const Chunk& c, int lane, int n) {
    return thread_work::close_sum(c, gpu.running.get(), gpu.previous.get(), gpu.third.get(), lane,
                                  n);
  });
  const Sums wanted = cpu::close_sum(plan, cpu.running.get(), cpu.previous.get(), cpu.third.get(),
                                     window, partials.data(), per_tensor.data(), 1, kernels);
  if (poison == 0.0) {
    check_sums(got, as_expected(wanted), "close_sum");
  } else if (!shapes.empty() && shapes.back().second > 0) {
    CHECK(!std::isfinite(got.norm) && !std::isfinite(wanted.norm), "got %g", got.norm);
  }

  // write_back
  for (const bool with_mean : {false, true}) {
    for_threads(gpu, [&](std::int64_t c, int lane, int lanes) {
      thread_work::write_back(gpu.chunks[static_cast<std::size_t>(c)], gpu.running.get(),
                              with_mean ? gpu.third.get() : nullptr, 0.25, lane, lanes);
    });
    cpu::write_back(plan, cpu.running.get(), with_mean ? cpu.third.get() : nullptr, 0.25, 1,
                    kernels);
    for (std::size_t t = 0; t < gpu.tensors.size(); ++t) {
      CHECK(gpu.tensors[t].memory == cpu.tensors[t].memory, "write_back, tensor %zu", t);
    }
  }
}

// Every element of every chunk belongs to exactly one thread: adding 1 everywhere gives 1
// everywhere.
void test_coverage(std::int64_t length, std::int64_t shift, DType dtype) {
  Model model({{dtype, length}}, shift, 8192, 5);
  for (std::int64_t i = 0; i < length; ++i) set_element(model.tensors[0].data(), dtype, i, 1.0);
  accumulate<false, false>(model, 1.0f);
  for (std::int64_t i = 0; i < length; ++i) {
    CHECK(model.running[i] == 1.0f, "element %lld of %lld was added %g times",
          static_cast<long long>(i), static_cast<long long>(length),
          static_cast<double>(model.running[i]));
  }
}

}  // namespace

int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  const double poisons[] = {0.0, std::numeric_limits<double>::quiet_NaN(),
                            std::numeric_limits<double>::infinity()};
  for (const std::int64_t shift : {0, 1, 2, 3, 5}) {
    for (const DType dtype : dtypes) {
      Shapes shapes;
      for (const std::int64_t n : {0, 1, 3, 4, 7, 8, 9, 31, 33, 127, 128, 129, 255, 1023, 1024}) {
        shapes.emplace_back(dtype, n);
      }
      for (const double poison : poisons) test_model(shapes, shift, 8192, poison);
      // One tensor beyond every boundary: a packet, a warp, a block, what is in flight, a chunk.
      for (const std::int64_t n : {1025, 4095, 4096, 4097, 8191, 8192, 8193, 20'011}) {
        test_coverage(n, shift, dtype);
        test_model({{dtype, n}}, shift, 8192, 0.0);
      }
    }
    test_model({{DType::kFloat32, 9'001},
                {DType::kBFloat16, 64},
                {DType::kFloat64, 0},
                {DType::kFloat16, 17'003},
                {DType::kFloat64, 65},
                {DType::kBFloat16, 8'200}},
               shift, 8192, 0.0);
  }
  test_model({}, 0, 8192, 0.0);
  test_model(Shapes(300, {DType::kFloat32, 64}), 0, 8192, 0.0);
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
