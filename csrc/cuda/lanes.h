// The lanes of a row of the table that one thread of a GPU block holds, and how pieces are added to
// them.
//
// 256 threads share a row: thread t holds packets t and t + 256, that is 16 of its 4,096 lanes. A
// packet of lanes takes a packet of elements, which is contiguous in memory, so that neighbouring
// threads read neighbouring memory whatever the rotation. Where a packet of elements starts at a
// multiple of 16 bytes it is read 16 bytes at a time. An exclusive or of lanes by a multiple of the
// elements in 16 bytes exchanges whole loads; the rest of it is a template argument, so that it
// costs no instruction. Packets that a piece covers in part, and those that are not aligned, are
// read element by element.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/numeric.h"
#include "core/sketch.h"
#include "core/tables.h"
#include "cuda/sums.h"

#if defined(__CUDA_ARCH__)
#define AUTODROP_UNROLL _Pragma("unroll")
#define AUTODROP_NO_UNROLL _Pragma("unroll 1")
#else
#define AUTODROP_UNROLL
#define AUTODROP_NO_UNROLL
#endif

namespace autodrop::lanes {

constexpr int kThreads = 256;
constexpr int kHeld = kPackets / kThreads;  // packets of a thread
static_assert(kHeld == 2 && kPacket == 8, "sign words and half-precision pairs rely on it");

// A piece with its address, as threads of a block share it.
struct alignas(16) Stretch {
  std::uint64_t origin;  // address of the chunk's first element, which may lie before the tensor
  double weight;
  std::uint32_t hash;
  std::uint32_t code;  // code_of
  std::uint16_t start, end;
  std::uint16_t packet;
  std::uint16_t by_element;  // 1 if not aligned, or if it covers a packet in part
};
static_assert(sizeof(Stretch) == 32, "two loads of 16 bytes");

// Pieces of one code run through one case of a switch: dtype, alignment and exclusive or.
constexpr std::uint32_t kMisaligned = 32;
AUTODROP_HD static inline std::uint32_t code_of(DType dtype, bool aligned, std::uint32_t swap) {
  const std::uint32_t of_dtype = static_cast<std::uint32_t>(dtype) * kSwaps;
  return aligned ? of_dtype + swap : kMisaligned + of_dtype + swap;
}
AUTODROP_HD static inline std::uint32_t swap_of(std::uint32_t code) { return code % kSwaps; }
AUTODROP_HD static inline bool is_aligned(std::uint32_t code) { return code < kMisaligned; }
AUTODROP_HD static inline DType dtype_of(std::uint32_t code) {
  return static_cast<DType>(code % kMisaligned / kSwaps);
}

AUTODROP_HD static inline std::uint32_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8u : dtype == DType::kFloat32 ? 4u : 2u;
}

// Bytes that are loaded at once, of which half precision reads eight elements.
struct alignas(16) Words {
  std::uint32_t word[4];
};

// A plain cast of an address would leave nvcc with generic loads, which look up the kind of memory
// first.
template <class T>
AUTODROP_HD static inline T* global(std::uint64_t address) {
#if defined(AUTODROP_DEVICE_CODE)
  return static_cast<T*>(__cvta_global_to_generic(static_cast<std::size_t>(address)));
#else
  return reinterpret_cast<T*>(address);
#endif
}

AUTODROP_HD static inline float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return numeric::to_float(x);
#endif
}
AUTODROP_HD static inline float to_float(BFloat16 x) { return numeric::to_float(x); }
AUTODROP_HD static inline double widened(double x) { return x; }
AUTODROP_HD static inline float widened(float x) { return x; }
template <class T>
AUTODROP_HD static inline float widened(T half) {
  return to_float(half);
}

// ---- signs ------------------------------------------------------------------------------------

// The signs of packet `p` of a row: that of its lane l in bit 24 + l.
AUTODROP_HD static inline std::uint32_t signs_of(std::uint32_t hash, int p) {
  return sketch::sign_word(hash, p >> 2) << (24 - (p & 3) * kPacket);
}
AUTODROP_HD static inline std::uint32_t sign_bit(std::uint32_t signs, int l) {
  return signs << (kPacket - 1 - l) & 0x80000000u;
}
AUTODROP_HD static inline float with_sign(float x, std::uint32_t sign) {
  return numeric::bit_cast<float>(numeric::bit_cast<std::uint32_t>(x) ^ sign);
}
AUTODROP_HD static inline double with_sign(double x, std::uint32_t sign) {
  return numeric::bit_cast<double>(numeric::bit_cast<std::uint64_t>(x) ^
                                   static_cast<std::uint64_t>(sign) << 32);
}

// Half precision comes in pairs of 16 bits, which take their signs together: the sign of lane
// 2 q + low in bit 9 + 2 q, that of the other lane of the pair in bit 25 + 2 q.
AUTODROP_HD static inline std::uint32_t pairs_of(std::uint32_t signs, int low) {
  return ((signs << low) & 0xaa000000u) | ((signs >> (15 + low)) & 0x0000aa00u);
}

// ---- packets ----------------------------------------------------------------------------------

