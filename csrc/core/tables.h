// The tables that a plan hands to every backend. Python builds them once
// (autodrop_ext/ops/plan.py); kernels only read them.
#pragma once

#include <cstdint>

namespace autodrop {

enum class DType : std::uint8_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// A sketch is float64[num_rows, kLanes]. A lane belongs to a packet of eight, and 32 lanes share a
// word of signs (core/sketch.h).
constexpr int kLanes = 4096;
constexpr int kPacket = 8;
constexpr int kPackets = kLanes / kPacket;  // of a row
constexpr int kSwaps = 8;                   // values of Piece::swap

// A contiguous stretch of one local tensor inside one chunk, which is 4,096 consecutive elements of
// a parameter. Element j of the chunk is added to the lane that lane_of in core/sketch.h gives.
// Pieces are sorted by (row, swap): those of row r with swap s are runs[8 r + s] to
// runs[8 r + s + 1], where runs is int64[num_rows * 8 + 1].
struct Piece {
  std::int64_t offset;   // bytes from the tensor's first element to that of the stretch
  double weight;         // of its elements
  std::uint32_t hash;    // of the chunk, for signs
  std::uint32_t tensor;  // index into bases, int64[num_tensors]: addresses of first elements
  std::uint16_t start;   // element of the chunk that the stretch begins at, 0 to 4095
  std::uint16_t length;  // 1 to 4096, start + length <= 4096
  std::uint16_t packet;  // rotation of the chunk in packets, 0 to 511
  std::uint8_t swap;     // exclusive or of lanes within a packet, 0 to 7
  DType dtype;           // of the tensor
};
static_assert(sizeof(Piece) == 32, "autodrop_ext/ops/plan.py writes rows of 32 bytes");

// A contiguous stretch of one local tensor in a table that has a bucket for every element: element
// i is added to bucket + i. Spans are sorted by bucket and do not overlap.
struct Span {
  std::int64_t offset;   // bytes from the tensor's first element to that of the stretch
  double weight;         // of its elements
  std::int64_t bucket;   // of the first element
  std::uint32_t tensor;  // index into bases
  std::uint16_t length;  // 1 to 8192
  std::uint8_t unused;
  DType dtype;  // of the tensor
};
static_assert(sizeof(Span) == 32, "autodrop_ext/ops/plan.py writes rows of 32 bytes");

// Buckets of a partial sum of a close at most; a block of them does not cross a part. The sums of
// blocks are added in order, so that they do not depend on threads.
constexpr std::int64_t kCloseBlock = 4096;

}  // namespace autodrop
