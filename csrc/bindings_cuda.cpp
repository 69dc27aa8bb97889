// The CUDA half of autodrop_ext._C: addresses in device memory, a stream handle, scalars out. A
// CUDA error becomes a RuntimeError with CUDA's own name for it; autodrop_ext/ops/cuda.py
// explains. Python's lock is released around every call: a launch waits where a queue is full.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace autodrop {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address handle) { return reinterpret_cast<cudaStream_t>(handle); }

void check(cudaError_t error, const char* operation) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ")");
  }
}

struct CudaPlan {
  cuda::Plan plan;
  cuda::CloseBuffers buffers;
};

CudaPlan make_plan(int device, Address chunks, Address tiles, std::int64_t num_tiles,
                   Address row_chunks, Address row_weights, std::int64_t num_rows, Address partials,
                   Address per_row, Address total, Address host_total) {
  return {{device, pointer<const Chunk>(chunks), pointer<const Tile>(tiles), num_tiles,
           pointer<const std::int64_t>(row_chunks), pointer<const double>(row_weights), num_rows},
          {pointer<Sums>(partials), pointer<Sums>(per_row), pointer<Sums>(total),
           pointer<Sums>(host_total)}};
}

void accumulate(const CudaPlan& self, Address running, Address mean, bool first, float weight,
                Address stream) {
  py::gil_scoped_release release;
  check(cuda::accumulate(self.plan, pointer<float>(running), pointer<const float>(mean), first,
                         weight, stream_of(stream)),
        "accumulate");
}

void close_sum(const CudaPlan& self, Address running, Address previous, Address before,
               double window, Address stream) {
  py::gil_scoped_release release;
  check(cuda::close_sum(self.plan, pointer<const float>(running), pointer<const float>(previous),
                        pointer<const float>(before), window, self.buffers, stream_of(stream)),
        "close");
}

void close_delta(const CudaPlan& self, Address running, Address previous, Address mean,
                 double window, Address stream) {
  py::gil_scoped_release release;
  check(cuda::close_delta(self.plan, pointer<float>(running), pointer<float>(previous),
                          pointer<float>(mean), window, self.buffers, stream_of(stream)),
        "close");
}

void write_back(const CudaPlan& self, Address arena, Address mean, double scale, Address stream) {
  py::gil_scoped_release release;
  check(cuda::write_back(self.plan, pointer<const float>(arena), pointer<const float>(mean), scale,
                         stream_of(stream)),
        "write_back");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_probe", [](int device) {
    py::gil_scoped_release release;
    check(cuda::probe(device), "probe");
  });
  py::class_<CudaPlan>(m, "CudaPlan", py::module_local())
      .def(py::init(&make_plan))
      .def("accumulate", &accumulate)
      .def("close_sum", &close_sum)
      .def("close_delta", &close_delta)
      .def("write_back", &write_back);
}

}  // namespace autodrop
