#include "cpu/table.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace autodrop::cpu {
namespace baseline {
extern const Loops kLoops;
}
#if defined(AUTODROP_X86)
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}
#endif

const Loops* loops_named(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline::kLoops;
#if defined(AUTODROP_X86)
  __builtin_cpu_init();
  const bool runs_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx2") == 0 && runs_avx2) return &avx2::kLoops;
  if (std::strcmp(name, "avx512") == 0 && runs_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &avx512::kLoops;
  }
#endif
  return nullptr;
}

const Loops* best_loops() {
  static const Loops* const best = [] {
    for (const char* name : {"avx512", "avx2"}) {
      if (const Loops* loops = loops_named(name)) return loops;
    }
    return loops_named("baseline");
  }();
  return best;
}

namespace {

std::int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2;
}

// How many of `num_threads` threads are worth their start for a list of stretches, of which every
// element moves `bytes` more than itself.
template <class Stretch>
int threads_for(const Stretch* begin, const Stretch* end, std::int64_t bytes, int num_threads) {
  std::int64_t moved = 0;
  for (; begin != end && moved < num_threads * kBytesForThread; ++begin) {
    moved += begin->length * (bytes_of(begin->dtype) + bytes);
  }
  return static_cast<int>(std::min<std::int64_t>(moved / kBytesForThread, num_threads));
}

}  // namespace

void accumulate(const Piece* pieces, const std::int64_t* runs, std::int64_t num_rows,
                const std::int64_t* bases, double* table, int num_threads, const Loops* loops) {
  const Piece* const last = pieces + runs[kSwaps * num_rows];
  const auto add_row = [&](std::int64_t row) {
    loops->add_row(pieces + runs[kSwaps * row], pieces + runs[kSwaps * (row + 1)], last, bases,
                   table + kLanes * row);
  };
  const int threads = threads_for(pieces, last, 0, num_threads);
  if (threads <= 1) {
    for (std::int64_t row = 0; row < num_rows; ++row) add_row(row);
    return;
  }
  // Rows are taken one by one: hashing gives some of them more pieces than others.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t row = 0; row < num_rows; ++row) add_row(row);
}

void accumulate_exact(const Span* spans, std::int64_t num_spans, const std::int64_t* bases,
                      double* table, int num_threads, const Loops* loops) {
  const int threads = threads_for(spans, spans + num_spans, 2 * sizeof(double), num_threads);
  if (threads <= 1) return loops->add_spans(spans, spans + num_spans, bases, table);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int share = 0; share < threads; ++share) {
    loops->add_spans(spans + num_spans * share / threads, spans + num_spans * (share + 1) / threads,
                     bases, table);
  }
}

void close(double* running, double* mean, double* displacement, double divisor,
           const std::int64_t* bounds, std::int64_t num_parts, double* sums, int num_threads,
           const Loops* loops) {
  struct Block {
    std::int64_t begin, length, part;
    double sums[2];
  };
  std::vector<Block> blocks;
  for (std::int64_t part = 0; part < num_parts; ++part) {
    for (std::int64_t at = bounds[part]; at < bounds[part + 1]; at += kCloseBlock) {
      blocks.push_back({at, std::min(kCloseBlock, bounds[part + 1] - at), part, {}});
    }
  }
  const auto close_block = [&](Block& block) {
    loops->close_block(block.length, running + block.begin, mean + block.begin,
                       displacement + block.begin, divisor, block.sums);
  };
  const std::int64_t bytes = bounds[num_parts] * 6 * static_cast<std::int64_t>(sizeof(double));
  const int threads =
      static_cast<int>(std::min<std::int64_t>(bytes / kBytesForThread, num_threads));
  if (threads <= 1) {
    for (Block& block : blocks) close_block(block);
  } else {
    const auto num_blocks = static_cast<std::int64_t>(blocks.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t b = 0; b < num_blocks; ++b) close_block(blocks[static_cast<std::size_t>(b)]);
  }
  std::fill(sums, sums + 2 * num_parts, 0.0);
  for (const Block& block : blocks) {
    sums[2 * block.part] += block.sums[0];
    sums[2 * block.part + 1] += block.sums[1];
  }
}

}  // namespace autodrop::cpu
