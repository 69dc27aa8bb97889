// Compiled once per instruction set with AUTODROP_ISA naming the namespace. Nothing here may call
// an inline function from a shared header that is also compiled elsewhere: the linker could keep
// the copy that uses instructions an older processor lacks. The headers in core/ are
// `static inline` for that.
#include "cpu/loops.h"

#include "core/numeric.h"
#include "core/sketch.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace autodrop::cpu::AUTODROP_ISA {
namespace {

// Buckets that a thread keeps in registers while it adds the pieces of a row: a word of signs.
constexpr int kTile = sketch::kSignLanes;
constexpr int kTilePackets = kTile / kPacket;
constexpr int kTiles = kLanes / kTile;

// Pieces that are read at the same time: one stream of reads is bound by latency, and a bucket is
// loaded and stored only once for all of them. 8 took 2 to 10 % longer.
constexpr int kStreams = 16;
// Bytes that each of them is fetched ahead; 512 took 1 to 4 % longer, 2,048 a fifth.
constexpr int kAhead = 1024;
// Packets below which a piece is added alone: a pass over its row, of which it fills less than
// half, took longer.
constexpr int kShort = 256;

constexpr std::int64_t kLine = 64;  // bytes of the cache

inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }
inline double to_double(Half x) { return numeric::to_float(x); }
inline double to_double(BFloat16 x) { return numeric::to_float(x); }

// Calls visit(T{}) with the type of the elements.
template <class Visit>
inline void with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kFloat64:
      return visit(double{});
    case DType::kFloat16:
      return visit(Half{});
    case DType::kBFloat16:
      return visit(BFloat16{});
  }
}

template <class T>
inline const T* elements(const std::int64_t* bases, std::uint32_t tensor, std::int64_t offset) {
  return reinterpret_cast<const T*>(bases[tensor] + offset);
}

// ---- Registers ------------------------------------------------------------------------------
//
// A Tile holds 32 buckets. `xor_lanes(swap)` moves bucket i of every packet to i ^ swap, and
// `add(x, signs, weight)` adds 32 elements, of which those are negated whose bit is set.
// `add_packet` adds eight elements to eight buckets in memory and does both at once: element i goes
// to bucket i ^ swap, and bit i of `signs` is that of bucket i.

#if defined(__AVX2__)

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline __m256 load8(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m256i xor_index(int swap) {
  return _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(swap));
}

#endif

#if defined(__AVX512F__)

inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline __m512 load16(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512d negate(__m512d x, __mmask8 signs) {
  return _mm512_mask_xor_pd(x, signs, x, _mm512_set1_pd(-0.0));
}

inline __m512i xor_index64(int swap) { return _mm512_cvtepi32_epi64(xor_index(swap)); }

struct Tile {
  __m512d packet[kTilePackets];

  void load(const double* bucket) {
    for (int p = 0; p < kTilePackets; ++p) packet[p] = _mm512_loadu_pd(bucket + kPacket * p);
  }
  void store(double* bucket) const {
    for (int p = 0; p < kTilePackets; ++p) _mm512_storeu_pd(bucket + kPacket * p, packet[p]);
  }
  void xor_lanes(int swap) {
    const __m512i index = xor_index64(swap);
    for (int p = 0; p < kTilePackets; ++p) packet[p] = _mm512_permutexvar_pd(index, packet[p]);
  }
  template <class T>
  void add(const T* x, std::uint32_t signs, double weight) {
    const __m512d w = _mm512_set1_pd(weight);
#pragma GCC unroll 2
    for (int p = 0; p < kTilePackets; p += 2) {
      __m512 v = load16(x + kPacket * p);
      v = _mm512_mask_xor_ps(v, static_cast<__mmask16>(signs >> (kPacket * p)), v,
                             _mm512_set1_ps(-0.0f));
      const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
      packet[p] = _mm512_fmadd_pd(_mm512_cvtps_pd(low), w, packet[p]);
      packet[p + 1] = _mm512_fmadd_pd(_mm512_cvtps_pd(high), w, packet[p + 1]);
    }
  }
  void add(const double* x, std::uint32_t signs, double weight) {
    const __m512d w = _mm512_set1_pd(weight);
#pragma GCC unroll 4
    for (int p = 0; p < kTilePackets; ++p) {
      const __m512d v = _mm512_loadu_pd(x + kPacket * p);
      packet[p] =
          _mm512_fmadd_pd(negate(v, static_cast<__mmask8>(signs >> (kPacket * p))), w, packet[p]);
    }
  }
};

inline void add_packet(double* bucket, __m512d x, std::uint32_t signs, double weight) {
  const __m512d v = negate(x, static_cast<__mmask8>(signs));
  _mm512_storeu_pd(bucket, _mm512_fmadd_pd(v, _mm512_set1_pd(weight), _mm512_loadu_pd(bucket)));
}
template <class T>
inline void add_packet(double* bucket, const T* x, int swap, std::uint32_t signs, double weight) {
  const __m256 v = _mm256_permutevar8x32_ps(load8(x), xor_index(swap));
  add_packet(bucket, _mm512_cvtps_pd(v), signs, weight);
}
inline void add_packet(double* bucket, const double* x, int swap, std::uint32_t signs,
                       double weight) {
  const __m512d v = _mm512_permutexvar_pd(xor_index64(swap), _mm512_loadu_pd(x));
  add_packet(bucket, v, signs, weight);
}

#elif defined(__AVX2__)

// Sign bits of eight float32 by the bits of a byte. A table in the first-level cache takes one
// instruction where shifts take three.
struct SignTable {
  alignas(32) std::uint32_t bits[256][8];
  constexpr SignTable() : bits() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8; ++i) bits[byte][i] = (byte >> i & 1) << 31;
    }
  }
};
constexpr SignTable kSigns;

