#include "cpu/parallel.h"

#include <algorithm>
#include <cstring>

namespace autodrop::cpu {
namespace baseline {
extern const Kernels kKernels;
}
#if defined(AUTODROP_X86)
namespace avx2 {
extern const Kernels kKernels;
}
#endif

const Kernels* kernels_named(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &baseline::kKernels;
#if defined(AUTODROP_X86)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return &avx2::kKernels;
  }
#endif
  return nullptr;
}

const Kernels* best_kernels() {
  static const Kernels* const best = [] {
    const Kernels* avx2 = kernels_named("avx2");
    return avx2 != nullptr ? avx2 : kernels_named("baseline");
  }();
  return best;
}

int useful_threads(std::int64_t bytes, int num_threads) {
  const std::int64_t useful = bytes / kBytesPerThread;
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(useful, num_threads)));
}

namespace {

// Bytes that an operation moves for each element. Parameters count as float32: a sum over the
// chunks' dtypes would be exact and cost more than it tells.
constexpr std::int64_t kParameter = 4, kArena = 4;

// Above this size an arena does not stay in a cache between two steps, and streaming pays.
constexpr std::int64_t kStreamElements = std::int64_t{8} << 20;

std::int64_t arena_elements(const Plan& plan) {
  if (plan.num_chunks == 0) return 0;
  const Chunk& last = plan.chunks[plan.num_chunks - 1];
  return last.arena + last.length;
}

// First chunk at or after `offset` elements of the arena.
std::int64_t chunk_at(const Plan& plan, std::int64_t offset) {
  std::int64_t low = 0, high = plan.num_chunks;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (plan.chunks[middle].arena < offset) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls body(first chunk, last chunk) with every chunk exactly once, in equal shares of elements.
template <class Body>
void for_shares(const Plan& plan, std::int64_t bytes_per_element, int num_threads,
                const Body& body) {
  const std::int64_t elements = arena_elements(plan);
  const int shares = useful_threads(elements * bytes_per_element, num_threads);
  if (shares <= 1) {
    body(std::int64_t{0}, plan.num_chunks);
    return;
  }
#pragma omp parallel for num_threads(shares) schedule(static, 1)
  for (int share = 0; share < shares; ++share) {
    const auto edge = [&](int s) {
      if (s == shares) return plan.num_chunks;
      return chunk_at(plan, elements / shares * s + elements % shares * s / shares);
    };
    body(edge(share), edge(share + 1));
  }
}

void add_scaled(Sums& total, const Sums& sums, double weight) {
  total.dot += weight * sums.dot;
  total.norm += weight * sums.norm;
  total.previous_norm += weight * sums.previous_norm;
  total.mean_norm += weight * sums.mean_norm;
}

Sums add_up(const Plan& plan, double displacement_scale, double mean_scale, const Sums* partials,
            Sums* per_tensor) {
  Sums total{};
  for (std::int64_t t = 0; t < plan.num_tensors; ++t) {
    Sums sums{};
    for (std::int64_t c = plan.tensor_chunks[t]; c < plan.tensor_chunks[t + 1]; ++c) {
      add_scaled(sums, partials[c], 1.0);
    }
    sums.dot *= displacement_scale;
    sums.norm *= displacement_scale;
    sums.previous_norm *= displacement_scale;
    sums.mean_norm *= mean_scale;
    per_tensor[t] = sums;
    add_scaled(total, sums, plan.weights[t]);
  }
  return total;
}

}  // namespace

void accumulate(const Plan& plan, float* running, const float* mean, bool first, float weight,
                int num_threads, const Kernels* kernels) {
  const bool stream = first && arena_elements(plan) >= kStreamElements;
  const std::int64_t bytes = kParameter + (first ? kArena : 2 * kArena) + (mean ? kArena : 0);
  for_shares(plan, bytes, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels->accumulate(plan.chunks + begin, plan.chunks + end, running, mean, first, weight,
                        stream);
  });
}

Sums close_sum(const Plan& plan, const float* running, const float* previous, const float* before,
               double window, Sums* partials, Sums* per_tensor, int num_threads,
               const Kernels* kernels) {
  for_shares(plan, 3 * kArena, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels->close_sum(plan.chunks + begin, plan.chunks + end, running, previous, before,
                       partials + begin);
  });
  const double scale = 1.0 / (window * window);
  return add_up(plan, scale, scale, partials, per_tensor);
}

Sums close_delta(const Plan& plan, float* running, float* previous, float* mean, double window,
                 Sums* partials, Sums* per_tensor, int num_threads, const Kernels* kernels) {
  // Three arenas are read and written.
  for_shares(plan, 6 * kArena, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels->close_delta(plan.chunks + begin, plan.chunks + end, running, previous, mean, window,
                         partials + begin);
  });
  return add_up(plan, 1.0 / (window * window), 1.0, partials, per_tensor);
}

void write_back(const Plan& plan, const float* arena, const float* mean, double scale,
                int num_threads, const Kernels* kernels) {
  const std::int64_t bytes = kParameter + kArena + (mean ? kArena : 0);
  for_shares(plan, bytes, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels->write_back(plan.chunks + begin, plan.chunks + end, arena, mean, scale);
  });
}

}  // namespace autodrop::cpu
