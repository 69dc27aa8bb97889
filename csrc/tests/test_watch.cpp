// core/watch.h under AddressSanitizer and UBSan, with tensors of its own in the place of torch's:
// every change is seen, and every handle is freed once.
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <vector>

#include "core/watch.h"
#include "tests/support.h"

namespace {

using namespace autodrop;
using namespace autodrop::testing;

struct FakeTensor {
  void* address;
  std::int64_t storage_bytes;
  std::vector<std::int64_t> sizes, strides;
  std::int32_t dtype = 6;
  bool broken = false;
  int freed = 0;
};

FakeTensor& fake(Handle handle) { return *static_cast<FakeTensor*>(handle); }

const TensorFunctions kFunctions = {
    [](Handle h, void** out) -> std::int32_t {
      *out = fake(h).address;
      return fake(h).broken;
    },
    [](Handle h, std::int64_t* out) -> std::int32_t {
      *out = fake(h).storage_bytes;
      return 0;
    },
    [](Handle h, std::int64_t* out) -> std::int32_t {
      *out = static_cast<std::int64_t>(fake(h).sizes.size());
      return 0;
    },
    [](Handle h, std::int64_t** out) -> std::int32_t {
      *out = fake(h).sizes.data();
      return 0;
    },
    [](Handle h, std::int64_t** out) -> std::int32_t {
      *out = fake(h).strides.data();
      return 0;
    },
    [](Handle h, std::int32_t* out) -> std::int32_t {
      *out = fake(h).dtype;
      return 0;
    },
    [](Handle h) -> std::int32_t {
      ++fake(h).freed;
      return 0;
    },
};

char memory[64];

std::vector<FakeTensor> some_tensors() {
  return {{memory, 24, {2, 3}, {3, 1}}, {memory + 32, 4, {}, {}}, {nullptr, 0, {0}, {1}}};
}

std::vector<Handle> handles_of(std::vector<FakeTensor>& tensors) {
  std::vector<Handle> handles;
  for (FakeTensor& tensor : tensors) handles.push_back(&tensor);
  return handles;
}

void test_memory() {
  const std::function<void(FakeTensor&)> changes[] = {
      [](FakeTensor& t) { t.address = memory + 8; },
      [](FakeTensor& t) { t.storage_bytes += 4; },
      [](FakeTensor& t) { t.broken = true; },
  };
  for (std::size_t which = 0; which < 3; ++which) {
    for (const auto& change : changes) {
      std::vector<FakeTensor> tensors = some_tensors();
      {
        const WatchedMemory watched(kFunctions, handles_of(tensors));
        CHECK(!watched.moved(), "nothing was changed");
        change(tensors[which]);
        CHECK(watched.moved(), "a change of tensor %zu was not seen", which);
      }
      for (const FakeTensor& t : tensors) CHECK(t.freed == 1, "freed %d times", t.freed);
    }
  }
  CHECK(!WatchedMemory(kFunctions, {}).moved(), "nothing cannot move");
}

void test_broken_tensor() {
  std::vector<FakeTensor> tensors = some_tensors();
  tensors[1].broken = true;
  bool thrown = false;
  try {
    const WatchedMemory watched(kFunctions, handles_of(tensors));
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  CHECK(thrown, "a tensor without an address was taken");
  for (const FakeTensor& t : tensors) CHECK(t.freed == 1, "freed %d times", t.freed);
  WatchedLayouts layouts(kFunctions);
  CHECK(!layouts.append(&tensors[1]) && layouts.size() == 0, "it was appended");
}

void test_layouts() {
  std::vector<FakeTensor> tensors = some_tensors();
  WatchedLayouts layouts(kFunctions);
  for (FakeTensor& tensor : tensors) CHECK(layouts.append(&tensor), "it was not appended");
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(layouts.same(i, &tensors[i]), "tensor %zu was not changed", i);
    CHECK(!layouts.same((i + 1) % 3, &tensors[i]), "tensor %zu is another", i);
  }
  CHECK(!layouts.same(3, &tensors[0]), "there is no fourth tensor");
  const std::function<void(FakeTensor&)> changes[] = {
      [](FakeTensor& t) { t.address = memory + 8; },   [](FakeTensor& t) { t.sizes = {3, 2}; },
      [](FakeTensor& t) { t.strides = {1, 2}; },       [](FakeTensor& t) { t.dtype = 7; },
      [](FakeTensor& t) { t.sizes = t.strides = {}; }, [](FakeTensor& t) { t.broken = true; },
  };
  for (const auto& change : changes) {
    FakeTensor other = tensors[0];
    change(other);
    CHECK(!layouts.same(0, &other), "a change was not seen");
  }
}

}  // namespace

int main() {
  test_memory();
  test_broken_tensor();
  test_layouts();
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