inline __m256 negate(__m256 x, std::uint32_t byte) {
  return _mm256_xor_ps(x, _mm256_load_ps(reinterpret_cast<const float*>(kSigns.bits[byte])));
}
inline __m256d negate(__m256d x, std::uint32_t nibble) {
  const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(kSigns.bits[nibble]));
  return _mm256_xor_pd(x, _mm256_castsi256_pd(_mm256_slli_epi64(
                              _mm256_cvtepu32_epi64(_mm_srli_epi32(bits, 31)), 63)));
}
inline __m256d low(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline __m256d high(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

// Moves element i of four to i ^ swap, of which the lower two bits count.
inline __m256d xor_quad(__m256d x, __m256i index) {
  return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(x), index));
}
inline __m256i quad_index(int swap) { return xor_index((swap & 3) * 2); }

struct Tile {
  __m256d half[2 * kTilePackets];

  void load(const double* bucket) {
    for (int h = 0; h < 2 * kTilePackets; ++h) half[h] = _mm256_loadu_pd(bucket + 4 * h);
  }
  void store(double* bucket) const {
    for (int h = 0; h < 2 * kTilePackets; ++h) _mm256_storeu_pd(bucket + 4 * h, half[h]);
  }
  void xor_lanes(int swap) {
    const __m256i index = quad_index(swap);
    const __m256d across = _mm256_castsi256_pd(_mm256_set1_epi64x(swap & 4 ? -1 : 0));
#pragma GCC unroll 4
    for (int h = 0; h < 2 * kTilePackets; h += 2) {
      const __m256d a = xor_quad(half[h], index), b = xor_quad(half[h + 1], index);
      half[h] = _mm256_blendv_pd(a, b, across);
      half[h + 1] = _mm256_blendv_pd(b, a, across);
    }
  }
  template <class T>
  void add(const T* x, std::uint32_t signs, double weight) {
    const __m256d w = _mm256_set1_pd(weight);
#pragma GCC unroll 4
    for (int h = 0; h < 2 * kTilePackets; h += 2) {
      const __m256 v = negate(load8(x + 4 * h), signs >> (4 * h) & 0xff);
      half[h] = _mm256_fmadd_pd(low(v), w, half[h]);
      half[h + 1] = _mm256_fmadd_pd(high(v), w, half[h + 1]);
    }
  }
  void add(const double* x, std::uint32_t signs, double weight) {
    const __m256d w = _mm256_set1_pd(weight);
#pragma GCC unroll 8
    for (int h = 0; h < 2 * kTilePackets; ++h) {
      const __m256d v = negate(_mm256_loadu_pd(x + 4 * h), signs >> (4 * h) & 0xf);
      half[h] = _mm256_fmadd_pd(v, w, half[h]);
    }
  }
};

