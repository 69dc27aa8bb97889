// The CPU core under AddressSanitizer and UBSan: every instruction set that runs here, all types,
// odd lengths, misaligned starts, empty runs, values that are not finite, compared with plain
// loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "core/sketch.h"
#include "core/tables.h"
#include "cpu/table.h"
#include "tests/support.h"

namespace {

using namespace autodrop;
using namespace autodrop::testing;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
constexpr int kThreads[] = {1, 2, 5};

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A tensor whose memory begins `shift` elements before its data and ends where the data ends.
struct Elements {
  DType dtype;
  std::int64_t shift;
  std::vector<char> memory;

  Elements(DType type, std::int64_t length, std::int64_t before, std::mt19937& random)
      : dtype(type), shift(before), memory(index((length + before) * size_of(type))) {
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < length; ++i) set(i, normal(random));
  }
  char* data() { return memory.data() + shift * size_of(dtype); }
  double get(std::int64_t i) { return element(data(), dtype, i); }
  void set(std::int64_t i, double value) { set_element(data(), dtype, i, value); }
};

std::vector<std::int64_t> bases_of(std::vector<Elements>& tensors) {
  std::vector<std::int64_t> bases;
  for (Elements& tensor : tensors) bases.push_back(reinterpret_cast<std::int64_t>(tensor.data()));
  return bases;
}

// Tensors, and pieces of them with random hashes in sorted runs. Row 0 gets none.
struct Sketch {
  std::int64_t rows;
  std::vector<Elements> tensors;
  std::vector<Piece> pieces;
  std::vector<std::int64_t> runs, bases;

  explicit Sketch(std::int64_t num_rows) : rows(num_rows) {}

  // Adds a tensor of which a chunk holds elements from `start` on.
  void add(DType dtype, int start, std::int64_t length, double weight, std::mt19937& random) {
    const auto tensor = static_cast<std::uint32_t>(tensors.size());
    tensors.emplace_back(dtype, length, static_cast<std::int64_t>(random() % 4), random);
    for (std::int64_t at = 0; at < length;) {
      const std::int64_t n = std::min<std::int64_t>(kLanes - start, length - at);
      pieces.push_back({at * size_of(dtype), weight, static_cast<std::uint32_t>(random()), tensor,
                        static_cast<std::uint16_t>(start), static_cast<std::uint16_t>(n),
                        static_cast<std::uint16_t>(random() % kPackets),
                        static_cast<std::uint8_t>(random() % kSwaps), dtype});
      at += n;
      start = 0;
    }
  }

  void sort(std::mt19937& random) {
    std::vector<std::vector<Piece>> sorted(index(rows * kSwaps));
    for (const Piece& piece : pieces) {
      const std::int64_t row = rows == 1 ? 0 : 1 + static_cast<std::int64_t>(random()) % (rows - 1);
      sorted[index(row * kSwaps + piece.swap)].push_back(piece);
    }
    pieces.clear();
    for (const auto& run : sorted) {
      runs.push_back(static_cast<std::int64_t>(pieces.size()));
      pieces.insert(pieces.end(), run.begin(), run.end());
    }
    runs.push_back(static_cast<std::int64_t>(pieces.size()));
    bases = bases_of(tensors);
  }

  std::vector<double> table(const cpu::Loops* loops, int threads) const {
    std::vector<double> buckets(index(rows * kLanes));
    std::iota(buckets.begin(), buckets.end(), -0.5);
    cpu::accumulate(pieces.data(), runs.data(), rows, bases.data(), buckets.data(), threads, loops);
    return buckets;
  }

