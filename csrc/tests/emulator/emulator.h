// An emulator of CUDA's execution model, for host compilers: csrc/cuda/table.cu is compiled as it
// is, and its blocks run on the CPU. Every thread of a block is a fiber. Beyond the results, it
// finds what a test of one thread after the other cannot:
//
//   * Lanes of a warp meet at a shuffle. All lanes that the mask names must arrive at the same
//     shuffle with the same mask; a lane that has exited, or waits elsewhere, ends the program.
//   * All threads of a block must meet at the same barrier.
//   * Blocks, and threads between two meetings, run in an order drawn from a seed, and shared
//     memory is filled with NaN before every block: a missing barrier shows as a wrong result.
//   * A launch copies its arguments and waits in its stream until that is synchronised. A result
//     that is read too early is not there yet.
//   * A stream belongs to a device, which must be current at a launch. A kernel that is first
//     launched inside a capture was never loaded, which is an error.
//   * The last error of a host thread stays until cudaGetLastError takes it, and any call can be
//     made to fail once.
//
// It has no model of memory order within a warp between meetings, of caches, or of time.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulator {

constexpr int kDevices = 2;
constexpr int kWarp = 32;

struct Index {
  unsigned x, y, z;
};
extern Index thread_index, block_index;  // of the running fiber

// ---- what kernels call ------------------------------------------------------------------------

void barrier(int site);
std::uint64_t shuffle_down(unsigned mask, std::uint64_t value, unsigned offset, int site);

// ---- what launches call -----------------------------------------------------------------------

cudaError_t launch(const void* kernel, unsigned blocks, unsigned threads, cudaStream_t stream,
                   std::function<void()> thread);
cudaError_t load(const void* kernel);

// ---- what tests call --------------------------------------------------------------------------

struct Counts {
  long launches, blocks, barriers, shuffles;
};
Counts counts();

void seed(unsigned value);
// Runs all work at once instead of at a synchronisation, where the parameters are changed by the
// host and not by work of the same stream.
void set_eager(bool eager);
cudaStream_t new_stream(int device);
// Pieces of work that wait in all streams of all devices.
std::size_t waiting();
// The next call of this name fails with this error.
void fail_once(const std::string& name, cudaError_t error);
// Devices that anything was asked of: each would have a context.
std::vector<int> touched_devices();
// As if the process had just begun: no kernel loaded, no device touched, device 0 current.
void reset();
// Called at every call of the runtime, with its name.
void on_call(std::function<void(const char*)> hook);

void begin_capture(cudaStream_t stream);
// What was captured, to be run by replay; an error if the capture was harmed.
cudaError_t end_capture(cudaStream_t stream, std::vector<std::function<void()>>* graph);
void replay(const std::vector<std::function<void()>>& graph);

}  // namespace emulator