inline void add_quad(double* bucket, __m256d x, double weight) {
  _mm256_storeu_pd(bucket, _mm256_fmadd_pd(x, _mm256_set1_pd(weight), _mm256_loadu_pd(bucket)));
}
template <class T>
inline void add_packet(double* bucket, const T* x, int swap, std::uint32_t signs, double weight) {
  const __m256 v = negate(_mm256_permutevar8x32_ps(load8(x), xor_index(swap)), signs);
  add_quad(bucket, low(v), weight);
  add_quad(bucket + 4, high(v), weight);
}
inline void add_packet(double* bucket, const double* x, int swap, std::uint32_t signs,
                       double weight) {
  for (int h = 0; h < 2; ++h) {
    const __m256d v = xor_quad(_mm256_loadu_pd(x + (4 * h ^ (swap & 4))), quad_index(swap));
    add_quad(bucket + 4 * h, negate(v, signs >> (4 * h) & 0xf), weight);
  }
}

#else

struct SignTable {
  double factor[256][8];
  constexpr SignTable() : factor() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8; ++i) factor[byte][i] = byte >> i & 1 ? -1.0 : 1.0;
    }
  }
};
constexpr SignTable kSigns;

struct Tile {
  double bucket[kTile];

  void load(const double* from) {
    for (int i = 0; i < kTile; ++i) bucket[i] = from[i];
  }
  void store(double* to) const {
    for (int i = 0; i < kTile; ++i) to[i] = bucket[i];
  }
  void xor_lanes(int swap) {
    const Tile before = *this;
    for (int i = 0; i < kTile; ++i) bucket[i ^ swap] = before.bucket[i];
  }
  template <class T>
  void add(const T* x, std::uint32_t signs, double weight) {
    for (int p = 0; p < kTile; p += kPacket) {
      const double* factor = kSigns.factor[signs >> p & 0xff];
      for (int i = 0; i < kPacket; ++i) {
        bucket[p + i] += to_double(x[p + i]) * factor[i] * weight;
      }
    }
  }
};

template <class T>
inline void add_packet(double* bucket, const T* x, int swap, std::uint32_t signs, double weight) {
  const double* factor = kSigns.factor[signs];
  for (int i = 0; i < kPacket; ++i) {
    const int lane = i ^ swap;
    bucket[lane] += to_double(x[i]) * factor[lane] * weight;
  }
}

#endif

// ---- Pieces ---------------------------------------------------------------------------------

// The whole packets of a piece, which lie in its row one after the other, around its end.
template <class T>
struct Packets {
  const T* x;  // first element of the first of them
  int from;    // packet of the row that it is added to, 0 to 511
  int count;

  Packets(const Piece& piece, const std::int64_t* bases) {
    const int first = (piece.start + kPacket - 1) / kPacket;
    const int last = (piece.start + piece.length) / kPacket;
    x = elements<T>(bases, piece.tensor, piece.offset) + (kPacket * first - piece.start);
    from = (first + piece.packet) & (kPackets - 1);
    count = first < last ? last - first : 0;
  }
};

inline int whole_packets(const Piece& piece) {
  return (piece.start + piece.length) / kPacket - (piece.start + kPacket - 1) / kPacket;
}

// Elements [begin, end) of a chunk, one at a time.
template <class T>
void add_elements(const Piece& piece, const T* x, int begin, int end, double* row) {
  for (int j = begin; j < end; ++j) {
    const int lane = sketch::lane_of(j, piece.packet, piece.swap);
    const double value = to_double(x[j - piece.start]) * piece.weight;
    row[lane] += sketch::sign_bit(piece.hash, lane) ? -value : value;
  }
}

// The first and last elements of a piece that do not fill a packet.
template <class T>
inline void add_ragged(const Piece& piece, const std::int64_t* bases, double* row) {
  const int begin = piece.start, end = begin + piece.length;
  if ((begin | end) % kPacket == 0) return;
  const T* x = elements<T>(bases, piece.tensor, piece.offset);
  const int first = (begin + kPacket - 1) / kPacket * kPacket, last = end / kPacket * kPacket;
  if (first > last) return add_elements(piece, x, begin, end, row);  // inside one packet
  add_elements(piece, x, begin, first, row);
  add_elements(piece, x, last, end, row);
}

