// The CUDA kernels as they are launched (cuda/kernels.cu), run by the emulator and compared with
// the CPU kernels: arenas and parameters bit for bit, sums with trees that are written down here
// once more, from the order that the kernels document. Then the launches themselves: streams,
// devices, errors and captures.
//
//   test_emulated [quick] [SEED...]   with seeds of the order of blocks and threads; 1 by default
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/delta.h"
#include "cpu/parallel.h"
#include "cuda/kernels.h"
#include "emulator.h"
#include "tests/support.h"

namespace {

using namespace autodrop;
using namespace autodrop::testing;

// As in cuda/kernels.cu and autodrop_ext/ops/plan.py.
constexpr int kThreads = 256, kWarp = 32;
constexpr std::int64_t kSmallChunk = 1024, kSmallChunksPerTile = 16, kChunkElements = 8192;
constexpr int kDevice = 1;  // while device 0 is current

using Shapes = std::vector<std::pair<DType, std::int64_t>>;

void good(cudaError_t error, const char* what) {
  CHECK(error == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
}

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

// A model with what a plan on a GPU has.
struct Device {
  Model& model;
  std::vector<Tile> tiles;
  std::vector<Sums> partials, per_row;
  Sums total{}, host{};
  cudaStream_t stream;

  explicit Device(Model& on)
      : model(on),
        tiles(tiles_of(on)),
        partials(on.chunks.size()),
        per_row(on.tensors.size()),
        stream(emulator::new_stream(kDevice)) {}

  cuda::Plan plan() const {
    return {kDevice,
            model.chunks.data(),
            tiles.data(),
            static_cast<std::int64_t>(tiles.size()),
            model.tensor_chunks.data(),
            model.weights.data(),
            static_cast<std::int64_t>(model.tensors.size())};
  }
  // Nothing that an earlier close left can pass for a result.
  cuda::CloseBuffers buffers() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (auto* rows : {&partials, &per_row}) {
      for (Sums& row : *rows) row = {nan, nan, nan, nan};
    }
    total = host = {nan, nan, nan, nan};
    return {partials.data(), per_row.data(), &total, &host};
  }
  void wait() { good(cudaStreamSynchronize(stream), "synchronize"); }
};

// ---- sums, once more --------------------------------------------------------------------------

bool same_bits(double a, double b) {
  return numeric::bit_cast<std::uint64_t>(a) == numeric::bit_cast<std::uint64_t>(b) ||
         (a != a && b != b);
}
bool same_bits(const Sums& a, const Sums& b) {
  return same_bits(a.dot, b.dot) && same_bits(a.norm, b.norm) &&
         same_bits(a.previous_norm, b.previous_norm) && same_bits(a.mean_norm, b.mean_norm);
}

Sums plus(const Sums& a, const Sums& b) {
  return {a.dot + b.dot, a.norm + b.norm, a.previous_norm + b.previous_norm,
          a.mean_norm + b.mean_norm};
}
Sums times(double weight, const Sums& a) {
  return {weight * a.dot, weight * a.norm, weight * a.previous_norm, weight * a.mean_norm};
}

// Lane l and lane l + 16, then 8, 4, 2, 1; warps one after the other.
Sums fold(const std::vector<Sums>& lanes) {
  Sums total{};
  for (std::size_t first = 0; first < lanes.size(); first += kWarp) {
    std::vector<Sums> warp(lanes.begin() + static_cast<std::ptrdiff_t>(first),
                           lanes.begin() + static_cast<std::ptrdiff_t>(first) + kWarp);
    for (std::size_t half = kWarp / 2; half > 0; half /= 2) {
      for (std::size_t l = 0; l < half; ++l) warp[l] = plus(warp[l], warp[l + half]);
    }
    total = first == 0 ? warp[0] : plus(total, warp[0]);
  }
  return total;
}

// Which lane an element of a chunk belongs to: packets of four in turn, then single elements.
int lane_of(std::int64_t i, std::int64_t length, int lanes) {
  const std::int64_t packets = length / 4;
  return static_cast<int>(i < 4 * packets ? i / 4 % lanes : i - 4 * packets);
}

// `terms(i)` gives the four terms of element i of the arenas.
template <class Terms>
void check_sums_of_every_pass(const Device& d, double displacement_scale, double mean_scale,
                              const Terms& terms, const char* what) {
  std::vector<Sums> partials(d.partials.size());
  for (const Tile& tile : d.tiles) {
    const int lanes = tile.num_chunks == 1 ? kThreads : kWarp;
    for (std::int64_t c = tile.first_chunk; c < tile.first_chunk + tile.num_chunks; ++c) {
      const Chunk& chunk = d.model.chunks[static_cast<std::size_t>(c)];
      std::vector<Sums> of_lane(static_cast<std::size_t>(lanes));
      for (std::int64_t i = 0; i < chunk.length; ++i) {
        Sums& sums = of_lane[static_cast<std::size_t>(lane_of(i, chunk.length, lanes))];
        sums = plus(sums, terms(chunk.arena + i));
      }
      partials[static_cast<std::size_t>(c)] = fold(of_lane);
      CHECK(
          same_bits(partials[static_cast<std::size_t>(c)], d.partials[static_cast<std::size_t>(c)]),
          "%s, chunk %lld", what, static_cast<long long>(c));
    }
  }
  std::vector<Sums> per_row, weighted(kThreads);
  for (std::size_t r = 0; r < d.model.tensors.size(); ++r) {
    std::vector<Sums> of_thread(kThreads);
    for (std::int64_t c = d.model.tensor_chunks[r]; c < d.model.tensor_chunks[r + 1]; ++c) {
      Sums& sums = of_thread[static_cast<std::size_t>((c - d.model.tensor_chunks[r]) % kThreads)];
      sums = plus(sums, partials[static_cast<std::size_t>(c)]);
    }
    Sums row = times(displacement_scale, fold(of_thread));
    row.mean_norm = mean_scale * fold(of_thread).mean_norm;
    CHECK(same_bits(row, d.per_row[r]), "%s, row %zu", what, r);
    weighted[r % kThreads] = plus(weighted[r % kThreads], times(d.model.weights[r], row));
  }
  CHECK(same_bits(fold(weighted), d.host), "%s, total: %.17g, not %.17g", what, d.host.norm,
        fold(weighted).norm);
}

// The product of two float32 numbers is exact in float64, so its sum needs no fused operation.
Sums products(double d0, double d1, double mean) {
  return {d0 * d1, d0 * d0, d1 * d1, mean * mean};
}

// ---- arenas -----------------------------------------------------------------------------------

void compare(Model& got, Model& wanted, const char* what) {
  got.each([&](Tensor&, std::int64_t i, std::int64_t at) {
    const float* pairs[3][2] = {{got.running.get(), wanted.running.get()},
                                {got.previous.get(), wanted.previous.get()},
                                {got.third.get(), wanted.third.get()}};
    for (const auto& [a, b] : pairs) {
      CHECK(same(a[at], b[at]), "%s, element %lld: %a, not %a", what, static_cast<long long>(i),
            a[at], b[at]);
    }
  });
}

void test_model(const Shapes& shapes, std::int64_t shift, double poison = 0.0) {
  Model gpu(shapes, shift, kChunkElements, 11), cpu(shapes, shift, kChunkElements, 11);
  for (Model* model : {&gpu, &cpu}) {
    Tensor* last = model->tensors.empty() ? nullptr : &model->tensors.back();
    if (poison != 0.0 && last != nullptr && last->length > 0) {
      set_element(last->data(), last->dtype, last->length - 1, poison);
    }
  }
  Device d(gpu);
  const cuda::Plan on_gpu = d.plan();
  const cpu::Plan on_cpu = plan_of(cpu);
  const cpu::Kernels* kernels = cpu::kernels_named("baseline");
  std::vector<Sums> partials(cpu.chunks.size()), per_tensor(cpu.tensors.size());
  const double window = 3.0, squared = 1.0 / (window * window);

  const auto accumulate = [&](bool to_third, bool delta, bool first, float weight) {
    const auto arena = [&](Model& m) { return (to_third ? m.third : m.running).get(); };
    good(cuda::accumulate(on_gpu, arena(gpu), delta ? gpu.third.get() : nullptr, first, weight,
                          d.stream),
         "accumulate");
    d.wait();  // before the host moves the parameters
    cpu::accumulate(on_cpu, arena(cpu), delta ? cpu.third.get() : nullptr, first, weight, 1,
                    kernels);
    compare(gpu, cpu, delta ? "delta form" : "sum form");
  };

  accumulate(true, false, true, 1.0f);
  for (int closed = 0; closed < 2; ++closed) {
    for (int step = 0; step < 3; ++step) {
      for (Model* model : {&gpu, &cpu}) model->move(1.0 + 1e-3 * (step + closed));
      accumulate(false, true, closed == 0 && step == 0, step == 1 ? 0.3f : 1.0f);
    }
    // What the CPU's own element function makes of copies of the arenas.
    const auto used = static_cast<std::size_t>(gpu.elements);
    std::vector<Sums> terms(used);
    gpu.each([&](Tensor&, std::int64_t, std::int64_t at) {
      float a = gpu.running[at], s = gpu.previous[at], m = gpu.third[at];
      const ClosedElement closed_element = close_delta_element(a, s, m, window, 1.0 / window);
      terms[static_cast<std::size_t>(at)] = products(
          closed_element.displacement, closed_element.previous_displacement, closed_element.mean);
    });
    good(cuda::close_delta(on_gpu, gpu.running.get(), gpu.previous.get(), gpu.third.get(), window,
                           d.buffers(), d.stream),
         "close_delta");
    const Sums wanted =
        cpu::close_delta(on_cpu, cpu.running.get(), cpu.previous.get(), cpu.third.get(), window,
                         partials.data(), per_tensor.data(), 1, kernels);
    compare(gpu, cpu, "close_delta");
    check_sums_of_every_pass(
        d, squared, 1.0, [&](std::int64_t at) { return terms[static_cast<std::size_t>(at)]; },
        "close_delta");
    if (poison == 0.0) {
      check_sums(d.host, {wanted.dot, wanted.norm, wanted.previous_norm, wanted.mean_norm},
                 "close_delta");
    }
    for (Model* model : {&gpu, &cpu}) model->running.swap(model->previous);
  }

  for (int step = 0; step < 3; ++step) {
    for (Model* model : {&gpu, &cpu}) model->move(0.97);
    accumulate(false, false, step == 0, step == 2 ? 2.5f : 1.0f);
  }
  for (Model* model : {&gpu, &cpu}) model->move(1.5);
  accumulate(false, true, true, 0.7f);
  for (Model* model : {&gpu, &cpu}) model->move(1.25);
  accumulate(false, false, true, 3.0f);
  good(cuda::close_sum(on_gpu, gpu.running.get(), gpu.previous.get(), gpu.third.get(), window,
                       d.buffers(), d.stream),
       "close_sum");
  const Sums wanted = cpu::close_sum(on_cpu, cpu.running.get(), cpu.previous.get(), cpu.third.get(),
                                     window, partials.data(), per_tensor.data(), 1, kernels);
  const auto terms = [&](std::int64_t at) {
    const float a = gpu.running[at], p = gpu.previous[at], b = gpu.third[at];
    return products(a - p, p - b, a);
  };
  check_sums_of_every_pass(d, squared, squared, terms, "close_sum");
  if (poison == 0.0) {
    check_sums(d.host, {wanted.dot, wanted.norm, wanted.previous_norm, wanted.mean_norm},
               "close_sum");
  }

  for (const bool with_mean : {false, true}) {
    good(cuda::write_back(on_gpu, gpu.running.get(), with_mean ? gpu.third.get() : nullptr, 0.25,
                          d.stream),
         "write_back");
    d.wait();
    cpu::write_back(on_cpu, cpu.running.get(), with_mean ? cpu.third.get() : nullptr, 0.25, 1,
                    kernels);
    for (std::size_t t = 0; t < gpu.tensors.size(); ++t) {
      CHECK(gpu.tensors[t].memory == cpu.tensors[t].memory, "write_back, tensor %zu", t);
    }
  }
  int device = -1;
  good(cudaGetDevice(&device), "cudaGetDevice");
  CHECK(device == 0, "device %d is current after the calls", device);
  CHECK(emulator::waiting() == 0, "%zu pieces of work wait in other streams", emulator::waiting());
}

void test_models(bool quick) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  const std::vector<std::int64_t> shifts = {1, 0, 2, 3};
  for (std::size_t i = 0; i < (quick ? 1 : shifts.size()); ++i) {
    const std::int64_t shift = shifts[i];
    for (const DType dtype : dtypes) {
      Shapes small;
      for (const std::int64_t n : {0, 1, 3, 4, 7, 8, 9, 31, 33, 127, 128, 129, 255, 1023, 1024}) {
        small.emplace_back(dtype, n);
      }
      test_model(small, shift);
      test_model(small, shift, std::numeric_limits<double>::quiet_NaN());
      test_model({{dtype, 8'193}, {dtype, 5}}, shift);
    }
    test_model({{DType::kFloat32, 9'001},
                {DType::kBFloat16, 64},
                {DType::kFloat64, 0},
                {DType::kFloat16, 17'003},
                {DType::kFloat64, 65},
                {DType::kBFloat16, 8'200}},
               shift, shift == 1 ? std::numeric_limits<double>::infinity() : 0.0);
  }
  // Around every boundary: a packet, what a warp and a block have in flight, a chunk.
  for (const std::int64_t n : {1025, 2047, 4095, 4096, 4099, 8191, 8192, 20'011}) {
    test_model({{DType::kFloat32, n}}, n % 2);
  }
  test_model({}, 0);
  test_model(Shapes(3, {DType::kFloat32, 0}), 0);
  test_model(Shapes(300, {DType::kBFloat16, 64}), 0);  // more rows than a block has threads
}

// ---- the estimated code -----------------------------------------------------------------------

// Codes next to the middle between two integers, where an estimate may go wrong, and anywhere else.
void test_residual_codes() {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> share(-1.0, 1.0);
  std::uniform_int_distribution<int> exponent(-149, 127), code(-129, 129), near(1, 52);
  for (int i = 0; i < 400'000; ++i) {
    const auto mean =
        static_cast<float>(std::ldexp(1.0 + std::abs(share(random)), exponent(random)));
    const double unit = magnitude(mean) * kResidualUnit;
    double ratio = code(random) + 0.5 + share(random) * std::ldexp(1.0, -near(random));
    if (i % 4 == 0) ratio = 128.0 * share(random);
    const double lost = ratio * unit;
    const float got = residual_code(lost, unit, i % 2 ? mean : -mean);
    const float wanted = divided_code(lost, unit);
    CHECK(same(got, wanted), "code of %a: %g, not %g", ratio, static_cast<double>(got),
          static_cast<double>(wanted));
  }
  const float special[] = {0.0f,
                           -0.0f,
                           std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::denorm_min(),
                           std::numeric_limits<float>::max()};
  for (const float a : special) {
    for (const float s : special) {
      for (const float m : special) {
        float on_cpu[3] = {a, s, m}, on_gpu[3] = {a, s, m};
        close_delta_element(on_cpu[0], on_cpu[1], on_cpu[2], 7.0, 1.0 / 7.0);
        close_delta_element_on_gpu(on_gpu[0], on_gpu[1], on_gpu[2], 7.0, 1.0 / 7.0);
        for (int i = 0; i < 3; ++i) {
          CHECK(same(on_gpu[i], on_cpu[i]), "special values %g %g %g: %a, not %a",
                static_cast<double>(a), static_cast<double>(s), static_cast<double>(m), on_gpu[i],
                on_cpu[i]);
        }
      }
    }
  }
}

// ---- launches ---------------------------------------------------------------------------------

// Every call that can fail, in every operation: the error is returned, the next call succeeds, and
// neither an error nor another device is left behind.
void test_errors() {
  Model model({{DType::kFloat32, 9'000}}, 0, kChunkElements, 3);
  Device d(model);
  const cuda::Plan plan = d.plan();
  float *a = model.running.get(), *p = model.previous.get(), *m = model.third.get();
  const std::vector<std::pair<const char*, std::function<cudaError_t()>>> operations = {
      {"accumulate", [&] { return cuda::accumulate(plan, a, nullptr, false, 1.0f, d.stream); }},
      {"close_sum", [&] { return cuda::close_sum(plan, a, p, m, 3.0, d.buffers(), d.stream); }},
      {"close_delta", [&] { return cuda::close_delta(plan, a, p, m, 3.0, d.buffers(), d.stream); }},
      {"write_back", [&] { return cuda::write_back(plan, a, m, 1.0, d.stream); }},
      {"probe", [&] { return cuda::probe(kDevice); }}};
  for (const auto& [name, operation] : operations) {
    std::vector<std::string> calls;
    emulator::on_call([&](const char* call) { calls.emplace_back(call); });
    good(operation(), name);
    emulator::on_call(nullptr);
    CHECK(calls.size() >= 3, "%s made %zu calls", name, calls.size());
    for (std::size_t n = 0; n < calls.size(); ++n) {
      // Fail at the n-th call. The last one restores the device: nobody is told, but nothing stays.
      std::size_t seen = 0;
      emulator::on_call([&](const char* call) {
        if (seen++ == n) emulator::fail_once(call, cudaErrorLaunchFailure);
      });
      const cudaError_t error = operation();
      emulator::on_call(nullptr);
      const bool restoring = n + 1 == calls.size() && calls[n] == "cudaSetDevice";
      CHECK(error == (restoring ? cudaSuccess : cudaErrorLaunchFailure), "%s, %s: %s", name,
            calls[n].c_str(), cudaGetErrorName(error));
      const cudaError_t left = cudaGetLastError();
      CHECK(left == cudaSuccess, "%s: a failed %s left %s", name, calls[n].c_str(),
            cudaGetErrorName(left));
      int device = -1;
      good(cudaGetDevice(&device), "cudaGetDevice");
      CHECK(device == (restoring ? kDevice : 0), "%s: a failed %s left device %d", name,
            calls[n].c_str(), device);
      good(cudaSetDevice(0), "cudaSetDevice");
      d.wait();
      good(operation(), name);
      d.wait();
    }
  }
  CHECK(cuda::probe(7) == cudaErrorInvalidDevice, "a device that is not there");
  CHECK(cudaGetLastError() == cudaSuccess, "a probe of a device that is not there left an error");
  const std::size_t before = emulator::waiting();
  CHECK(before == 0, "%zu pieces of work wait", before);
}

void test_devices() {
  emulator::reset();
  good(cudaSetDevice(kDevice), "cudaSetDevice");
  emulator::reset();
  good(cudaSetDevice(kDevice), "cudaSetDevice");
  good(cuda::probe(kDevice), "probe");
  Model model({{DType::kFloat32, 100}}, 0, kChunkElements, 3);
  Device d(model);
  good(cuda::accumulate(d.plan(), model.running.get(), nullptr, true, 1.0f, d.stream),
       "accumulate");
  good(cuda::close_sum(d.plan(), model.running.get(), model.previous.get(), model.third.get(), 1.0,
                       d.buffers(), d.stream),
       "close_sum");
  CHECK(emulator::touched_devices() == std::vector<int>{kDevice},
        "%zu devices have a context, one of them for nothing", emulator::touched_devices().size());
  good(cudaSetDevice(0), "cudaSetDevice");
}

void test_captures() {
  emulator::reset();
  good(cuda::probe(kDevice), "probe");
  Model captured({{DType::kFloat32, 20'000}, {DType::kFloat16, 77}}, 1, kChunkElements, 3);
  Model plain({{DType::kFloat32, 20'000}, {DType::kFloat16, 77}}, 1, kChunkElements, 3);
  Device c(captured), d(plain);
  // Every variant is first met inside the capture.
  const auto steps = [](Device& on) {
    Model& model = on.model;
    for (const float weight : {1.0f, 0.5f}) {
      for (float* mean : {static_cast<float*>(nullptr), model.third.get()}) {
        for (const bool first : {true, false}) {
          good(cuda::accumulate(on.plan(), model.running.get(), mean, first, weight, on.stream),
               "accumulate in a capture");
        }
      }
    }
    good(cuda::write_back(on.plan(), model.running.get(), nullptr, 0.5, on.stream),
         "write_back in a capture");
  };
  const auto close = [](Device& on) {
    return cuda::close_sum(on.plan(), on.model.running.get(), on.model.previous.get(),
                           on.model.third.get(), 4.0, on.buffers(), on.stream);
  };
  emulator::begin_capture(c.stream);
  steps(c);
  CHECK(close(c) == cudaErrorStreamCaptureUnsupported, "a close in a capture must be refused");
  CHECK(cuda::close_delta(c.plan(), captured.running.get(), captured.previous.get(),
                          captured.third.get(), 4.0, c.buffers(),
                          c.stream) == cudaErrorStreamCaptureUnsupported,
        "a close in a capture must be refused");
  CHECK(cudaGetLastError() == cudaSuccess, "the refused close left an error");
  good(cuda::accumulate(c.plan(), captured.running.get(), nullptr, false, 1.0f, c.stream),
       "a step after a refused close");
  std::vector<std::function<void()>> graph;
  good(emulator::end_capture(c.stream, &graph), "the capture");
  CHECK(graph.size() == 10, "%zu pieces of work were captured", graph.size());
  CHECK(captured.running[0] == 0.0f, "a captured step ran");

  steps(d);
  good(cuda::accumulate(d.plan(), plain.running.get(), nullptr, false, 1.0f, d.stream), "step");
  d.wait();
  emulator::replay(graph);
  compare(captured, plain, "a replayed capture");
  good(close(c), "a close after the capture");
  good(close(d), "a close");
  CHECK(same_bits(c.host, d.host) && c.host.norm > 0, "%g, not %g", c.host.norm, d.host.norm);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool quick = !arguments.empty() && arguments[0] == "quick";
  if (quick) arguments.erase(arguments.begin());
  if (arguments.empty()) arguments = {"1"};
  good(cuda::probe(kDevice), "probe");
  for (const std::string& seed : arguments) {
    emulator::seed(static_cast<unsigned>(std::stoul(seed)));
    test_models(quick);
  }
  test_residual_codes();
  test_errors();
  test_devices();
  test_captures();
  const emulator::Counts c = emulator::counts();
  std::printf(
      "%ld checks, %d failures; %zu seeds, %ld launches, %ld blocks, %ld barriers, %ld shuffles\n",
      checks, failures, arguments.size(), c.launches, c.blocks, c.barriers, c.shuffles);
  return failures == 0 ? 0 : 1;
}