  // Sums and sums of absolute values, one element after the other.
  void expect(std::vector<double>& sums, std::vector<double>& sizes) {
    sums.resize(index(rows * kLanes));
    std::iota(sums.begin(), sums.end(), -0.5);
    sizes = sums;
    for (double& size : sizes) size = std::abs(size);
    for (std::int64_t run = 0; run < rows * kSwaps; ++run) {
      for (std::int64_t p = runs[index(run)]; p < runs[index(run + 1)]; ++p) {
        const Piece& piece = pieces[index(p)];
        const std::int64_t first = piece.offset / size_of(piece.dtype);
        for (int i = 0; i < piece.length; ++i) {
          const int j = piece.start + i;
          const int packet = (j / 8 + piece.packet) % 512;
          const int lane = packet * 8 + ((j % 8) ^ piece.swap);
          const std::uint32_t word =
              sketch::mix32(piece.hash ^ static_cast<std::uint32_t>(lane / 32));
          const double value = tensors[piece.tensor].get(first + i) * piece.weight;
          const std::size_t bucket = index(run / kSwaps * kLanes + lane);
          sums[bucket] += (word >> (lane % 32) & 1) != 0 ? -value : value;
          sizes[bucket] += std::abs(value);
        }
      }
    }
  }
};

// A bucket is a sum of at most a few hundred terms, each of which is rounded twice.
void compare(const std::vector<double>& got, const std::vector<double>& wanted,
             const std::vector<double>& sizes, const char* what) {
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const bool same = std::isfinite(wanted[i]) ? std::abs(got[i] - wanted[i]) <= 1e-12 * sizes[i]
                      : std::isnan(wanted[i])  ? std::isnan(got[i])
                                               : got[i] == wanted[i];
    CHECK(same, "%s, bucket %zu: %.17g, not %.17g", what, i, got[i], wanted[i]);
  }
}

void test_sketch(const cpu::Loops* loops, Sketch& model, const char* what) {
  std::vector<double> wanted, sizes;
  model.expect(wanted, sizes);
  const std::vector<double> one = model.table(loops, 1);
  compare(one, wanted, sizes, what);
  for (const int threads : kThreads) {
    const std::vector<double> many = model.table(loops, threads);
    CHECK(std::memcmp(many.data(), one.data(), one.size() * sizeof(double)) == 0,
          "%s: other bits with %d threads", what, threads);
  }
}

void test_sketches(const cpu::Loops* loops) {
  const double third = 1.0 / 3.0;
  for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{3}}) {
    for (const DType dtype : kDTypes) {
      std::mt19937 random(static_cast<unsigned>(rows));
      Sketch odd(rows);
      for (const int start : {0, 1, 7, 8, 2040, 4088, 4095}) {
        for (const int length : {1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 2047, 2048, 2049, 2080, 4096}) {
          const int n = std::min(length, kLanes - start);
          odd.add(dtype, start, n, length % 2 == 0 ? 1.0 : third, random);
        }
      }
      odd.sort(random);
      test_sketch(loops, odd, "odd lengths");
    }
    std::mt19937 random(7);
    Sketch mixed(rows);
    for (int repeat = 0; repeat < 6; ++repeat) {
      for (const DType dtype : kDTypes) mixed.add(dtype, repeat * 3, 30'011, third, random);
    }
    mixed.sort(random);
    test_sketch(loops, mixed, "types in turn");
    Sketch none(rows);
    none.sort(random);
    test_sketch(loops, none, "no pieces");
  }
  // Large enough for all threads.
  std::mt19937 random(8);
  Sketch large(9);
  large.add(DType::kFloat32, 5, 5 * cpu::kBytesForThread / 4 + 3, 1.0, random);
  large.sort(random);
  test_sketch(loops, large, "large");
}

void test_not_finite(const cpu::Loops* loops) {
  using Limits = std::numeric_limits<double>;
  for (const double bad : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()}) {
    for (const DType dtype : kDTypes) {
      for (const std::int64_t length : {3, 100, 4096}) {
        std::mt19937 random(9);
        Sketch model(1);
        model.add(dtype, 0, length, 0.5, random);
        model.tensors[0].set(length / 2, bad);
        model.sort(random);
        test_sketch(loops, model, "not finite");
      }
    }
  }
}

