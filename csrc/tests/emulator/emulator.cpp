#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

// Where device_language.h puts shared memory; the linker names both ends.
extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

using Work = std::function<void()>;

struct EmulatedStream {
  int device;
  std::vector<Work> queue;
  bool capturing = false;
  bool harmed = false;
};

namespace emulator {

Index thread_index, block_index;

namespace {

constexpr std::size_t kStack = 64 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxBlocks = 0x7fffffffu;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  int site = 0;
  unsigned mask = 0, offset = 0;
  std::uint64_t value = 0;  // that this lane shows, then what it got
  void* fake_stack = nullptr;
};

// One block runs at a time, on the host thread that holds the lock.
std::recursive_mutex lock;
std::mt19937 order(1);
Counts totals{};
bool eager = false;
std::vector<Fiber> fibers;
Fiber* running = nullptr;
ucontext_t host;
#if EMULATOR_ASAN
void* host_fake_stack = nullptr;
const void* host_stack = nullptr;
std::size_t host_stack_size = 0;
#endif
const Work* thread_body = nullptr;

std::vector<std::unique_ptr<EmulatedStream>> streams;
std::map<int, EmulatedStream> default_streams;
std::set<std::pair<int, const void*>> loaded;
std::set<int> touched;
std::map<std::string, cudaError_t> failures;
std::function<void(const char*)> hook;

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current = 0;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "emulator: block %u: %s\n", block_index.x, what);
  std::abort();
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Whether a call is to fail this time.
bool fails(const char* name, cudaError_t* error) {
  if (hook) hook(name);
  const auto found = failures.find(name);
  if (found == failures.end()) return false;
  *error = result(found->second);
  failures.erase(found);
  return true;
}

// ---- fibers -----------------------------------------------------------------------------------

void to_host(bool for_good) {
  Fiber* const self = running;
  const Index mine = thread_index;
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, host_stack,
                                 host_stack_size);
#else
  (void)for_good;
#endif
  swapcontext(&self->context, &host);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &host_stack, &host_stack_size);
#endif
  thread_index = mine;
}

void begin_thread() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  (*thread_body)();
  running->state = State::kDone;
  to_host(true);
}

void run_until_it_waits(unsigned i) {
  running = &fibers[i];
  thread_index = {i, 0, 0};
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&host_fake_stack, running->stack.get(), kStack);
#endif
  swapcontext(&host, &running->context);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
}

// Lets the lanes of one warp pass whose shuffle is complete.
bool pass_shuffles(unsigned first, unsigned lanes) {
  bool any = false;
  for (unsigned l = 0; l < lanes; ++l) {
    Fiber& fiber = fibers[first + l];
    if (fiber.state != State::kAtShuffle) continue;
    if (!(fiber.mask >> l & 1)) stop("the mask of a shuffle does not name its own lane");
    bool complete = true;
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(fiber.mask >> k & 1)) continue;
      if (k >= lanes || fibers[first + k].state == State::kDone) {
        stop("the mask of a shuffle names a lane that has exited");
      }
      const Fiber& other = fibers[first + k];
      if (other.state != State::kAtShuffle) {
        complete = false;
      } else if (other.site != fiber.site || other.mask != fiber.mask) {
        stop("lanes of one mask wait at different shuffles");
      }
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    std::uint64_t got[kWarp];
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(mask >> k & 1)) continue;
      const unsigned from = k + fibers[first + k].offset;
      if (from < kWarp && !(mask >> from & 1)) stop("a shuffle reads a lane outside its mask");
      got[k] = fibers[first + (from < kWarp ? from : k)].value;
    }
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(mask >> k & 1)) continue;
      fibers[first + k].value = got[k];
      fibers[first + k].state = State::kReady;
    }
    ++totals.shuffles;
    any = true;
  }
  return any;
}

bool pass_barrier(unsigned threads) {
  unsigned arrived = 0, done = 0;
  int site = 0;
  for (unsigned i = 0; i < threads; ++i) {
    done += fibers[i].state == State::kDone;
    if (fibers[i].state != State::kAtBarrier) continue;
    if (arrived > 0 && fibers[i].site != site) stop("threads wait at different barriers");
    site = fibers[i].site;
    ++arrived;
  }
  if (arrived == 0 || arrived + done < threads) return false;
  if (done > 0) stop("threads have exited before a barrier at which others wait");
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  ++totals.barriers;
  return true;
}

void run_block(unsigned block, unsigned threads) {
  block_index = {block, 0, 0};
  ++totals.blocks;
  if (__start_emulated_shared != nullptr) {
    std::memset(__start_emulated_shared, 0xff,
                static_cast<std::size_t>(__stop_emulated_shared - __start_emulated_shared));
  }
  if (fibers.size() < threads) fibers.resize(threads);
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    turn[i] = i;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kReady;
    makecontext(&fiber.context, begin_thread, 0);
  }
  for (;;) {
    std::shuffle(turn.begin(), turn.end(), order);
    bool moved = false;
    for (const unsigned i : turn) {
      if (fibers[i].state != State::kReady) continue;
      run_until_it_waits(i);
      moved = true;
    }
    for (unsigned w = 0; w < threads; w += kWarp) {
      moved = pass_shuffles(w, std::min<unsigned>(kWarp, threads - w)) || moved;
    }
    moved = pass_barrier(threads) || moved;
    const bool finished = std::all_of(fibers.begin(), fibers.begin() + threads,
                                      [](const Fiber& f) { return f.state == State::kDone; });
    if (finished) return;
    if (!moved) stop("threads wait for each other for ever");
  }
}