// Packets [begin, end) of those of a piece, alone.
template <class T>
inline void add_packets(const Piece& piece, const Packets<T>& packets, int begin, int end,
                        double* row) {
  for (int i = begin; i < end;) {
    const int packet = (packets.from + i) & (kPackets - 1), first = packet & (kTilePackets - 1);
    std::uint32_t signs = sketch::sign_word(piece.hash, packet / kTilePackets) >> (kPacket * first);
    const int stop = i + kTilePackets - first < end ? i + kTilePackets - first : end;
    double* bucket = row + kPacket * packet;
    for (; i < stop; ++i, bucket += kPacket, signs >>= kPacket) {
      add_packet(bucket, packets.x + kPacket * i, piece.swap, signs & 0xff, piece.weight);
    }
  }
}

template <class T>
void add_piece(const Piece& piece, const std::int64_t* bases, double* row) {
  const Packets<T> packets(piece, bases);
  add_packets(piece, packets, 0, packets.count, row);
  add_ragged<T>(piece, bases, row);
}

// Signs of the elements instead of those of the lanes: bit i of every byte moves to i ^ swap.
inline void xor_signs(std::uint32_t* words, int swap) {
  const std::uint32_t masks[] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu};
  for (int bit = 0; bit < 3; ++bit) {
    if ((swap >> bit & 1) == 0) continue;
    const std::uint32_t mask = masks[bit];
    const int shift = 1 << bit;
    for (int w = 0; w < kTiles; ++w) {
      words[w] = (words[w] & mask) << shift | (words[w] >> shift & mask);
    }
  }
}

// Pieces of one row and one type that are read at the same time.
struct Batch {
  int size = 0;
  const Piece* pieces[kStreams];
};

// One pass over the row. Between the pieces of one swap the tile stays in the order of their
// elements, in which the loads are contiguous.
template <class T>
void add_batch(const Batch& batch, const Piece* next, const Piece* last, const std::int64_t* bases,
               double* row) {
  constexpr int kPacketBytes = kPacket * sizeof(T);
  constexpr int kAheadPackets = kAhead / kPacketBytes;
  const T* x[kStreams];
  int from[kStreams], whole[kStreams], swaps[kStreams];
  double weights[kStreams];
  alignas(64) std::uint32_t signs[kStreams][kTiles];
  for (int k = 0; k < batch.size; ++k) {
    const Piece& piece = *batch.pieces[k];
    const Packets<T> packets(piece, bases);
    x[k] = packets.x;
    from[k] = packets.from;
    whole[k] = packets.count - kTilePackets;
    swaps[k] = piece.swap;
    weights[k] = piece.weight;
    const std::uint32_t hash = piece.hash;
    for (int w = 0; w < kTiles; ++w) signs[k][w] = sketch::sign_word(hash, w);
    xor_signs(signs[k], piece.swap);
  }
  // The next pass starts as many streams again, each of which would wait for its first lines.
  for (int k = 0; k < batch.size && next + k < last; ++k) {
    const char* at = elements<char>(bases, next[k].tensor, next[k].offset) +
                     (kPackets - next[k].packet) % kPackets * kPacketBytes;
    for (int line = 0; line < kAhead; line += kLine) __builtin_prefetch(at + line);
  }
  for (int t = 0; t < kTiles; ++t) {
    Tile tile;
    tile.load(row + kTile * t);
    int swap = 0;
    for (int k = 0; k < batch.size; ++k) {
      const int at = (kTilePackets * t - from[k]) & (kPackets - 1);
      if (at > whole[k]) continue;
      const char* ahead = reinterpret_cast<const char*>(x[k]) +
                          ((at + kAheadPackets) & (kPackets - 1)) * kPacketBytes;
      for (std::size_t line = 0; line < kTile * sizeof(T); line += kLine) {
        __builtin_prefetch(ahead + line);
      }
      if (swaps[k] != swap) {
        tile.xor_lanes(swaps[k] ^ swap);
        swap = swaps[k];
      }
      tile.add(x[k] + kPacket * at, signs[k][t], weights[k]);
    }
    if (swap != 0) tile.xor_lanes(swap);
    tile.store(row + kTile * t);
  }
  // What does not fill a tile.
  for (int k = 0; k < batch.size; ++k) {
    const Piece& piece = *batch.pieces[k];
    const Packets<T> packets(piece, bases);
    const int before = (kTilePackets - packets.from % kTilePackets) % kTilePackets;
    const int after = (packets.from + packets.count) % kTilePackets;
    add_packets(piece, packets, 0, before, row);
    add_packets(piece, packets, packets.count - after, packets.count, row);
    add_ragged<T>(piece, bases, row);
  }
}