// Adds a packet of elements that was loaded in lane order, but for an exclusive or by kSwap, to the
// packet `held` of a thread's sums.
template <class T, int kSwap>
struct Packet {
  static constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of a load
  template <class Sums>
  AUTODROP_HD static inline void add(Sums& sums, int held, const Words* loads, std::uint32_t signs,
                                     double weight) {
    AUTODROP_UNROLL
    for (int q = 0; q < kPacket / 2; ++q) {
      sums.add(held * (kPacket / 2) + q, lane(loads, 2 * q, signs), lane(loads, 2 * q + 1, signs),
               weight);
    }
  }
  AUTODROP_HD static inline T lane(const Words* loads, int l, std::uint32_t signs) {
    struct alignas(16) Elements {
      T element[kWide];
    };
    const T x = numeric::bit_cast<Elements>(loads[l / kWide]).element[l % kWide ^ kSwap];
    return with_sign(x, sign_bit(signs, l));
  }
};

template <class T, int kSwap>
struct HalfPacket {
  static constexpr int kWide = kPacket;
  template <class Sums>
  AUTODROP_HD static inline void add(Sums& sums, int held, const Words* loads, std::uint32_t signs,
                                     double weight) {
    constexpr int kLow = kSwap & 1;  // lane of a pair that takes its first element
    const std::uint32_t pairs = pairs_of(signs, kLow);
    AUTODROP_UNROLL
    for (int q = 0; q < kPacket / 2; ++q) {
      const std::uint32_t both = loads->word[q ^ kSwap >> 1] ^ (pairs << (6 - 2 * q) & 0x80008000u);
      const float first = widened(T{static_cast<std::uint16_t>(both)});
      const float second = widened(T{static_cast<std::uint16_t>(both >> 16)});
      sums.add(held * (kPacket / 2) + q, kLow == 0 ? first : second, kLow == 0 ? second : first,
               weight);
    }
  }
};
template <int kSwap>
struct Packet<Half, kSwap> : HalfPacket<Half, kSwap> {};
template <int kSwap>
struct Packet<BFloat16, kSwap> : HalfPacket<BFloat16, kSwap> {};

// Packet of a chunk that the thread's packet `held` takes.
AUTODROP_HD static inline int packet_of(const Stretch& stretch, int thread, int held) {
  return (thread + held * kThreads - stretch.packet) & (kPackets - 1);
}
AUTODROP_HD static inline bool is_whole(const Stretch& stretch, int packet) {
  return packet * kPacket >= stretch.start && (packet + 1) * kPacket <= stretch.end;
}

// Adds the whole packets of kCount aligned stretches of one code, first all loads, then arithmetic.
// A packet that is not whole is not read, and adds zeros.
template <class T, int kSwap, int kCount, class Sums>
AUTODROP_HD static inline void add_packets(Sums& sums, const Stretch* stretches, int thread) {
  using Of = Packet<T, kSwap>;
  constexpr int kLoads = kPacket / Of::kWide;
  Words loads[kCount][kHeld][kLoads];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    const Stretch& stretch = stretches[u];
    AUTODROP_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int packet = packet_of(stretch, thread, h);
      const bool whole = is_whole(stretch, packet);
      const auto* at = global<const Words>(stretch.origin) + packet * kLoads;
      AUTODROP_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int from = i ^ static_cast<int>(swap_of(stretch.code)) / Of::kWide;
        loads[u][h][i] = whole ? at[from] : Words{};
      }
    }
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    AUTODROP_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const std::uint32_t signs = signs_of(stretches[u].hash, thread + h * kThreads);
      Of::add(sums, h, loads[u][h], signs, stretches[u].weight);
    }
  }
}

// Adds kCount stretches of one code element by element: all of them if they are not aligned,
// otherwise those of their packets that they cover in part.
template <class T, int kCount, class Sums>
AUTODROP_HD static inline void add_elements(Sums& sums, const Stretch* stretches, int thread) {
  // Half precision is widened at once: nvcc takes minutes for arrays of 16 bits.
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Wide elements[kCount][kHeld][kPacket];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    const Stretch& stretch = stretches[u];
    const T* origin = global<const T>(stretch.origin);
    const int swap = static_cast<int>(swap_of(stretch.code));
    AUTODROP_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int packet = packet_of(stretch, thread, h);
      const bool skipped = is_aligned(stretch.code) && is_whole(stretch, packet);
      AUTODROP_UNROLL
      for (int l = 0; l < kPacket; ++l) {
        const int j = packet * kPacket + (l ^ swap);
        const bool inside = j >= stretch.start && j < stretch.end && !skipped;
        elements[u][h][l] = inside ? widened(origin[j]) : Wide{};
      }
    }
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    AUTODROP_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const std::uint32_t signs = signs_of(stretches[u].hash, thread + h * kThreads);
      AUTODROP_UNROLL
      for (int l = 0; l < kPacket; l += 2) {
        sums.add((h * kPacket + l) / 2, with_sign(elements[u][h][l], sign_bit(signs, l)),
                 with_sign(elements[u][h][l + 1], sign_bit(signs, l + 1)), stretches[u].weight);
      }
    }
  }
}

}  // namespace autodrop::lanes
