// Lanes and signs of the count sketch, for the CPU and for GPUs. autodrop_ext/ops/reference.py is
// the specification.
#pragma once

#include "core/numeric.h"
#include "core/tables.h"

namespace autodrop::sketch {

// Lanes that share a word of signs.
constexpr int kSignLanes = 32;

// A permutation of 32-bit integers whose output bits look random ("lowbias32", Chris Wellons,
// nullprogram.com/blog/2018/07/31).
AUTODROP_HD static inline std::uint32_t mix32(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Lane of element `j` of a chunk, 0 to 4095.
AUTODROP_HD static inline int lane_of(int j, int packet, int swap) {
  return (((j >> 3) + packet) & (kPackets - 1)) << 3 | ((j & 7) ^ swap);
}

// Element of a chunk that is added to `lane`: the inverse of lane_of.
AUTODROP_HD static inline int element_of(int lane, int packet, int swap) {
  return (((lane >> 3) - packet) & (kPackets - 1)) << 3 | ((lane & 7) ^ swap);
}

// Signs of lanes 32 * word to 32 * word + 31: bit i is that of lane 32 * word + i, 1 means minus.
AUTODROP_HD static inline std::uint32_t sign_word(std::uint32_t hash, int word) {
  return mix32(hash ^ static_cast<std::uint32_t>(word));
}

// 1 if elements are subtracted from `lane`, 0 if they are added.
AUTODROP_HD static inline std::uint32_t sign_bit(std::uint32_t hash, int lane) {
  return sign_word(hash, lane >> 5) >> (lane & 31) & 1u;
}

}  // namespace autodrop::sketch
