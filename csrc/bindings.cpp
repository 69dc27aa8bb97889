// autodrop_ext._C: addresses and sizes in, scalars out. Checks live in autodrop_ext/ops, the
// arithmetic in cpu/; here is neither.
#include <pybind11/pybind11.h>

#include "core/tables.h"
#include "cpu/parallel.h"
#include "cpu/table.h"

namespace py = pybind11;

namespace autodrop {
void bind_watch(py::module_& m);  // bindings_watch.cpp
#if AUTODROP_WITH_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif
}  // namespace autodrop

namespace {

using Address = std::uintptr_t;  // of a contiguous buffer, 0 for nullptr

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A plan's tables as the caller keeps them alive, and the kernels that run them.
struct CpuPlan {
  autodrop::cpu::Plan plan;
  const autodrop::cpu::Kernels* kernels;
};

CpuPlan make_plan(Address chunks, std::int64_t num_chunks, Address tensor_chunks, Address weights,
                  std::int64_t num_tensors, const std::string& isa) {
  const auto* kernels =
      isa.empty() ? autodrop::cpu::best_kernels() : autodrop::cpu::kernels_named(isa.c_str());
  if (kernels == nullptr) {
    throw py::value_error("isa: this processor does not run '" + isa + "'");
  }
  return {{pointer<const autodrop::Chunk>(chunks), num_chunks,
           pointer<const std::int64_t>(tensor_chunks), pointer<const double>(weights), num_tensors},
          kernels};
}

py::tuple as_tuple(const autodrop::Sums& sums) {
  return py::make_tuple(sums.dot, sums.norm, sums.previous_norm, sums.mean_norm);
}

void accumulate(const CpuPlan& self, Address running, Address mean, bool first, float weight,
                int num_threads) {
  py::gil_scoped_release release;
  autodrop::cpu::accumulate(self.plan, pointer<float>(running), pointer<const float>(mean), first,
                            weight, num_threads, self.kernels);
}

py::tuple close_sum(const CpuPlan& self, Address running, Address previous, Address before,
                    double window, Address partials, Address per_tensor, int num_threads) {
  autodrop::Sums total;
  {
    py::gil_scoped_release release;
    total = autodrop::cpu::close_sum(
        self.plan, pointer<const float>(running), pointer<const float>(previous),
        pointer<const float>(before), window, pointer<autodrop::Sums>(partials),
        pointer<autodrop::Sums>(per_tensor), num_threads, self.kernels);
  }
  return as_tuple(total);
}

py::tuple close_delta(const CpuPlan& self, Address running, Address previous, Address mean,
                      double window, Address partials, Address per_tensor, int num_threads) {
  autodrop::Sums total;
  {
    py::gil_scoped_release release;
    total =
        autodrop::cpu::close_delta(self.plan, pointer<float>(running), pointer<float>(previous),
                                   pointer<float>(mean), window, pointer<autodrop::Sums>(partials),
                                   pointer<autodrop::Sums>(per_tensor), num_threads, self.kernels);
  }
  return as_tuple(total);
}

void write_back(const CpuPlan& self, Address arena, Address mean, double scale, int num_threads) {
  py::gil_scoped_release release;
  autodrop::cpu::write_back(self.plan, pointer<const float>(arena), pointer<const float>(mean),
                            scale, num_threads, self.kernels);
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
void accumulate_sketch(Address pieces, Address runs, std::int64_t num_rows, Address bases,
                       Address table, bool /*weighted*/, int num_threads, const std::string& isa) {
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
  autodrop::bind_watch(m);
#if AUTODROP_WITH_CUDA
  autodrop::bind_cuda(m);
#endif
  m.attr("cpu_isa") = autodrop::cpu::best_kernels()->isa;

  m.def("accumulate", &accumulate_sketch, py::arg("pieces"), py::arg("runs"), py::arg("num_rows"),
        py::arg("bases"), py::arg("table"), py::arg("weighted"), py::arg("num_threads"),
        py::arg("isa") = "");
  m.def("accumulate_exact", &accumulate_exact, py::arg("spans"), py::arg("num_spans"),
        py::arg("bases"), py::arg("table"), py::arg("num_threads"), py::arg("isa") = "");
  m.def("close", &close_window, py::arg("running"), py::arg("mean"), py::arg("displacement"),
        py::arg("divisor"), py::arg("bounds"), py::arg("num_parts"), py::arg("sums_out"),
        py::arg("num_threads"), py::arg("isa") = "");

  py::class_<CpuPlan>(m, "CpuPlan", py::module_local())
      .def(py::init(&make_plan), py::arg("chunks"), py::arg("num_chunks"), py::arg("tensor_chunks"),
           py::arg("weights"), py::arg("num_tensors"), py::arg("isa") = "")
      .def("accumulate", &accumulate)
      .def("close_sum", &close_sum)
      .def("close_delta", &close_delta)
      .def("write_back", &write_back);
}
