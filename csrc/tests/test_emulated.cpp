// The table's CUDA kernels as they are launched (cuda/table.cu), run by the emulator and compared
// bit for bit with loops that are written down here once more, from the order of additions that the
// kernels document. Then the launches themselves: streams, devices, errors and captures.
//
//   test_emulated [quick] [SEED...]   with seeds of the order of blocks and threads; 1 by default
//
// Compiled with AUTODROP_TWO_FLOATS, like the kernels, it is about sums of two float32 numbers.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/numeric.h"
#include "core/tables.h"
#include "cuda/table.h"
#include "emulator.h"

namespace {

using namespace autodrop;

int failures = 0;
long checks = 0;
const char* context = "";  // of the checks that follow

// Every check has a name, by which a test of planted mistakes knows it.
#define CHECK(name, condition, ...)                                   \
  do {                                                                \
    ++checks;                                                         \
    if (!(condition)) {                                               \
      std::printf("FAILED %s (%s): %s: ", name, context, #condition); \
      std::printf(__VA_ARGS__);                                       \
      std::printf("\n");                                              \
      if (++failures == 20) {                                         \
        std::printf("%ld checks, %d failures\n", checks, failures);   \
        std::exit(1);                                                 \
      }                                                               \
    }                                                                 \
  } while (false)

constexpr int kBatch = 256;  // as in cuda/table.cu
#if defined(AUTODROP_TWO_FLOATS)
constexpr bool kTwoFloats = true;
#else
constexpr bool kTwoFloats = false;
#endif
constexpr int kDevice = 1;  // while device 0 is current

void good(cudaError_t error, const char* what) {
  CHECK("no error", error == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
}

// Memory whose end is where its last byte is, so that sanitizers see a step past it, and aligned to
// 64 bytes as that of torch's allocator.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
struct Buffer {
  std::unique_ptr<T[], Free> memory;
  std::size_t size;
  explicit Buffer(std::size_t n) : size(n) {
    void* raw = nullptr;
    if (posix_memalign(&raw, 64, std::max<std::size_t>(n, 1) * sizeof(T)) != 0) std::abort();
    memory.reset(static_cast<T*>(raw));
    std::memset(raw, 0, n * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
    std::copy(from.begin(), from.end(), memory.get());
  }
  T* get() const { return memory.get(); }
  T& operator[](std::size_t i) const { return memory[i]; }
};

bool same_bits(double a, double b) {
  return numeric::bit_cast<std::uint64_t>(a) == numeric::bit_cast<std::uint64_t>(b) ||
         (a != a && b != b);
}

std::size_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// ---- tensors ----------------------------------------------------------------------------------

struct Tensor {
  DType dtype;
  std::int64_t length;
  std::int64_t shift = 0;  // elements by which the first is past an aligned address
  std::int64_t first = 0;  // place of the first element in the whole parameter
  double weight = 1.0;
  int group = 0;
};

void set_element(char* to, DType dtype, double x) {
  const auto narrow = static_cast<float>(x);
  Half half{};
  BFloat16 brain{};
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(to, &narrow, 4);
      break;
    case DType::kFloat64:
      std::memcpy(to, &x, 8);
      break;
    case DType::kFloat16:
      numeric::from_double(x, &half);
      std::memcpy(to, &half, 2);
      break;
    case DType::kBFloat16:
      numeric::from_double(x, &brain);
      std::memcpy(to, &brain, 2);
      break;
  }
}
double element(const char* from, DType dtype) {
  float narrow = 0.0f;
  double wide = 0.0;
  Half half{};
  BFloat16 brain{};
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(&narrow, from, 4);
      return narrow;
    case DType::kFloat64:
      std::memcpy(&wide, from, 8);
      return wide;
    case DType::kFloat16:
      std::memcpy(&half, from, 2);
      return numeric::to_float(half);
    case DType::kBFloat16:
      std::memcpy(&brain, from, 2);
      return numeric::to_float(brain);
  }
  std::abort();
}

std::uint64_t mix64(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Tensors in memory with their pieces and their spans, as autodrop_ext/ops/plan.py makes them.
struct Model {
  std::vector<Tensor> tensors;
  std::vector<Buffer<char>> memory;
  std::vector<std::int64_t> bases;
  std::int64_t num_rows;
  std::vector<Piece> pieces;
  std::vector<std::int64_t> runs;
  std::vector<Span> spans;
  std::int64_t buckets = 0;  // of the exact table

  Model(std::vector<Tensor> of, std::int64_t rows, int groups = 1, bool gaps = false)
      : tensors(std::move(of)), num_rows(rows * groups) {
    std::mt19937_64 random(7);
    std::vector<std::pair<std::int64_t, Piece>> found;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const Tensor& tensor = tensors[t];
      const std::size_t size = bytes_of(tensor.dtype);
      memory.emplace_back(static_cast<std::size_t>(tensor.shift + tensor.length) * size);
      bases.push_back(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory[t].get()) +
                                                static_cast<std::size_t>(tensor.shift) * size));
      const std::uint64_t key = mix64(t);
      for (std::int64_t i = 0; i < tensor.length;) {
        const std::int64_t chunk = (tensor.first + i) / kLanes, start = (tensor.first + i) % kLanes;
        const std::int64_t length = std::min(kLanes - start, tensor.length - i);
        const std::uint64_t c = mix64(key ^ mix64(static_cast<std::uint64_t>(chunk)));
        Piece piece{};
        piece.offset = i * static_cast<std::int64_t>(size);
        piece.weight = tensor.weight;
        piece.hash = static_cast<std::uint32_t>(mix64(c) >> 32);
        piece.tensor = static_cast<std::uint32_t>(t);
        piece.start = static_cast<std::uint16_t>(start);
        piece.length = static_cast<std::uint16_t>(length);
        piece.packet = static_cast<std::uint16_t>(c >> 3 & 511);
        piece.swap = static_cast<std::uint8_t>(c & 7);
        piece.dtype = tensor.dtype;
        const auto row = static_cast<std::int64_t>((c >> 32) % static_cast<std::uint64_t>(rows));
        found.emplace_back((row + rows * tensor.group) * kSwaps + piece.swap, piece);
        i += length;
      }
      for (std::int64_t i = 0; i < tensor.length; i += 8192) {
        Span span{};
        span.offset = i * static_cast<std::int64_t>(size);
        span.weight = tensor.weight;
        span.bucket = buckets + i;
        span.tensor = static_cast<std::uint32_t>(t);
        span.length = static_cast<std::uint16_t>(std::min<std::int64_t>(8192, tensor.length - i));
        span.dtype = tensor.dtype;
        spans.push_back(span);
      }
      buckets += tensor.length + (gaps ? static_cast<std::int64_t>(random() % 3) : 0);
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (std::int64_t run = 0; run <= num_rows * kSwaps; ++run) {
      runs.push_back(std::lower_bound(found.begin(), found.end(), run,
                                      [](const auto& a, std::int64_t r) { return a.first < r; }) -
                     found.begin());
    }
    for (const auto& [run, piece] : found) pieces.push_back(piece);
    fill(1);
  }

  char* at(std::size_t t, std::int64_t i) const {
    return memory[t].get() +
           static_cast<std::size_t>(tensors[t].shift + i) * bytes_of(tensors[t].dtype);
  }
  // Random numbers of many sizes, so that no sum of them is exact.
  void fill(unsigned seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      for (std::int64_t i = 0; i < tensors[t].length; ++i) {
        set_element(at(t, i), tensors[t].dtype, normal(random) * std::ldexp(1.0, -(i % 12)));
      }
    }
  }
};

