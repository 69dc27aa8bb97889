// The table of a window on the CPU: splits its rows, spans or blocks over threads. No result
// depends on the number of threads.
#pragma once

#include "core/tables.h"
#include "cpu/loops.h"

namespace autodrop::cpu {

// Bytes that must be read and written for each thread before another one is used. On cores that
// other processes use, such as those of a data loader, the threads of a team wait for each other
// until the system lets all of them run, 8 ms where it was measured, and so 4 MB on two threads
// took 200 times as long as on one. What a second thread gains on two quiet cores is 20 us at 8 MB
// where everything is in the caches, and 7 us where it is not: memory is as fast for one thread as
// for two. With 1 MiB here, 2 MB would be divided for a gain of 3 us.
constexpr std::int64_t kBytesForThread = std::int64_t{4} << 20;

// table [num_rows, kLanes] += the sketch of all pieces; runs is [num_rows * 8 + 1].
void accumulate(const Piece* pieces, const std::int64_t* runs, std::int64_t num_rows,
                const std::int64_t* bases, double* table, int num_threads, const Loops* loops);

// table [buckets] += all spans.
void accumulate_exact(const Span* spans, std::int64_t num_spans, const std::int64_t* bases,
                      double* table, int num_threads, const Loops* loops);

// Closes a window. In every bucket, m = running / divisor and s = m - mean; then displacement = s,
// mean = m and running = 0. sums [num_parts, 2] receives, for the buckets bounds[p] to bounds[p +
// 1] of every part, the sums of s * (displacement as it was) and of s * s.
void close(double* running, double* mean, double* displacement, double divisor,
           const std::int64_t* bounds, std::int64_t num_parts, double* sums, int num_threads,
           const Loops* loops);

}  // namespace autodrop::cpu
