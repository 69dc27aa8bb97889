#include "cuda/table.h"

#include <type_traits>

#include "cuda/lanes.h"

namespace autodrop::cuda {
namespace {

using lanes::kHeld;
using lanes::kThreads;
using lanes::Stretch;
using sums::kTwoFloats;
using sums::Two;

// Two blocks a multiprocessor is what ptxas may count on: 128 registers a thread, of which 32 hold
// sums and 32 what is in flight.
constexpr int kBlocks = 2;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Pieces that a block looks up at once: a table entry and an address, two waits in a row for device
// memory, for all of them.
constexpr int kBatch = kThreads;
static_assert(kBatch <= sums::kMostAdditions, "a lane takes one element of a piece");

// Bytes that a thread has in flight when it adds pieces: one piece of float64, two of float32, four
// of half precision.
constexpr int kInFlight = 128;
template <class T>
constexpr int kMany = kInFlight / (kHeld * kPacket * static_cast<int>(sizeof(T)));

constexpr int kManyMisaligned = 2;

// The runtime keeps the last error of a thread and reports it to whoever asks next, torch among
// them. Whoever gets the error from here needs no second report.
cudaError_t settled(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Switches to a device and back. The caller has made that device current where going back could
// make a context on another one; here it costs one query.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = settled(cudaGetDevice(&previous_));
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = settled(cudaSetDevice(device));
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) settled(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_;
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

struct alignas(16) Range {
  std::int64_t begin, end;
};

// A row of a table, with 16 bytes a load.
template <class Row>
__device__ Row load_row(const Row* row) {
  struct Halves {
    lanes::Words first, second;
  };
  const auto* halves = reinterpret_cast<const lanes::Words*>(row);
  return numeric::bit_cast<Row>(Halves{halves[0], halves[1]});
}

// ---- accumulate -------------------------------------------------------------------------------

struct Batch {
  Stretch stretches[kBatch];
  std::int64_t ends[kSwaps];
};

__device__ Batch& shared_batch() {
  __shared__ Batch batch;
  return batch;
}

// The pieces of one row that one of `splits` blocks adds, numbered from 0 over all runs.
struct Share {
  const std::int64_t* runs;  // of the row
  std::int64_t split, splits;
  std::int64_t* ends;  // [kSwaps], shared: how many of them are in runs 0 to r

  __device__ void count() const {
    if (threadIdx.x < kSwaps) {
      std::int64_t end = 0;
      AUTODROP_NO_UNROLL
      for (unsigned r = 0; r <= threadIdx.x; ++r) {
        end += (runs[r + 1] - runs[r] - split + splits - 1) / splits;  // 0 if it ends before split
      }
      ends[threadIdx.x] = end;
    }
  }
  // Index of its n-th piece in the table of pieces.
  __device__ std::int64_t piece(std::int64_t n) const {
    int run = 0;
    std::int64_t begin = 0;
    AUTODROP_UNROLL
    for (int r = 0; r < kSwaps - 1; ++r) {
      if (n >= ends[r]) {
        run = r + 1;
        begin = ends[r];
      }
    }
    return runs[run] + split + (n - begin) * splits;
  }
};

__device__ Stretch stretch_of(const Piece* piece, const std::int64_t* bases) {
  const auto p = load_row(piece);
  Stretch stretch;
  stretch.origin = static_cast<std::uint64_t>(bases[p.tensor] + p.offset) -
                   std::uint64_t{p.start} * lanes::size_of(p.dtype);
  stretch.weight = p.weight;
  stretch.hash = p.hash;
  // A packet of elements has 16, 32 or 64 bytes.
  stretch.code = lanes::code_of(p.dtype, stretch.origin % 16 == 0, p.swap);
  stretch.start = p.start;
  stretch.end = static_cast<std::uint16_t>(p.start + p.length);
  stretch.packet = p.packet;
  stretch.by_element =
      !lanes::is_aligned(stretch.code) || (stretch.start | stretch.end) % kPacket != 0;
  return stretch;
}

// Stretches of a batch are added group by group, and sums of two float32 are written after each:
// they have no weights, so that a group has one. Parameters of float64 are a group that keeps
// float64. Other sums stay in registers from batch to batch, and all stretches are one group.
constexpr std::uint64_t kFloat64Group = ~std::uint64_t{0};  // not the bits of a weight: a NaN

__device__ std::uint64_t group_of(const Stretch& stretch) {
  if (!kTwoFloats) return kFloat64Group;
  return lanes::dtype_of(stretch.code) == DType::kFloat64
             ? kFloat64Group
             : numeric::bit_cast<std::uint64_t>(stretch.weight);
}

// The group after `group`, in the order of bits from those of the first stretch up; that of the
// first stretch if there is none.
__device__ std::uint64_t next_group(const Stretch* stretches, int count, std::uint64_t group) {
  const std::uint64_t first = group_of(stretches[0]);
  std::uint64_t next = 0;
  AUTODROP_NO_UNROLL
  for (int at = 0; at < count; ++at) {
    const std::uint64_t after = group_of(stretches[at]) - first;
    if (after > group - first && (next == 0 || after < next)) next = after;
  }
  return first + next;
}

constexpr int kPairs = kHeld * kPacket / 2;
using Float64Sums = sums::Float64<kPairs>;
using TwoFloatSums = sums::TwoFloats<kPairs>;

// Whether sums of this kind ever take elements of a type.
template <class T, class Sums>
constexpr bool kTaken =
    !kTwoFloats || std::is_same_v<T, double> == std::is_same_v<Sums, Float64Sums>;

// Calls add(Count of stretches, first of them) for stretches from `first` on that have its code and
// its group: kMost at a time, then one at a time. Returns where another code or group begins.
template <int kMost, class Add>
__device__ int for_code(const Stretch* stretches, int first, int count, const Add& add) {
  const std::uint32_t code = stretches[first].code;
  const std::uint64_t group = group_of(stretches[first]);
  int end = first + 1;
  while (end < count && stretches[end].code == code && group_of(stretches[end]) == group) ++end;
  int at = first;
  AUTODROP_NO_UNROLL
  for (; at + kMost <= end; at += kMost) add(Count<kMost>{}, stretches + at);
  AUTODROP_NO_UNROLL
  for (; kMost > 1 && at < end; ++at) add(Count<1>{}, stretches + at);
  return end;
}

// An exclusive or within 16 bytes, one of 0 to kMost, as a template argument.
template <class T, int kSwap = 16 / int{sizeof(T)} - 1, class Sums>
__device__ int add_aligned(Sums& sums, const Stretch* stretches, int first, int count, int swap) {
  if constexpr (kSwap > 0) {
    if (swap < kSwap) return add_aligned<T, kSwap - 1>(sums, stretches, first, count, swap);
  }
  return for_code<kMany<T>>(stretches, first, count, [&](auto many, const Stretch* at) {
    lanes::add_packets<T, kSwap, decltype(many)::value>(sums, at, static_cast<int>(threadIdx.x));
  });
}

// All whole packets of aligned stretches.
template <class T, class Sums>
__device__ int add_packets(Sums& sums, const Stretch* stretches, int first, int count) {
  if constexpr (!kTaken<T, Sums>) return count;
  const int swap = static_cast<int>(lanes::swap_of(stretches[first].code));
  return add_aligned<T>(sums, stretches, first, count, swap % (16 / int{sizeof(T)}));
}

// Everything else.
template <class T, class Sums>
__device__ int add_elements(Sums& sums, const Stretch* stretches, int first, int count) {
  if constexpr (!kTaken<T, Sums>) return count;
  return for_code<kManyMisaligned>(stretches, first, count, [&](auto many, const Stretch* at) {
    lanes::add_elements<T, decltype(many)::value>(sums, at, static_cast<int>(threadIdx.x));
  });
}

// Adds the stretches of a group.
template <class Sums>
__device__ void add_group(Sums& sums, const Stretch* stretches, int count, std::uint64_t group) {
  for (int at = 0; at < count;) {
    if (!lanes::is_aligned(stretches[at].code) || group_of(stretches[at]) != group) {
      ++at;
      continue;
    }
    switch (lanes::dtype_of(stretches[at].code)) {
      case DType::kFloat32:
        at = add_packets<float>(sums, stretches, at, count);
        break;
      case DType::kFloat64:
        at = add_packets<double>(sums, stretches, at, count);
        break;
      case DType::kFloat16:
        at = add_packets<Half>(sums, stretches, at, count);
        break;
      case DType::kBFloat16:
        at = add_packets<BFloat16>(sums, stretches, at, count);
        break;
    }
  }
  for (int at = 0; at < count;) {
    if (!stretches[at].by_element || group_of(stretches[at]) != group) {
      ++at;
      continue;
    }
    switch (lanes::dtype_of(stretches[at].code)) {
      case DType::kFloat32:
        at = add_elements<float>(sums, stretches, at, count);
        break;
      case DType::kFloat64:
        at = add_elements<double>(sums, stretches, at, count);
        break;
      case DType::kFloat16:
        at = add_elements<Half>(sums, stretches, at, count);
        break;
      case DType::kBFloat16:
        at = add_elements<BFloat16>(sums, stretches, at, count);
        break;
    }
  }
}

// Writes sums times a weight to the block's row, or adds them to it.
template <class Sums>
__device__ void write_sums(const Sums& sums, double weight, double* row, bool adds) {
  AUTODROP_UNROLL
  for (int h = 0; h < kHeld; ++h) {
    const int packet = static_cast<int>(threadIdx.x) + h * kThreads;
    Two* lanes_of = reinterpret_cast<Two*>(row) + packet * (kPacket / 2);
    AUTODROP_UNROLL
    for (int i = 0; i < kPacket / 2; ++i) {
      Two two = sums.total(h * (kPacket / 2) + i, weight);
      if (adds) {
        const Two old = lanes_of[i];
        two = {{old.element[0] + two.element[0], old.element[1] + two.element[1]}};
      }
      lanes_of[i] = two;
    }
  }
}

template <class Sums>
__device__ void add_and_write(const Stretch* stretches, int count, std::uint64_t group, double* row,
                              bool adds) {
  Sums sums;
  add_group(sums, stretches, count, group);
  write_sums(sums, numeric::bit_cast<double>(group), row, adds);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    accumulate_kernel(const Piece* pieces, const std::int64_t* runs, unsigned num_rows,
                      unsigned splits, const std::int64_t* bases, double* to, bool adds) {
  Batch& batch = shared_batch();
  const unsigned row = blockIdx.x % num_rows, split = blockIdx.x / num_rows;
  const int thread = static_cast<int>(threadIdx.x);
  double* const row_of = to + std::int64_t{blockIdx.x} * kLanes;
  const Share share{runs + std::int64_t{row} * kSwaps, split, splits, batch.ends};
  share.count();
  __syncthreads();
  const std::int64_t total = batch.ends[kSwaps - 1];
  Float64Sums sums;
  for (std::int64_t begin = 0; begin < total; begin += kBatch) {
    const auto count = static_cast<int>(total - begin < kBatch ? total - begin : kBatch);
    if (thread < count) {
      batch.stretches[thread] = stretch_of(pieces + share.piece(begin + thread), bases);
    }
    __syncthreads();
    if constexpr (kTwoFloats) {
      const std::uint64_t first = group_of(batch.stretches[0]);
      std::uint64_t group = first;
      do {
        if (group == kFloat64Group) {
          add_and_write<Float64Sums>(batch.stretches, count, group, row_of, adds);
        } else {
          add_and_write<TwoFloatSums>(batch.stretches, count, group, row_of, adds);
        }
        adds = true;
        group = next_group(batch.stretches, count, group);
      } while (group != first);
    } else {
      add_group(sums, batch.stretches, count, kFloat64Group);
    }
    __syncthreads();
  }
  // Two floats are written already, but for a block without pieces.
  if (!kTwoFloats || total == 0) write_sums(sums, 1.0, row_of, adds);
}

// table += partials[0] + partials[1] + ..., two buckets a thread.
__global__ void __launch_bounds__(kThreads, kBlocks)
    add_partials_kernel(const double* partials, std::int64_t buckets, std::int64_t splits,
                        double* table) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto* from = reinterpret_cast<const Two*>(partials) + i;
  Two sum = from[0];
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  for (std::int64_t s = 1; s < splits; ++s) {
    const Two part = from[s * (buckets / 2)];
    sum = {{sum.element[0] + part.element[0], sum.element[1] + part.element[1]}};
  }
  Two* to = reinterpret_cast<Two*>(table) + i;
  const Two old = *to;
  *to = {{old.element[0] + sum.element[0], old.element[1] + sum.element[1]}};
}

// ---- accumulate_exact -------------------------------------------------------------------------

// Four elements and their buckets: 16 bytes of float32, twice 16 bytes of the table.
constexpr int kFour = 4;
constexpr int kFoursInFlight = 4;
constexpr int kElementsInFlight = 8;

template <class T>
struct alignas(sizeof(T) * kFour < 16 ? sizeof(T) * kFour : 16) Four {
  T element[kFour];
};

template <class T, int kCount>
__device__ void add_fours(const T* x, double* buckets, double weight) {
  Four<T> xs[kCount];
  Two sums[kCount][2];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    xs[u] = *reinterpret_cast<const Four<T>*>(x + u * kThreads * kFour);
    const auto* from = reinterpret_cast<const Two*>(buckets + u * kThreads * kFour);
    sums[u][0] = from[0];
    sums[u][1] = from[1];
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    AUTODROP_UNROLL
    for (int i = 0; i < kFour; ++i) {
      double& sum = sums[u][i / 2].element[i % 2];
      sum = sums::added(sum, lanes::widened(xs[u].element[i]), weight);
    }
    auto* to = reinterpret_cast<Two*>(buckets + u * kThreads * kFour);
    to[0] = sums[u][0];
    to[1] = sums[u][1];
  }
}

template <class T, int kCount>
__device__ void add_singles(const T* x, double* buckets, double weight) {
  T xs[kCount];
  double sums[kCount];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    xs[u] = x[u * kThreads];
    sums[u] = buckets[u * kThreads];
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    buckets[u * kThreads] = sums::added(sums[u], lanes::widened(xs[u]), weight);
  }
}

template <class T>
__device__ void add_span(std::uint64_t address, double* buckets, double weight, int length) {
  const T* x = lanes::global<const T>(address);
  const int thread = static_cast<int>(threadIdx.x);
  int done = 0;  // elements that are covered by fours
  if (address % alignof(Four<T>) == 0 && reinterpret_cast<std::uintptr_t>(buckets) % 16 == 0) {
    done = length / kFour * kFour;
    int i = thread * kFour;
    for (; i + (kFoursInFlight - 1) * kThreads * kFour < done;
         i += kFoursInFlight * kThreads * kFour) {
      add_fours<T, kFoursInFlight>(x + i, buckets + i, weight);
    }
    for (; i < done; i += kThreads * kFour) add_fours<T, 1>(x + i, buckets + i, weight);
  }
  int i = done + thread;
  for (; i + (kElementsInFlight - 1) * kThreads < length; i += kElementsInFlight * kThreads) {
    add_singles<T, kElementsInFlight>(x + i, buckets + i, weight);
  }
  for (; i < length; i += kThreads) add_singles<T, 1>(x + i, buckets + i, weight);
}

// One block a span.
__global__ void __launch_bounds__(kThreads, kBlocks)
    accumulate_exact_kernel(const Span* spans, const std::int64_t* bases, double* table) {
  const auto span = load_row(spans + blockIdx.x);
  const auto address = static_cast<std::uint64_t>(bases[span.tensor] + span.offset);
  double* buckets = table + span.bucket;
  switch (span.dtype) {
    case DType::kFloat32:
      add_span<float>(address, buckets, span.weight, span.length);
      break;
    case DType::kFloat64:
      add_span<double>(address, buckets, span.weight, span.length);
      break;
    case DType::kFloat16:
      add_span<Half>(address, buckets, span.weight, span.length);
      break;
    case DType::kBFloat16:
      add_span<BFloat16>(address, buckets, span.weight, span.length);
      break;
  }
}

// ---- close ------------------------------------------------------------------------------------

constexpr int kTwosInFlight = 2;

struct Products {
  double dot = 0.0, norm = 0.0;
};

// Closes one bucket.
__device__ void close_bucket(double& running, double& mean, double& displacement, double divisor,
                             Products& sums) {
  const double m = running / divisor;
  const double s = m - mean;
  sums.dot = __fma_rn(s, displacement, sums.dot);
  sums.norm = __fma_rn(s, s, sums.norm);
  displacement = s;
  mean = m;
  running = 0.0;
}

template <int kCount>
__device__ void close_twos(const Close& work, std::int64_t first, Products& sums) {
  Two* const arrays[] = {reinterpret_cast<Two*>(work.running + first),
                         reinterpret_cast<Two*>(work.mean + first),
                         reinterpret_cast<Two*>(work.displacement + first)};
  Two twos[kCount][3];
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    AUTODROP_UNROLL
    for (int a = 0; a < 3; ++a) twos[u][a] = arrays[a][u * kThreads];
  }
  AUTODROP_UNROLL
  for (int u = 0; u < kCount; ++u) {
    AUTODROP_UNROLL
    for (int i = 0; i < 2; ++i) {
      close_bucket(twos[u][0].element[i], twos[u][1].element[i], twos[u][2].element[i],
                   work.divisor, sums);
    }
    AUTODROP_UNROLL
    for (int a = 0; a < 3; ++a) arrays[a][u * kThreads] = twos[u][a];
  }
}