// ---- the same sums, once more -----------------------------------------------------------------

std::uint32_t mix32(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Calls add(lane, signed element) for the elements of a piece for which `chosen(start of the packet
// in the chunk)` holds.
template <class Chosen, class Add>
void for_piece(const Model& model, const Piece& piece, const Chosen& chosen, const Add& add) {
  const std::size_t size = bytes_of(piece.dtype);
  const auto first = piece.offset / static_cast<std::int64_t>(size) - piece.start;
  for (int j = piece.start; j < piece.start + piece.length; ++j) {
    if (!chosen(j / 8 * 8)) continue;
    const int lane = ((j >> 3) + piece.packet) % 512 * 8 + ((j & 7) ^ piece.swap);
    const std::uint32_t word = mix32(piece.hash ^ static_cast<std::uint32_t>(lane >> 5));
    const double x = element(model.at(piece.tensor, first + j), piece.dtype);
    add(static_cast<std::size_t>(lane), word >> (lane & 31) & 1 ? -x : x);
  }
}

using Share = std::vector<const Piece*>;

// Calls add for the elements of pieces of one batch in the order of the kernels: whole aligned
// packets, then the rest.
template <class Add>
void for_batch(const Model& model, const Share& batch, const Add& add) {
  for (const bool whole : {true, false}) {
    for (const Piece* piece : batch) {
      const std::uint64_t origin =
          static_cast<std::uint64_t>(model.bases[piece->tensor] + piece->offset) -
          piece->start * bytes_of(piece->dtype);
      const auto chosen = [&](int j) {
        return (origin % 16 == 0 && j >= piece->start && j + 8 <= piece->start + piece->length) ==
               whole;
      };
      for_piece(model, *piece, chosen, [&](std::size_t lane, double x) { add(*piece, lane, x); });
    }
  }
}

void add_float64(const Model& model, const Share& batch, std::vector<double>& sums) {
  for_batch(model, batch, [&](const Piece& piece, std::size_t lane, double x) {
    sums[lane] = std::fma(x, piece.weight, sums[lane]);
  });
}

// Two float32 numbers, with errors of additions that are found in another way than by the kernels:
// the rounding of a float64 sum to float32 is that of the exact sum (53 >= 2 * 24 + 2 bits), and
// the larger number minus the sum is exact.
struct TwoFloats {
  float high = 0.0f, low = 0.0f;

  static float error(double a, double b, float sum) {
    return static_cast<float>(std::abs(a) >= std::abs(b) ? (a - sum) + b : (b - sum) + a);
  }
  void add(double x) {
    const auto s = static_cast<float>(static_cast<double>(high) + x);
    const auto v = static_cast<float>(static_cast<double>(low) + error(high, x, s));
    high = static_cast<float>(static_cast<double>(s) + v);
    low = error(s, v, high);
  }
};

// Adds a batch to a row, group after group.
void add_two_floats(const Model& model, const Share& batch, std::vector<double>& row) {
  constexpr std::uint64_t kFloat64 = ~std::uint64_t{0};
  std::map<std::uint64_t, Share> groups;
  const auto group_of = [](const Piece& piece) {
    return piece.dtype == DType::kFloat64 ? kFloat64
                                          : numeric::bit_cast<std::uint64_t>(piece.weight);
  };
  const std::uint64_t first = group_of(*batch[0]);
  for (const Piece* piece : batch) groups[group_of(*piece) - first].push_back(piece);
  for (const auto& [after, group] : groups) {
    std::vector<double> sums(kLanes);
    if (first + after == kFloat64) {
      add_float64(model, group, sums);
    } else {
      std::vector<TwoFloats> pairs(kLanes);
      for_batch(model, group,
                [&](const Piece&, std::size_t lane, double x) { pairs[lane].add(x); });
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] = group[0]->weight * (static_cast<double>(pairs[lane].high) + pairs[lane].low);
      }
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) row[lane] += sums[lane];
  }
}

