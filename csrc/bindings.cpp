// autodrop_ext._C: addresses and sizes in, scalars out. Checks live in autodrop_ext/ops, the
// arithmetic in cpu/; here is neither.
#include <pybind11/pybind11.h>

#include "core/tables.h"
#include "cpu/table.h"

namespace py = pybind11;

#if AUTODROP_WITH_CUDA
namespace autodrop {
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
}
#endif

namespace {

using Address = std::uintptr_t;  // of a contiguous buffer, 0 for nullptr

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

const autodrop::cpu::Loops* loops(const std::string& isa) {
  const auto* found =
      isa.empty() ? autodrop::cpu::best_loops() : autodrop::cpu::loops_named(isa.c_str());
  if (found == nullptr) {
    throw py::value_error("isa: this processor does not run '" + isa + "'");
  }
  return found;
}

// The loops multiply by weights at no cost, so that `weighted` is for GPUs.
void accumulate(Address pieces, Address runs, std::int64_t num_rows, Address bases, Address table,
                bool /*weighted*/, int num_threads, const std::string& isa) {
  const auto* chosen = loops(isa);
  py::gil_scoped_release release;
  autodrop::cpu::accumulate(
      pointer<const autodrop::Piece>(pieces), pointer<const std::int64_t>(runs), num_rows,
      pointer<const std::int64_t>(bases), pointer<double>(table), num_threads, chosen);
}

void accumulate_exact(Address spans, std::int64_t num_spans, Address bases, Address table,
                      int num_threads, const std::string& isa) {
  const auto* chosen = loops(isa);
  py::gil_scoped_release release;
  autodrop::cpu::accumulate_exact(pointer<const autodrop::Span>(spans), num_spans,
                                  pointer<const std::int64_t>(bases), pointer<double>(table),
                                  num_threads, chosen);
}

void close_window(Address running, Address mean, Address displacement, double divisor,
                  Address bounds, std::int64_t num_parts, Address sums, int num_threads,
                  const std::string& isa) {
  const auto* chosen = loops(isa);
  py::gil_scoped_release release;
  autodrop::cpu::close(pointer<double>(running), pointer<double>(mean),
                       pointer<double>(displacement), divisor, pointer<const std::int64_t>(bounds),
                       num_parts, pointer<double>(sums), num_threads, chosen);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of autodrop_ext; use it through autodrop_ext.ops.";
  m.attr("version") = AUTODROP_VERSION;
  m.attr("cuda_built") = bool{AUTODROP_WITH_CUDA};
  m.attr("cuda_reason") = AUTODROP_CUDA_REASON;  // why not; empty where it was built
  m.attr("cuda_architectures") = AUTODROP_CUDA_ARCHITECTURES;
#if AUTODROP_WITH_CUDA
  autodrop::bind_cuda(m);
#endif
  m.attr("cpu_isa") = autodrop::cpu::best_loops()->isa;

  m.def("accumulate", &accumulate, py::arg("pieces"), py::arg("runs"), py::arg("num_rows"),
        py::arg("bases"), py::arg("table"), py::arg("weighted"), py::arg("num_threads"),
        py::arg("isa") = "");
  m.def("accumulate_exact", &accumulate_exact, py::arg("spans"), py::arg("num_spans"),
        py::arg("bases"), py::arg("table"), py::arg("num_threads"), py::arg("isa") = "");
  m.def("close", &close_window, py::arg("running"), py::arg("mean"), py::arg("displacement"),
        py::arg("divisor"), py::arg("bounds"), py::arg("num_parts"), py::arg("sums_out"),
        py::arg("num_threads"), py::arg("isa") = "");
}