// Sum over the block, valid in thread 0: lanes in a fixed tree, warp after warp.
__device__ Products block_sum(Products sums) {
  __shared__ double of_warp[kThreads / kWarp][2];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double dot = __shfl_down_sync(kAllLanes, sums.dot, offset);
    const double norm = __shfl_down_sync(kAllLanes, sums.norm, offset);
    sums.dot += dot;
    sums.norm += norm;
  }
  if (threadIdx.x % kWarp == 0) {
    of_warp[threadIdx.x / kWarp][0] = sums.dot;
    of_warp[threadIdx.x / kWarp][1] = sums.norm;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) {
      sums.dot += of_warp[w][0];
      sums.norm += of_warp[w][1];
    }
  }
  return sums;
}

__global__ void __launch_bounds__(kThreads, kBlocks) close_kernel(Close work) {
  const auto range = reinterpret_cast<const Range*>(work.blocks)[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  Products sums;
  std::int64_t done = range.begin;  // where no pair covers a bucket any more
  if (range.begin % 2 == 0) {
    done += (range.end - range.begin) / 2 * 2;
    std::int64_t i = range.begin + 2 * thread;
    for (; i + 2 * kThreads * (kTwosInFlight - 1) < done; i += 2 * kThreads * kTwosInFlight) {
      close_twos<kTwosInFlight>(work, i, sums);
    }
    for (; i < done; i += 2 * kThreads) close_twos<1>(work, i, sums);
  }
  for (std::int64_t i = done + thread; i < range.end; i += kThreads) {
    double running = work.running[i], mean = work.mean[i], displacement = work.displacement[i];
    close_bucket(running, mean, displacement, work.divisor, sums);
    work.running[i] = running;
    work.mean[i] = mean;
    work.displacement[i] = displacement;
  }
  sums = block_sum(sums);
  if (thread == 0) {
    reinterpret_cast<Two*>(work.block_sums)[blockIdx.x] = {{sums.dot, sums.norm}};
  }
}

// ---- launches ---------------------------------------------------------------------------------

__global__ void nothing_kernel() {}

template <class... P>
cudaError_t launch(void (*kernel)(P...), std::int64_t blocks, cudaStream_t stream,
                   std::common_type_t<P>... arguments) {
  // A grid has so many blocks at most.
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* pointers[] = {&arguments..., nullptr};
  return settled(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                  pointers, 0, stream));
}