void accumulate_once_more(const Model& model, std::int64_t splits, double* table) {
  for (std::int64_t row = 0; row < model.num_rows; ++row) {
    double* const lanes = table + row * kLanes;
    std::vector<double> of_splits(kLanes);
    for (std::int64_t split = 0; split < splits; ++split) {
      Share share;
      for (std::int64_t run = row * kSwaps; run < (row + 1) * kSwaps; ++run) {
        for (std::int64_t p = model.runs[static_cast<std::size_t>(run)] + split;
             p < model.runs[static_cast<std::size_t>(run) + 1]; p += splits) {
          share.push_back(&model.pieces[static_cast<std::size_t>(p)]);
        }
      }
      std::vector<double> sums(kLanes);
      // Two floats are added to the row at once where it has one block only.
      if (kTwoFloats && splits == 1) sums.assign(lanes, lanes + kLanes);
      for (std::size_t begin = 0; begin < share.size(); begin += kBatch) {
        const std::size_t end = std::min<std::size_t>(begin + kBatch, share.size());
        const Share batch(share.data() + begin, share.data() + end);
        kTwoFloats ? add_two_floats(model, batch, sums) : add_float64(model, batch, sums);
      }
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        double& sum = of_splits[lane];
        sum = split == 0 ? sums[lane] : sum + sums[lane];
      }
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      if (kTwoFloats && splits == 1) {
        lanes[lane] = of_splits[lane];
      } else {
        lanes[lane] += of_splits[lane];
      }
    }
  }
}

// ---- accumulate -------------------------------------------------------------------------------

// Device-side copies of a model's tables, and a stream.
struct Device {
  const Model& model;
  Buffer<Piece> pieces;
  Buffer<std::int64_t> runs, bases;
  Buffer<Span> spans;
  Buffer<double> table, partials, exact;
  std::int64_t splits;
  cudaStream_t stream = emulator::new_stream(kDevice);