// ---- streams ----------------------------------------------------------------------------------

EmulatedStream& stream_of(cudaStream_t stream) {
  if (stream != nullptr) return *stream;
  EmulatedStream& found = default_streams[current];
  found.device = current;
  return found;
}

void run_all(EmulatedStream& stream) {
  std::vector<Work> queue;
  queue.swap(stream.queue);
  for (const Work& work : queue) work();
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
  EmulatedStream& stream = stream_of(handle);
  if (stream.device != current) return result(cudaErrorInvalidResourceHandle);
  touched.insert(current);
  stream.queue.push_back(std::move(work));
  if (eager && !stream.capturing) run_all(stream);
  return cudaSuccess;
}

}  // namespace

void barrier(int site) {
  running->site = site;
  running->state = State::kAtBarrier;
  to_host(false);
}

std::uint64_t shuffle_down(unsigned mask, std::uint64_t value, unsigned offset, int site) {
  Fiber* const self = running;
  self->site = site;
  self->mask = mask;
  self->offset = offset;
  self->value = value;
  self->state = State::kAtShuffle;
  to_host(false);
  return self->value;
}

cudaError_t load(const void* kernel) {
  const std::lock_guard<std::recursive_mutex> guard(lock);
  cudaError_t error;
  if (fails("cudaFuncGetAttributes", &error)) return error;
  touched.insert(current);
  loaded.insert({current, kernel});
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, unsigned blocks, unsigned threads, cudaStream_t stream,
                   std::function<void()> thread) {
  const std::lock_guard<std::recursive_mutex> guard(lock);
  cudaError_t error;
  if (fails("cudaLaunchKernel", &error)) return error;
  if (blocks == 0 || blocks > kMaxBlocks || threads == 0 || threads > kMaxThreads) {
    return result(cudaErrorInvalidConfiguration);
  }
  EmulatedStream& queue = stream_of(stream);
  if (queue.capturing && loaded.count({current, kernel}) == 0) {
    queue.harmed = true;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  loaded.insert({current, kernel});
  return enqueue(stream, [blocks, threads, thread = std::move(thread)] {
    ++totals.launches;
    thread_body = &thread;
    std::vector<unsigned> turn(blocks);
    for (unsigned b = 0; b < blocks; ++b) turn[b] = b;
    std::shuffle(turn.begin(), turn.end(), order);
    for (const unsigned b : turn) run_block(b, threads);
  });
}

Counts counts() { return totals; }
void seed(unsigned value) { order.seed(value); }
void set_eager(bool value) { eager = value; }
cudaStream_t new_stream(int device) {
  streams.push_back(std::make_unique<EmulatedStream>());
  streams.back()->device = device;
  return streams.back().get();
}
std::size_t waiting() {
  std::size_t count = 0;
  for (const auto& stream : streams) count += stream->queue.size();
  for (const auto& [device, stream] : default_streams) count += stream.queue.size();
  return count;
}
void fail_once(const std::string& name, cudaError_t error) { failures[name] = error; }
std::vector<int> touched_devices() { return {touched.begin(), touched.end()}; }
void reset() {
  loaded.clear();
  touched.clear();
  failures.clear();
  current = 0;
  last_error = cudaSuccess;
}
void on_call(std::function<void(const char*)> value) { hook = std::move(value); }

void begin_capture(cudaStream_t stream) {
  stream->capturing = true;
  stream->harmed = false;
}
cudaError_t end_capture(cudaStream_t stream, std::vector<Work>* graph) {
  graph->swap(stream->queue);
  stream->queue.clear();
  stream->capturing = false;
  return stream->harmed ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
void replay(const std::vector<Work>& graph) {
  for (const Work& work : graph) work();
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetDevice(int* device) {
  cudaError_t error;
  if (fails("cudaGetDevice", &error)) return error;
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  cudaError_t error;
  if (fails("cudaSetDevice", &error)) return error;
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  const std::lock_guard<std::recursive_mutex> guard(lock);
  current = device;
  touched.insert(device);  // since CUDA 12
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const std::lock_guard<std::recursive_mutex> guard(lock);
  cudaError_t error;
  if (fails("cudaStreamSynchronize", &error)) return error;
  EmulatedStream& stream = stream_of(handle);
  if (stream.capturing) {
    stream.harmed = true;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  run_all(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard<std::recursive_mutex> guard(lock);
  cudaError_t error;
  if (fails("cudaStreamIsCapturing", &error)) return error;
  *status =
      stream_of(stream).capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
  }
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
