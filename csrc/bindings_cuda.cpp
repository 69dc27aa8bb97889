// The CUDA half of autodrop_ext._C: addresses in device memory, a stream handle, scalars out. A
// CUDA error becomes a RuntimeError with CUDA's own name for it; autodrop_ext/ops/cuda.py
// explains. Python's lock is released around every call: a launch waits where a queue is full.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/table.h"

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

// `weighted` is for other backends: here a multiplication by weights takes no time.
void cuda_accumulate(int device, Address pieces, Address runs, std::int64_t num_rows,
                     std::int64_t splits, Address bases, Address partials, Address table,
                     bool /*weighted*/, Address stream) {
  py::gil_scoped_release release;
  check(cuda::accumulate(
            device,
            {pointer<const Piece>(pieces), pointer<const std::int64_t>(runs), num_rows, splits,
             pointer<const std::int64_t>(bases), pointer<double>(partials), pointer<double>(table)},
            stream_of(stream)),
        "accumulate");
}

void cuda_accumulate_exact(int device, Address spans, std::int64_t num_spans, Address bases,
                           Address table, Address stream) {
  py::gil_scoped_release release;
  check(cuda::accumulate_exact(device, pointer<const Span>(spans), num_spans,
                               pointer<const std::int64_t>(bases), pointer<double>(table),
                               stream_of(stream)),
        "accumulate");
}

void cuda_close(int device, Address running, Address mean, Address displacement, double divisor,
                Address blocks, std::int64_t num_blocks, Address block_sums, Address stream) {
  py::gil_scoped_release release;
  check(cuda::close(
            device,
            {pointer<double>(running), pointer<double>(mean), pointer<double>(displacement),
             divisor, pointer<const std::int64_t>(blocks), num_blocks, pointer<double>(block_sums)},
            stream_of(stream)),
        "close");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_probe", [](int device) {
    py::gil_scoped_release release;
    check(cuda::probe(device), "probe");
  });
  m.def("cuda_accumulate", &cuda_accumulate, py::arg("device"), py::arg("pieces"), py::arg("runs"),
        py::arg("num_rows"), py::arg("splits"), py::arg("bases"), py::arg("partials"),
        py::arg("table"), py::arg("weighted"), py::arg("stream"));
  m.def("cuda_accumulate_exact", &cuda_accumulate_exact, py::arg("device"), py::arg("spans"),
        py::arg("num_spans"), py::arg("bases"), py::arg("table"), py::arg("stream"));
  m.def("cuda_close", &cuda_close, py::arg("device"), py::arg("running"), py::arg("mean"),
        py::arg("displacement"), py::arg("divisor"), py::arg("blocks"), py::arg("num_blocks"),
        py::arg("block_sums"), py::arg("stream"));
}

}  // namespace autodrop