  Device(const Model& of, std::int64_t splits_)
      : model(of),
        pieces(of.pieces),
        runs(of.runs),
        bases(of.bases),
        spans(of.spans),
        table(static_cast<std::size_t>(of.num_rows * kLanes)),
        partials(splits_ == 1 ? 0 : static_cast<std::size_t>(splits_ * of.num_rows * kLanes)),
        exact(static_cast<std::size_t>(of.buckets)),
        splits(splits_) {
    // Nothing that was there before can pass for a result.
    std::fill_n(partials.get(), partials.size, std::numeric_limits<double>::quiet_NaN());
  }
  cudaError_t accumulate() const {
    return cuda::accumulate(kDevice,
                            {pieces.get(), runs.get(), model.num_rows, splits, bases.get(),
                             partials.get(), table.get()},
                            stream);
  }
  cudaError_t accumulate_exact() const {
    return cuda::accumulate_exact(kDevice, spans.get(), static_cast<std::int64_t>(spans.size),
                                  bases.get(), exact.get(), stream);
  }
  void wait() const { good(cudaStreamSynchronize(stream), "synchronize"); }
};

void check_table(const char* name, const double* got, const double* wanted, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    CHECK(name, same_bits(got[i], wanted[i]), "bucket %lld: %a, not %a", static_cast<long long>(i),
          got[i], wanted[i]);
  }
}

void test_sketch(Model& model, std::int64_t splits, const char* what) {
  context = what;
  const Device d(model, splits);
  std::vector<double> wanted(d.table.size);
  for (unsigned step = 0; step < 2; ++step) {
    model.fill(step + 3);
    const long before = emulator::counts().launches;
    good(d.accumulate(), "accumulate");
    CHECK("launches wait", emulator::counts().launches == before, "a launch ran at once");
    d.wait();
    CHECK("two launches at most",
          emulator::counts().launches - before == (model.num_rows == 0 ? 0
                                                   : splits == 1       ? 1
                                                                       : 2),
          "%ld launches", emulator::counts().launches - before);
    accumulate_once_more(model, splits, wanted.data());
    check_table("sketch", d.table.get(), wanted.data(), static_cast<std::int64_t>(d.table.size));
  }
}

void test_exact(Model& model, const char* what) {
  context = what;
  const Device d(model, 1);
  std::vector<double> wanted(d.exact.size);
  for (unsigned step = 0; step < 2; ++step) {
    model.fill(step + 5);
    good(d.accumulate_exact(), "accumulate_exact");
    d.wait();
    for (const Span& span : model.spans) {
      const auto first = span.offset / static_cast<std::int64_t>(bytes_of(span.dtype));
      for (std::int64_t i = 0; i < span.length; ++i) {
        double& sum = wanted[static_cast<std::size_t>(span.bucket + i)];
        sum = std::fma(element(model.at(span.tensor, first + i), span.dtype), span.weight, sum);
      }
    }
    check_table("exact", d.exact.get(), wanted.data(), static_cast<std::int64_t>(d.exact.size));
  }
}

