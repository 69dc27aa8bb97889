// The tables that a plan hands to every backend. Python builds them once
// (autodrop_ext/ops/plan.py); kernels only read them. All sizes and offsets are int64 and count
// elements, never bytes.
#pragma once

#include <cstdint>

namespace autodrop {

enum class DType : std::int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// One row of the chunk table, int64[num_chunks, 4]. A chunk never crosses a tensor.
struct Chunk {
  std::int64_t param;   // address of the chunk's first parameter element
  std::int64_t arena;   // offset of the same element in every arena, a multiple of 32
  std::int64_t length;  // elements, may be 0
  std::int64_t dtype;   // DType of the parameter; arenas are always float32
};
static_assert(sizeof(Chunk) == 32, "autodrop_ext/ops/plan.py writes rows of four int64");

// One row of the tile table of GPU plans, int64[num_tiles, 2]: what one block works on. A large
// chunk is a tile of its own and all threads share it; small chunks come many to a tile, one to a
// warp.
struct Tile {
  std::int64_t first_chunk;
  std::int64_t num_chunks;
};
static_assert(sizeof(Tile) == 16, "autodrop_ext/ops/plan.py writes rows of two int64");

// What closing a window yields, for a chunk, for a tensor and in total: float64[4].
struct Sums {
  double dot;            // <s_i, s_{i-1}>
  double norm;           // |s_i|^2
  double previous_norm;  // |s_{i-1}|^2
  double mean_norm;      // |m_i|^2
};
static_assert(sizeof(Sums) == 32, "autodrop_ext/ops/plan.py allocates rows of four float64");

}  // namespace autodrop