// The largest and smallest values of every type are converted exactly.
void test_extremes(const cpu::Loops* loops) {
  for (const DType dtype : kDTypes) {
    std::mt19937 random(10);
    Sketch model(1);
    model.add(dtype, 0, 4096, 1.0, random);
    const double values[] = {0.0,       -0.0,    0x1p-24,   -0x1.8p-20, 0x1p-133,
                             -0x1p-140, 65504.0, -0x1p-126, 0x1p127,    0x1p-1074};
    for (std::int64_t i = 0; i < 4096; ++i) model.tensors[0].set(i, values[i % 10]);
    model.sort(random);
    test_sketch(loops, model, "extremes");
  }
}

void test_spans(const cpu::Loops* loops) {
  std::mt19937 random(11);
  std::vector<Elements> tensors;
  std::vector<Span> spans;
  std::int64_t bucket = 3;
  const auto add = [&](DType dtype, std::int64_t length, std::int64_t shift, double weight) {
    tensors.emplace_back(dtype, length, shift, random);
    for (std::int64_t at = 0; at < length; at += 8192) {
      const std::int64_t n = std::min<std::int64_t>(8192, length - at);
      spans.push_back({at * size_of(dtype), weight, bucket + at,
                       static_cast<std::uint32_t>(tensors.size() - 1),
                       static_cast<std::uint16_t>(n), 0, dtype});
    }
    bucket += length + 1;  // a bucket between two tensors gets nothing
  };
  for (const DType dtype : kDTypes) {
    for (const std::int64_t length : {0, 1, 31, 32, 33, 8191, 8192, 8193}) {
      add(dtype, length, length % 3, length % 2 == 0 ? 1.0 : 0.3);
    }
  }
  add(DType::kFloat32, 3 * cpu::kBytesForThread / 16, 1, 1.0);
  const std::vector<std::int64_t> bases = bases_of(tensors);
  std::vector<double> start(index(bucket));
  std::iota(start.begin(), start.end(), -0.5);
  std::vector<double> wanted = start, sizes = start;
  for (double& size : sizes) size = std::abs(size);
  for (const Span& span : spans) {
    for (int i = 0; i < span.length; ++i) {
      const double value =
          span.weight * tensors[span.tensor].get(span.offset / size_of(span.dtype) + i);
      wanted[index(span.bucket + i)] += value;
      sizes[index(span.bucket + i)] += std::abs(value);
    }
  }
  for (const int threads : kThreads) {
    std::vector<double> table = start;
    cpu::accumulate_exact(spans.data(), static_cast<std::int64_t>(spans.size()), bases.data(),
                          table.data(), threads, loops);
    compare(table, wanted, sizes, "spans");
  }
  cpu::accumulate_exact(nullptr, 0, nullptr, nullptr, 2, loops);
}