void test_tensors(std::vector<Tensor> tensors, std::int64_t rows, std::int64_t splits,
                  const char* what, int groups = 1, bool gaps = false) {
  Model model(std::move(tensors), rows, groups, gaps);
  test_sketch(model, splits, what);
  test_exact(model, what);
  int device = -1;
  good(cudaGetDevice(&device), "cudaGetDevice");
  CHECK("device restored", device == 0, "device %d is current after the calls", device);
  CHECK("own stream", emulator::waiting() == 0, "%zu pieces of work wait in other streams",
        emulator::waiting());
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// All values of an exclusive or, and as many pieces at once as a thread has in flight and more, of
// whole chunks.
std::vector<Tensor> whole_chunks(DType dtype, std::int64_t count) {
  return {{dtype, count * kLanes}};
}

void test_accumulate(bool quick) {
  for (const DType dtype : kDTypes) {
    test_tensors(whole_chunks(dtype, 40), 1, 1, "whole chunks of one row");
    test_tensors(whole_chunks(dtype, 12), 2, 3, "whole chunks, three blocks a row");
    std::vector<Tensor> ragged;
    for (const std::int64_t n : {1, 7, 8, 9, 15, 64, 100, 4095, 4097, 9000}) {
      ragged.push_back({dtype, n});
    }
    ragged.push_back({dtype, 0});
    test_tensors(ragged, 3, 1, "ends within a packet");
    // A shard may begin anywhere in its parameter, and in memory.
    std::vector<Tensor> shards;
    for (const std::int64_t first : {1, 8, 13, 4090, 4096, 12'345}) {
      for (const std::int64_t shift : {0, 1, 3}) shards.push_back({dtype, 5'003, shift, first});
    }
    test_tensors(shards, 2, 2, "shards that begin anywhere");
    std::vector<Tensor> misaligned(9, {dtype, kLanes, 1});
    test_tensors(misaligned, 1, 1, "misaligned whole chunks");
    if (quick) continue;
    for (std::int64_t first = 0; first < 16; ++first) {
      test_tensors({{dtype, 600, first, first}, {dtype, 4'200, first, 2 * first}}, 2, 1,
                   "every alignment");
    }
  }
  std::vector<Tensor> mixed;
  for (std::size_t i = 0; i < 40; ++i) {
    mixed.push_back({kDTypes[i * 7 % 4], static_cast<std::int64_t>(1 + i * i * 37 % 6'000),
                     static_cast<std::int64_t>(i % 3), 0, i % 5 == 0 ? 1.0 / 3.0 : 1.0,
                     static_cast<int>(i % 3)});
  }
  test_tensors(mixed, 2, 2, "dtypes, weights and groups", 3, true);
  std::vector<Tensor> weighted;
  for (int i = 0; i < 12; ++i) {
    weighted.push_back({kDTypes[i / 3], 16 * kLanes, 0, 0, 1.0 / (3 + i % 3)});
  }
  test_tensors(weighted, 1, 1, "whole chunks of several weights");
  test_tensors(std::vector<Tensor>(300, {DType::kBFloat16, 40}), 1, 1, "more pieces than a batch");
  test_tensors(std::vector<Tensor>(600, {DType::kFloat32, 24, 0, 8}), 1, 2,
               "more pieces than a batch, two blocks a row");
  test_tensors({}, 1, 1, "no tensors");
  test_tensors({}, 2, 3, "no tensors, three blocks a row");
  test_tensors({{DType::kFloat32, 0}}, 1, 1, "an empty tensor");
  test_tensors({{DType::kFloat32, 5'000}}, 4, 5, "blocks without pieces");
}

// Offsets past 2^32 bytes, in address space of which only the ends are ever touched.
void test_huge() {
  context = "huge";
  Model model({{DType::kFloat32, kLanes}}, 1);
  const std::int64_t far = std::int64_t{9} << 30;
  model.bases[0] -= far;
  for (Piece& piece : model.pieces) piece.offset += far;
  for (Span& span : model.spans) span.offset += far;
  const Device d(model, 1);
  good(d.accumulate(), "accumulate");
  good(d.accumulate_exact(), "accumulate_exact");
  d.wait();
  model.bases[0] += far;
  for (Piece& piece : model.pieces) piece.offset -= far;
  std::vector<double> wanted(d.table.size);
  accumulate_once_more(model, 1, wanted.data());
  check_table("sketch", d.table.get(), wanted.data(), kLanes);
  for (int i = 0; i < kLanes; ++i) {
    CHECK("exact",
          same_bits(d.exact[static_cast<std::size_t>(i)], element(model.at(0, i), DType::kFloat32)),
          "element %d", i);
  }
}

// The distance to exact sums, whatever the order of additions: sums of two float32 are wrong by
// 2^-40 of the sum of absolute values at most (cuda/sums.h), and 2^-46 is left for the additions to
// the table in float64, of which there are six. `value(n)` is what piece n adds to every lane.
template <class Value>
void test_error_of(const char* what, const Value& value) {
  context = what;
  Model model({{DType::kFloat32, 1'300 * kLanes}}, 1);
  std::vector<std::int64_t> exact(kLanes), sizes(kLanes);  // multiples of 2^-52
  const auto all = [](int) { return true; };
  for (std::size_t n = 0; n < model.pieces.size(); ++n) {
    const Piece& piece = model.pieces[n];
    for (std::int64_t i = 0; i < piece.length; ++i) {
      set_element(model.at(0, piece.offset / 4 + i), DType::kFloat32, 1.0);
    }
    std::int64_t i = piece.offset / 4;
    for_piece(model, piece, all, [&](std::size_t lane, double sign) {
      const double x = value(n);
      set_element(model.at(0, i++), DType::kFloat32, sign * x);
      exact[lane] += static_cast<std::int64_t>(std::ldexp(x, 52));
      sizes[lane] += std::abs(static_cast<std::int64_t>(std::ldexp(x, 52)));
    });
  }
  const Device d(model, 1);
  good(d.accumulate(), "accumulate");
  d.wait();
  double worst = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const double whole = std::floor(std::ldexp(d.table[lane], 52));  // int64 holds it
    const double error = static_cast<double>(static_cast<std::int64_t>(whole) - exact[lane]);
    worst = std::max(worst, std::abs(error) / static_cast<double>(sizes[lane]));
  }
  CHECK("error", worst <= 0x1p-40 + 0x1p-46, "%g of the sum of absolute values", worst);
  std::printf("error, %s: %.2g of the sum of absolute values\n", what, worst);
}

void test_error() {
  std::mt19937_64 random(11);
  // 24 bits, the last of them 2^-52 or more.
  const auto any = [&](std::size_t) {
    const auto bits = static_cast<double>(random() % (1 << 24) | 1 << 23);
    return std::ldexp(bits, -24 - static_cast<int>(random() % 28));
  };
  test_error_of("numbers of many sizes", any);
  test_error_of("and of both signs",
                [&](std::size_t n) { return random() % 2 ? any(n) : -any(n); });
  // In each batch 1, then what makes the units of `low` 2^-48, then numbers of just over half a
  // unit, which are all rounded up.
  test_error_of("the same error again and again", [](std::size_t n) {
    return n % kBatch == 0 ? 1.0 : n % kBatch == 1 ? 0x1.8p-25 : 0x1.2p-49;
  });
}

// NaN and infinity go to the lanes of their elements and nowhere else. Two floats make a NaN of an
// infinity.
void test_not_finite() {
  context = "not finite";
  for (const DType dtype : kDTypes) {
    Model model({{dtype, 9'001}}, 2);
    set_element(model.at(0, 4'100), dtype, std::numeric_limits<double>::infinity());
    set_element(model.at(0, 9'000), dtype, std::numeric_limits<double>::quiet_NaN());
    const Device d(model, 1);
    good(d.accumulate(), "accumulate");
    good(d.accumulate_exact(), "accumulate_exact");
    d.wait();
    const auto wrong = [](const Buffer<double>& table, long infinities) {
      long infinite = 0, nan = 0;
      for (std::size_t i = 0; i < table.size; ++i) {
        infinite += std::isinf(table[i]);
        nan += std::isnan(table[i]);
      }
      return std::abs(infinite - infinities) + std::abs(nan - (2 - infinities));
    };
    CHECK("not finite",
          wrong(d.table, kTwoFloats && dtype != DType::kFloat64 ? 0 : 1) == 0 &&
              wrong(d.exact, 1) == 0,
          "other lanes are not finite");
  }
}

// ---- close ------------------------------------------------------------------------------------

struct Closed {
  Buffer<double> running, mean, displacement;
  Buffer<std::int64_t> blocks;
  Buffer<double> sums;
  cudaStream_t stream = emulator::new_stream(kDevice);

  // `bounds` of blocks: begin of each and the end of the last.
  explicit Closed(const std::vector<std::int64_t>& bounds, unsigned seed = 1)
      : running(size(bounds)),
        mean(size(bounds)),
        displacement(size(bounds)),
        blocks(2 * (bounds.size() - 1)),
        sums(2 * (bounds.size() - 1)) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (std::size_t i = 0; i < running.size; ++i) {
      running[i] = normal(random);
      mean[i] = normal(random);
      displacement[i] = normal(random);
    }
    for (std::size_t b = 0; b + 1 < bounds.size(); ++b) {
      blocks[2 * b] = bounds[b];
      blocks[2 * b + 1] = bounds[b + 1];
      sums[2 * b] = sums[2 * b + 1] = std::numeric_limits<double>::quiet_NaN();
    }
  }
  static std::size_t size(const std::vector<std::int64_t>& bounds) {
    return static_cast<std::size_t>(bounds.back());
  }
  cudaError_t close(double divisor) const {
    return cuda::close(kDevice,
                       {running.get(), mean.get(), displacement.get(), divisor, blocks.get(),
                        static_cast<std::int64_t>(blocks.size / 2), sums.get()},
                       stream);
  }
};

void test_close_of(const std::vector<std::int64_t>& bounds, double divisor, const char* what) {
  context = what;
  const Closed c(bounds);
  const Closed old(bounds);
  std::vector<double> of_seed;
  good(c.close(divisor), "close");
  good(cudaStreamSynchronize(c.stream), "synchronize");
  for (std::size_t b = 0; b + 1 < bounds.size(); ++b) {
    long double dot = 0, norm = 0, size = 0;
    for (auto i = static_cast<std::size_t>(bounds[b]); i < static_cast<std::size_t>(bounds[b + 1]);
         ++i) {
      const double m = old.running[i] / divisor, s = m - old.mean[i];
      CHECK("closed mean", same_bits(c.mean[i], m), "bucket %zu: %a, not %a", i, c.mean[i], m);
      CHECK("closed displacement", same_bits(c.displacement[i], s), "bucket %zu: %a, not %a", i,
            c.displacement[i], s);
      CHECK("running is zero", same_bits(c.running[i], 0.0), "bucket %zu: %a", i, c.running[i]);
      dot += static_cast<long double>(s) * old.displacement[i];
      size += std::abs(static_cast<long double>(s) * old.displacement[i]);
      norm += static_cast<long double>(s) * s;
    }
    // 4,096 terms of float64 that are added in another order.
    CHECK("dot", std::abs(c.sums[2 * b] - dot) <= 1e-12L * size, "block %zu: %.17g, not %.17Lg", b,
          c.sums[2 * b], dot);
    CHECK("norm", std::abs(c.sums[2 * b + 1] - norm) <= 1e-12L * norm,
          "block %zu: %.17g, not %.17Lg", b, c.sums[2 * b + 1], norm);
  }
  // The same bits in another order of blocks and threads.
  const Closed again(bounds);
  good(again.close(divisor), "close");
  good(cudaStreamSynchronize(again.stream), "synchronize");
  CHECK("same bits", std::memcmp(again.sums.get(), c.sums.get(), c.sums.size * 8) == 0,
        "sums differ from run to run");
}

void test_close() {
  test_close_of({0, 4'096, 8'192}, 64.0, "whole blocks");
  test_close_of({0, 4'096, 5'001, 5'002, 5'003, 7'000, 11'096}, 3.0, "parts of any length");
  test_close_of({0, 1, 3, 6, 263, 776, 1'801}, 7.0, "small parts");
  test_close_of({0}, 1.0, "no buckets");
  test_close_of({0, 0, 5}, 1.0, "an empty part");
}

// ---- launches ---------------------------------------------------------------------------------

using Operations = std::vector<std::pair<const char*, std::function<cudaError_t()>>>;

// Every call that can fail, in every operation: the error is returned, the next call succeeds, and
// neither an error nor another device is left behind.
void test_errors() {
  context = "errors";
  const Model model({{DType::kFloat32, 9'000}}, 2);
  const Device d(model, 2);
  const Closed c({0, 4'096});
  const Operations operations = {{"accumulate", [&] { return d.accumulate(); }},
                                 {"accumulate_exact", [&] { return d.accumulate_exact(); }},
                                 {"close", [&] { return c.close(2.0); }},
                                 {"probe", [&] { return cuda::probe(kDevice); }}};
  for (const auto& [name, operation] : operations) {
    std::vector<std::string> calls;
    emulator::on_call([&](const char* call) { calls.emplace_back(call); });
    good(operation(), name);
    emulator::on_call(nullptr);
    CHECK("calls", calls.size() >= 4, "%s made %zu calls", name, calls.size());
    for (std::size_t n = 0; n < calls.size(); ++n) {
      // Fail at the n-th call. The last one restores the device: no caller learns of it, but
      // nothing stays.
      std::size_t seen = 0;
      emulator::on_call([&](const char* call) {
        if (seen++ == n) emulator::fail_once(call, cudaErrorLaunchFailure);
      });
      const cudaError_t error = operation();
      emulator::on_call(nullptr);
      const bool restoring = n + 1 == calls.size() && calls[n] == "cudaSetDevice";
      CHECK("error returned", error == (restoring ? cudaSuccess : cudaErrorLaunchFailure),
            "%s, %s: %s", name, calls[n].c_str(), cudaGetErrorName(error));
      const cudaError_t left = cudaGetLastError();
      CHECK("no error left", left == cudaSuccess, "%s: a failed %s left %s", name, calls[n].c_str(),
            cudaGetErrorName(left));
      int device = -1;
      good(cudaGetDevice(&device), "cudaGetDevice");
      CHECK("device restored", device == (restoring ? kDevice : 0),
            "%s: a failed %s left device %d", name, calls[n].c_str(), device);
      good(cudaSetDevice(0), "cudaSetDevice");
      for (const cudaStream_t stream : {d.stream, c.stream}) {
        good(cudaStreamSynchronize(stream), "synchronize");
      }
      good(operation(), name);
      for (const cudaStream_t stream : {d.stream, c.stream}) {
        good(cudaStreamSynchronize(stream), "synchronize");
      }
    }
  }
  CHECK("error returned", cuda::probe(7) == cudaErrorInvalidDevice, "a device that is not there");
  CHECK("no error left", cudaGetLastError() == cudaSuccess, "a probe left an error");
  CHECK("own stream", emulator::waiting() == 0, "%zu pieces of work wait", emulator::waiting());
  // More blocks than a grid can have.
  const cuda::Accumulate huge{
      d.pieces.get(),   d.runs.get(), (std::int64_t{1} << 31) + 1, 2, d.bases.get(),
      d.partials.get(), d.table.get()};
  CHECK("grid", cuda::accumulate(kDevice, huge, d.stream) == cudaErrorInvalidConfiguration,
        "more than 2^31 blocks were accepted");
}

void test_devices() {
  context = "devices";
  emulator::reset();
  good(cudaSetDevice(kDevice), "cudaSetDevice");
  emulator::reset();
  good(cudaSetDevice(kDevice), "cudaSetDevice");
  good(cuda::probe(kDevice), "probe");
  const Model model({{DType::kFloat32, 100}}, 1);
  const Device d(model, 2);
  const Closed c({0, 100});
  good(d.accumulate(), "accumulate");
  good(d.accumulate_exact(), "accumulate_exact");
  good(c.close(1.0), "close");
  CHECK("one context", emulator::touched_devices() == std::vector<int>{kDevice},
        "%zu devices have a context", emulator::touched_devices().size());
  d.wait();
  good(cudaStreamSynchronize(c.stream), "synchronize");
  good(cudaSetDevice(0), "cudaSetDevice");
}

void test_captures() {
  context = "captures";
  emulator::reset();
  good(cuda::probe(kDevice), "probe");
  // Every kernel is first met inside the capture.
  Model model({{DType::kFloat32, 20'000}, {DType::kFloat16, 77, 1}}, 2);
  const Device captured(model, 2), plain(model, 2);
  const Closed closed({0, 4'096});
  emulator::begin_capture(captured.stream);
  good(captured.accumulate(), "accumulate in a capture");
  good(captured.accumulate_exact(), "accumulate_exact in a capture");
  const cudaError_t refused =
      cuda::close(kDevice,
                  {closed.running.get(), closed.mean.get(), closed.displacement.get(), 1.0,
                   closed.blocks.get(), 1, closed.sums.get()},
                  captured.stream);
  CHECK("close refused", refused == cudaErrorStreamCaptureUnsupported, "a close in a capture: %s",
        cudaGetErrorName(refused));
  CHECK("no error left", cudaGetLastError() == cudaSuccess, "the refused close left an error");
  good(captured.accumulate(), "a step after a refused close");
  std::vector<std::function<void()>> graph;
  good(emulator::end_capture(captured.stream, &graph), "the capture");
  CHECK("captured", graph.size() == 5, "%zu pieces of work were captured", graph.size());
  CHECK("captured", captured.table[0] == 0.0 && captured.exact[0] == 0.0, "a captured step ran");
  // Addresses are read when a graph is replayed: memory may have moved.
  const Model moved({{DType::kFloat32, 20'000}, {DType::kFloat16, 77, 1}}, 2);
  for (int replay = 0; replay < 2; ++replay) {
    emulator::replay(graph);
    std::copy(moved.bases.begin(), moved.bases.end(), captured.bases.get());
  }
  for (int replay = 0; replay < 2; ++replay) {
    good(plain.accumulate(), "accumulate");
    good(plain.accumulate_exact(), "accumulate_exact");
    good(plain.accumulate(), "accumulate");
  }
  plain.wait();
  check_table("replayed", captured.table.get(), plain.table.get(),
              static_cast<std::int64_t>(plain.table.size));
  check_table("replayed", captured.exact.get(), plain.exact.get(),
              static_cast<std::int64_t>(plain.exact.size));
}

}  // namespace

// An address that is wrong by gigabytes ends here, unless a sanitizer describes it.
[[maybe_unused]] void on_signal(int) {
  std::printf("FAILED address (%s)\n", context);
  std::fflush(stdout);
  std::_Exit(1);
}

int main(int argc, char** argv) {
#if !defined(__SANITIZE_ADDRESS__)
  std::signal(SIGSEGV, on_signal);
  std::signal(SIGBUS, on_signal);
#endif
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool quick = !arguments.empty() && arguments[0] == "quick";
  if (quick) arguments.erase(arguments.begin());
  if (arguments.empty()) arguments = {"1"};
  context = "probe";
  good(cuda::probe(kDevice), "probe");
  for (const std::string& seed : arguments) {
    emulator::seed(static_cast<unsigned>(std::stoul(seed)));
    test_accumulate(quick);
    test_huge();
    test_not_finite();
    if (!quick) test_error();
    test_close();
  }
  test_errors();
  test_devices();
  test_captures();
  const emulator::Counts c = emulator::counts();
  std::printf(
      "%ld checks, %d failures; %zu seeds, %ld launches, %ld blocks, %ld barriers, %ld shuffles\n",
      checks, failures, arguments.size(), c.launches, c.blocks, c.barriers, c.shuffles);
  return failures == 0 ? 0 : 1;
}
