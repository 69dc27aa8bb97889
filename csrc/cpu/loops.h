// The loops over pieces, spans and buckets, compiled once per instruction set (see CMakeLists.txt)
// and chosen at run time. They run on the calling thread.
#pragma once

#include "core/tables.h"

namespace autodrop::cpu {

struct Loops {
  const char* isa;
  // row [kLanes] += the pieces of one row. Memory is fetched ahead for the pieces that follow in
  // the plan, up to `last`.
  void (*add_row)(const Piece* begin, const Piece* end, const Piece* last,
                  const std::int64_t* bases, double* row);
  // table [buckets] += spans.
  void (*add_spans)(const Span* begin, const Span* end, const std::int64_t* bases, double* table);
  // One block of a close, see cpu/table.h: all pointers are to `n` buckets, `sums` is [2].
  void (*close_block)(std::int64_t n, double* running, double* mean, double* displacement,
                      double divisor, double* sums);
};

// The widest instruction set that this processor runs.
const Loops* best_loops();
// The one of that name, or nullptr if this processor does not run it.
const Loops* loops_named(const char* name);

}  // namespace autodrop::cpu
