// Whether tensors still have the memory and the layout that a plan was made from. Tensors are
// handles of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h), whose functions are
// looked up when the package runs, so that this builds without torch and without its headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace autodrop {

using Handle = void*;  // AtenTensorHandle, which points to an at::Tensor

// The functions of the interface that are used. All of them return 0 if they succeed.
struct TensorFunctions {
  std::int32_t (*data_ptr)(Handle, void**);
  std::int32_t (*storage_size)(Handle, std::int64_t*);  // bytes
  std::int32_t (*dim)(Handle, std::int64_t*);
  std::int32_t (*sizes)(Handle, std::int64_t**);    // owned by the tensor
  std::int32_t (*strides)(Handle, std::int64_t**);  // owned by the tensor, in elements
  std::int32_t (*dtype)(Handle, std::int32_t*);
  std::int32_t (*free)(Handle);
};

// Owns handles, and knows which memory they had when it was made.
class WatchedMemory {
 public:
  // Takes the handles over even where it throws std::runtime_error, because one has no memory.
  WatchedMemory(const TensorFunctions& functions, std::vector<Handle> handles)
      : functions_(functions), handles_(std::move(handles)) {
    try {
      memory_.reserve(handles_.size());
      for (Handle handle : handles_) {
        Memory memory;
        if (!read(handle, memory)) throw std::runtime_error("torch gives no address of a tensor");
        memory_.push_back(memory);
      }
    } catch (...) {
      free_handles();
      throw;
    }
  }
  ~WatchedMemory() { free_handles(); }
  WatchedMemory(const WatchedMemory&) = delete;
  WatchedMemory& operator=(const WatchedMemory&) = delete;

  // Whether any tensor has another address, or its storage another size. The size matters because
  // a storage that was freed and allocated again can be smaller at the same address.
  bool moved() const {
    for (std::size_t i = 0; i < handles_.size(); ++i) {
      Memory now;
      if (!read(handles_[i], now)) return true;
      if (now.address != memory_[i].address || now.storage_bytes != memory_[i].storage_bytes) {
        return true;
      }
    }
    return false;
  }

 private:
  struct Memory {
    void* address = nullptr;
    std::int64_t storage_bytes = 0;
  };

  bool read(Handle handle, Memory& memory) const {
    return functions_.data_ptr(handle, &memory.address) == 0 &&
           functions_.storage_size(handle, &memory.storage_bytes) == 0;
  }
  void free_handles() {
    for (Handle handle : handles_) functions_.free(handle);
    handles_.clear();
  }

  TensorFunctions functions_;
  std::vector<Handle> handles_;
  std::vector<Memory> memory_;  // [handles]
};

// Addresses, dtypes, sizes and strides of tensors in their order. Owns no handles.
class WatchedLayouts {
 public:
  explicit WatchedLayouts(const TensorFunctions& functions) : functions_(functions) {}

  std::size_t size() const { return layouts_.size(); }

  // Adds a tensor at the end; false if torch does not describe it.
  bool append(Handle handle) {
    View view;
    if (!read(handle, view)) return false;
    layouts_.push_back({view.address, view.dim, numbers_.size(), view.dtype});
    numbers_.insert(numbers_.end(), view.sizes, view.sizes + view.dim);
    numbers_.insert(numbers_.end(), view.strides, view.strides + view.dim);
    return true;
  }

  // Whether the tensor is as the one that was appended as number `index`.
  bool same(std::size_t index, Handle handle) const {
    View view;
    if (index >= layouts_.size() || !read(handle, view)) return false;
    const Layout& layout = layouts_[index];
    const std::int64_t* sizes = numbers_.data() + layout.numbers;
    return view.address == layout.address && view.dtype == layout.dtype && view.dim == layout.dim &&
           std::equal(sizes, sizes + view.dim, view.sizes) &&
           std::equal(sizes + view.dim, sizes + 2 * view.dim, view.strides);
  }

 private:
  struct View {
    void* address = nullptr;
    std::int64_t dim = 0;
    std::int64_t* sizes = nullptr;
    std::int64_t* strides = nullptr;
    std::int32_t dtype = 0;
  };
  struct Layout {
    void* address;
    std::int64_t dim;
    std::size_t numbers;  // position in numbers_ of the sizes, which the strides follow
    std::int32_t dtype;
  };

  bool read(Handle handle, View& view) const {
    return functions_.data_ptr(handle, &view.address) == 0 &&
           functions_.dtype(handle, &view.dtype) == 0 && functions_.dim(handle, &view.dim) == 0 &&
           functions_.sizes(handle, &view.sizes) == 0 &&
           functions_.strides(handle, &view.strides) == 0;
  }

  TensorFunctions functions_;
  std::vector<Layout> layouts_;
  std::vector<std::int64_t> numbers_;
};

}  // namespace autodrop