void add_row(const Piece* begin, const Piece* end, const Piece* last, const std::int64_t* bases,
             double* row) {
  Batch batches[4];  // of each type
  const auto add = [&](DType dtype, const Piece* next) {
    Batch& batch = batches[static_cast<int>(dtype)];
    with_type(dtype, [&](auto type) { add_batch<decltype(type)>(batch, next, last, bases, row); });
    batch.size = 0;
  };
  for (const Piece* piece = begin; piece != end; ++piece) {
    if (whole_packets(*piece) < kShort) {
      with_type(piece->dtype, [&](auto type) { add_piece<decltype(type)>(*piece, bases, row); });
      continue;
    }
    Batch& batch = batches[static_cast<int>(piece->dtype)];
    batch.pieces[batch.size++] = piece;
    if (batch.size == kStreams) add(piece->dtype, piece + 1);
  }
  for (int dtype = 0; dtype < 4; ++dtype) {
    if (batches[dtype].size != 0) add(static_cast<DType>(dtype), end);
  }
}

// ---- Spans ----------------------------------------------------------------------------------

template <class T>
void add_span(const Span& span, const T* __restrict x, double* __restrict bucket) {
  const double weight = span.weight;
  int i = 0;
  for (; i + kTile <= span.length; i += kTile) {
    for (std::size_t line = 0; line < kTile * sizeof(T); line += kLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead + line);
    }
    for (int b = 0; b < kTile; b += kLine / 8) __builtin_prefetch(bucket + i + kAhead / 8 + b, 1);
    Tile tile;
    tile.load(bucket + i);
    tile.add(x + i, 0, weight);
    tile.store(bucket + i);
  }
  for (; i < span.length; ++i) bucket[i] += to_double(x[i]) * weight;
}

void add_spans(const Span* begin, const Span* end, const std::int64_t* bases, double* table) {
  for (const Span* span = begin; span != end; ++span) {
    with_type(span->dtype, [&](auto type) {
      using T = decltype(type);
      add_span(*span, elements<T>(bases, span->tensor, span->offset), table + span->bucket);
    });
  }
}

// ---- Close ----------------------------------------------------------------------------------

void close_block(std::int64_t n, double* __restrict running, double* __restrict mean,
                 double* __restrict displacement, double divisor, double* sums) {
  // Eight partial sums whatever the registers, so that every instruction set adds in one order.
  constexpr int kSums = 8;
  double dot[kSums] = {}, norm[kSums] = {};
  const auto close_bucket = [&](std::int64_t i, int j) {
    const double m = running[i] / divisor;
    const double s = m - mean[i];
    dot[j] += s * displacement[i];
    norm[j] += s * s;
    displacement[i] = s;
    mean[i] = m;
    running[i] = 0;
  };
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) close_bucket(i + j, j);
  }
  for (int j = 0; i < n; ++i, ++j) close_bucket(i, j);
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      dot[j] += dot[j + width];
      norm[j] += norm[j + width];
    }
  }
  sums[0] = dot[0];
  sums[1] = norm[0];
}

#define AUTODROP_STRING_(x) #x
#define AUTODROP_STRING(x) AUTODROP_STRING_(x)

}  // namespace

extern const Loops kLoops;
const Loops kLoops = {AUTODROP_STRING(AUTODROP_ISA), add_row, add_spans, close_block};

}  // namespace autodrop::cpu::AUTODROP_ISA
