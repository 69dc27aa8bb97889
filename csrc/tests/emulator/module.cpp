// csrc/bindings_cuda.cpp over the emulator, as a Python module: tests run the package's own cuda
// backend with it, on tensors of the CPU.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

namespace py = pybind11;

namespace autodrop {
void bind_cuda(py::module_& m);
}

namespace {

std::vector<std::function<void()>> graph;
long calls_with_lock = 0, calls = 0;

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  autodrop::bind_cuda(m);
  m.attr("cuda_built") = true;
  m.attr("cuda_reason") = "";
  m.attr("cuda_architectures") = "emulated";
  emulator::set_eager(true);
  emulator::on_call([](const char*) {
    ++calls;
    calls_with_lock += PyGILState_Check();
  });
  m.def("seed", &emulator::seed);
  m.def("launches", [] { return emulator::counts().launches; });
  m.def("calls", [] { return py::make_tuple(calls, calls_with_lock); });
  m.def("new_stream", [] { return reinterpret_cast<std::uintptr_t>(emulator::new_stream(0)); });
  m.def("fail_once",
        [](const std::string& call) { emulator::fail_once(call, cudaErrorLaunchFailure); });
  m.def("begin_capture", [](std::uintptr_t stream) {
    emulator::begin_capture(reinterpret_cast<cudaStream_t>(stream));
  });
  m.def("end_capture", [](std::uintptr_t stream) {
    return emulator::end_capture(reinterpret_cast<cudaStream_t>(stream), &graph) == cudaSuccess;
  });
  m.def("replay", [] { emulator::replay(graph); });
}