// Calls visit(kernel) for every kernel.
template <class Visit>
cudaError_t for_kernels(const Visit& visit) {
  cudaError_t error = cudaSuccess;
  const auto next = [&](auto* kernel) {
    if (error == cudaSuccess) error = visit(kernel);
  };
  next(accumulate_kernel);
  next(add_partials_kernel);
  next(accumulate_exact_kernel);
  next(close_kernel);
  return error;
}

}  // namespace

cudaError_t accumulate(int device, const Accumulate& work, cudaStream_t stream) {
  if (work.num_rows == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const bool adds = work.splits == 1;
  if (cudaError_t error =
          launch(accumulate_kernel, work.num_rows * work.splits, stream, work.pieces, work.runs,
                 static_cast<unsigned>(work.num_rows), static_cast<unsigned>(work.splits),
                 work.bases, adds ? work.table : work.partials, adds);
      adds || error != cudaSuccess) {
    return error;
  }
  const std::int64_t buckets = work.num_rows * kLanes;
  return launch(add_partials_kernel, buckets / (2 * kThreads), stream, work.partials, buckets,
                work.splits, work.table);
}

cudaError_t accumulate_exact(int device, const Span* spans, std::int64_t num_spans,
                             const std::int64_t* bases, double* table, cudaStream_t stream) {
  if (num_spans == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return launch(accumulate_exact_kernel, num_spans, stream, spans, bases, table);
}

cudaError_t close(int device, const Close& work, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaError_t error = settled(cudaStreamIsCapturing(stream, &status)); error != cudaSuccess) {
    return error;
  }
  if (status != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  if (work.num_blocks == 0) return cudaSuccess;
  return launch(close_kernel, work.num_blocks, stream, work);
}

cudaError_t probe(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  // By default CUDA loads a kernel at its first launch, which is an error inside a capture.
  const cudaError_t error = for_kernels([](auto* kernel) {
    cudaFuncAttributes attributes;
    return settled(cudaFuncGetAttributes(&attributes, kernel));
  });
  if (error != cudaSuccess) return error;
  if (cudaError_t launched = launch(nothing_kernel, 1, nullptr); launched != cudaSuccess) {
    return launched;
  }
  return settled(cudaStreamSynchronize(nullptr));
}

}  // namespace autodrop::cuda