void test_close(const cpu::Loops* loops) {
  const std::vector<std::vector<std::int64_t>> cases = {
      {0, 0}, {0, 1}, {0, 4096, 4096, 4097, 12'305}, {0, 7, 3 * cpu::kBytesForThread / 48}};
  for (const auto& bounds : cases) {
    std::mt19937 random(12);
    std::normal_distribution<double> normal;
    const auto parts = static_cast<std::int64_t>(bounds.size()) - 1;
    std::vector<double> first[3];
    for (auto& values : first) {
      values.resize(index(bounds.back()));
      for (double& value : values) value = normal(random);
    }
    std::vector<std::vector<double>> sums;
    for (const int threads : kThreads) {
      std::vector<double> running = first[0], mean = first[1], displacement = first[2];
      sums.emplace_back(index(2 * parts), -1.0);
      cpu::close(running.data(), mean.data(), displacement.data(), 3.0, bounds.data(), parts,
                 sums.back().data(), threads, loops);
      for (std::int64_t part = 0; part < parts; ++part) {
        long double dot = 0, norm = 0, size = 0;
        for (std::int64_t b = bounds[index(part)]; b < bounds[index(part + 1)]; ++b) {
          const std::size_t i = index(b);
          const double m = first[0][i] / 3.0, s = m - first[1][i];
          CHECK(mean[i] == m && displacement[i] == s && running[i] == 0.0, "bucket %zu", i);
          dot += static_cast<long double>(s) * first[2][i];
          size += std::abs(static_cast<long double>(s) * first[2][i]);
          norm += static_cast<long double>(s) * s;
        }
        // Blocks of 4,096 in eight partial sums: some 1,000 roundings of 1e-16.
        CHECK(std::abs(sums.back()[index(2 * part)] - dot) <= 1e-12L * size, "dot");
        CHECK(std::abs(sums.back()[index(2 * part + 1)] - norm) <= 1e-12L * norm, "norm");
      }
      CHECK(sums.back() == sums.front(), "other sums with %d threads", threads);
    }
  }
}

// How many threads a call uses follows from the bytes that it moves.
std::mutex mutex;
std::set<std::thread::id> seen;
std::int64_t calls = 0;

void record() {
  const std::lock_guard<std::mutex> lock(mutex);
  seen.insert(std::this_thread::get_id());
  ++calls;
}

const cpu::Loops kRecording = {
    "recording",
    [](const Piece*, const Piece*, const Piece*, const std::int64_t*, double*) { record(); },
    [](const Span*, const Span*, const std::int64_t*, double*) { record(); },
    [](std::int64_t, double*, double*, double*, double, double*) { record(); },
};

template <class Call>
void count_threads(const char* what, std::int64_t bytes, int allowed, const Call& call) {
  seen.clear();
  calls = 0;
  call();
  const auto most =
      static_cast<std::size_t>(std::clamp<std::int64_t>(bytes / cpu::kBytesForThread, 1, allowed));
  CHECK(calls > 0 && seen.size() <= most && (most > 1 || seen.size() == 1),
        "%s of %lld bytes: %zu of %d threads, not %zu", what, static_cast<long long>(bytes),
        seen.size(), allowed, most);
}

void test_number_of_threads() {
  const std::int64_t share = cpu::kBytesForThread;
  for (const int allowed : kThreads) {
    for (const std::int64_t bytes : {share / 4, share, 2 * share - 65'536, 2 * share, 9 * share}) {
      const std::vector<Piece> pieces(index(bytes / (4 * kLanes)),
                                      {0, 1.0, 0, 0, 0, kLanes, 0, 0, DType::kFloat32});
      std::vector<std::int64_t> runs(64 * kSwaps + 1, static_cast<std::int64_t>(pieces.size()));
      runs[0] = 0;
      count_threads("accumulate", bytes, allowed, [&] {
        cpu::accumulate(pieces.data(), runs.data(), 64, nullptr, nullptr, allowed, &kRecording);
      });
      CHECK(calls == 64, "%lld of 64 rows", static_cast<long long>(calls));
      // Two bytes of bfloat16 and a bucket that is read and written: 18 bytes an element.
      const std::vector<Span> spans(index(bytes / (18 * 4096) + 1),
                                    {0, 1.0, 0, 0, 4096, 0, DType::kBFloat16});
      count_threads("accumulate_exact", static_cast<std::int64_t>(spans.size()) * 18 * 4096,
                    allowed, [&] {
                      cpu::accumulate_exact(spans.data(), static_cast<std::int64_t>(spans.size()),
                                            nullptr, nullptr, allowed, &kRecording);
                    });
      const std::int64_t bounds[] = {0, bytes / 48};
      double sums[2];
      count_threads("close", bytes, allowed, [&] {
        cpu::close(nullptr, nullptr, nullptr, 1.0, bounds, 1, sums, allowed, &kRecording);
      });
    }
  }
}

}  // namespace

int main() {
  int sets = 0;
  test_number_of_threads();
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const cpu::Loops* loops = cpu::loops_named(name);
    if (loops == nullptr) {
      std::printf("skipped: this processor does not run %s\n", name);
      continue;
    }
    ++sets;
    test_sketches(loops);
    test_not_finite(loops);
    test_extremes(loops);
    test_spans(loops);
    test_close(loops);
  }
  std::printf("%ld checks with %d instruction sets, %d failures\n", checks, sets, failures);
  return failures == 0 && sets > 0 ? 0 : 1;
}
