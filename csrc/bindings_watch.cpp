// The half of autodrop_ext._C that looks at tensors: capsules and lists of parameters in, yes or no
// out. autodrop_ext/ops/watch.py looks the functions up and explains when they cannot be used.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/watch.h"

namespace py = pybind11;

namespace autodrop {
namespace {

template <class Function>
void set_function(Function& function, const py::dict& addresses, const char* name) {
  function = reinterpret_cast<Function>(addresses[name].cast<std::uintptr_t>());
}

TensorFunctions functions_from(const py::dict& addresses) {
  TensorFunctions functions;
  set_function(functions.data_ptr, addresses, "aoti_torch_get_data_ptr");
  set_function(functions.storage_size, addresses, "aoti_torch_get_storage_size");
  set_function(functions.dim, addresses, "aoti_torch_get_dim");
  set_function(functions.sizes, addresses, "aoti_torch_get_sizes");
  set_function(functions.strides, addresses, "aoti_torch_get_strides");
  set_function(functions.dtype, addresses, "aoti_torch_get_dtype");
  set_function(functions.free, addresses, "aoti_torch_delete_tensor_object");
  return functions;
}

// A new reference that is given back at the end of the scope; throws Python's error for nullptr.
py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// One new handle for each tensor of a list, owned by the caller. `allocate` is
// torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors, whose capsules do not free what they point
// to. It is called here and not in Python, where an interrupt could lose the handles.
std::vector<Handle> handles_of(const py::object& allocate, const py::list& tensors) {
  std::vector<Handle> handles;
  handles.reserve(tensors.size());
  const py::list capsules = allocate(tensors);
  for (const py::handle capsule : capsules) {
    handles.push_back(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return handles;
}

// How parameters are read without handles of their own. A handle counts as a reference to the
// tensor, and torch.utils.swap_tensors refuses tensors with more than one.
struct ParameterReader {
  TensorFunctions functions;
  // Bytes from a Python tensor to the pointer that its at::Tensor consists of.
  std::size_t impl_offset;
  py::object tensor_type;     // torch.Tensor
  py::object parameter_type;  // torch.nn.Parameter
  py::object base_type;       // torch._C.TensorBase
  py::object requires_grad;   // its getset descriptor

  ParameterReader(const py::dict& addresses, std::size_t offset, py::object tensor,
                  py::object parameter, py::object base)
      : functions(functions_from(addresses)),
        impl_offset(offset),
        tensor_type(std::move(tensor)),
        parameter_type(std::move(parameter)),
        base_type(std::move(base)),
        requires_grad(base_type.attr("__dict__")["requires_grad"]) {
    if (Py_TYPE(requires_grad.ptr())->tp_descr_get == nullptr) {
      throw py::type_error("requires_grad: expected a descriptor of torch._C.TensorBase");
    }
  }

  bool is_plain(const py::object& tensor) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    return type == parameter_type.ptr() || type == tensor_type.ptr();
  }

  // The descriptor is called without the search for the attribute, which takes as long again.
  bool needs_gradient(const py::object& tensor, bool plain) const {
    PyObject* const self = tensor.ptr();
    const py::object flag =
        plain ? owned(Py_TYPE(requires_grad.ptr())
                          ->tp_descr_get(requires_grad.ptr(), self,
                                         reinterpret_cast<PyObject*>(Py_TYPE(self))))
              : owned(PyObject_GetAttrString(self, "requires_grad"));
    return flag.is(py::handle(Py_True));
  }

  void* impl_of(const py::object& tensor) const {
    if (!PyObject_TypeCheck(tensor.ptr(), reinterpret_cast<PyTypeObject*>(base_type.ptr()))) {
      throw py::type_error(std::string("params: expected tensors, got ") +
                           Py_TYPE(tensor.ptr())->tp_name);
    }
    void* impl;
    std::memcpy(&impl, reinterpret_cast<const char*>(tensor.ptr()) + impl_offset, sizeof(impl));
    return impl;
  }

  // Calls visit(group, tensor) with every parameter that is not frozen until it returns false.
  // `frozen` and `local` may be None; see watch.py.
  template <class Visit>
  bool for_watched(const py::sequence& groups, const py::object& frozen, const py::object& local,
                   const Visit& visit) const {
    const std::size_t num_groups = groups.size();
    for (std::size_t g = 0; g < num_groups; ++g) {
      const py::object members = owned(
          PySequence_Fast(py::object(groups[g]).ptr(), "groups: expected sequences of tensors"));
      // The size is read again each time, because `frozen` and `local` are Python.
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(members.ptr()); ++i) {
        const auto tensor =
            py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(members.ptr(), i));
        const bool plain = is_plain(tensor);
        if (!plain) impl_of(tensor);  // raises TypeError if it is not a tensor
        if (!needs_gradient(tensor, plain)) {
          if (frozen.is_none() || py::cast<bool>(py::object(frozen(tensor)))) continue;
        }
        if (plain || local.is_none()) {
          if (!visit(g, tensor)) return false;
        } else {
          if (!visit(g, py::object(local(tensor)))) return false;
        }
      }
    }
    return true;
  }
};

// What the parameters of an optimizer were when it was made.
class WatchedParameters {
 public:
  WatchedParameters(const ParameterReader& reader, const py::sequence& groups, py::object frozen,
                    py::object local)
      : reader_(reader),
        frozen_(std::move(frozen)),
        local_(std::move(local)),
        layouts_(reader.functions),
        per_group_(groups.size()) {
    reader_.for_watched(groups, frozen_, local_, [&](std::size_t g, const py::object& tensor) {
      void* impl = reader_.impl_of(tensor);
      // Once for each tensor, torch's own answer is compared with what is read at the offset.
      if (tensor.attr("_cdata").cast<std::uintptr_t>() != reinterpret_cast<std::uintptr_t>(impl)) {
        throw std::runtime_error("a Python tensor is not laid out as the others are");
      }
      if (!layouts_.append(&impl)) {
        throw std::runtime_error("torch does not describe a parameter's memory");
      }
      ++per_group_[g];
      return true;
    });
  }

  bool matches(const py::sequence& groups) const {
    if (groups.size() != per_group_.size()) return false;
    std::vector<std::size_t> per_group(per_group_.size());
    std::size_t index = 0;
    const bool same =
        reader_.for_watched(groups, frozen_, local_, [&](std::size_t g, const py::object& tensor) {
          void* impl = reader_.impl_of(tensor);
          ++per_group[g];
          return layouts_.same(index++, &impl);
        });
    return same && per_group == per_group_;
  }

 private:
  ParameterReader reader_;
  py::object frozen_, local_;
  WatchedLayouts layouts_;
  std::vector<std::size_t> per_group_;
};

}  // namespace

void bind_watch(py::module_& m) {
  py::class_<WatchedMemory>(m, "WatchedMemory", py::module_local())
      .def(py::init(
          [](const py::dict& addresses, const py::object& allocate, const py::list& tensors) {
            const TensorFunctions functions = functions_from(addresses);
            return std::make_unique<WatchedMemory>(functions, handles_of(allocate, tensors));
          }))
      .def("moved", &WatchedMemory::moved);
  py::class_<ParameterReader>(m, "ParameterReader", py::module_local())
      .def(py::init<py::dict, std::size_t, py::object, py::object, py::object>());
  py::class_<WatchedParameters>(m, "WatchedParameters", py::module_local())
      .def(py::init<const ParameterReader&, py::sequence, py::object, py::object>())
      .def("matches", &WatchedParameters::matches);
}

}  // namespace autodrop
