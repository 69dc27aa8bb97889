"""The watch over parameters' memory sees every way in which a plan can become wrong."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from autodrop_ext.distributed.shards import local_tensor
from autodrop_ext.ops import native
from autodrop_ext.ops import watch as module
from autodrop_ext.ops.watch import MemoryWatch


@pytest.fixture(params=["compiled", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of looking; a torch without one of the functions is simulated."""
    if request.param == "python":
        monkeypatch.setattr(module, "SYMBOLS", (*module.SYMBOLS, "aoti_torch_not_there"))
    return str(request.param)


class Net(nn.Module):
    """A few layouts: dense, channels last, a scalar, no elements, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.conv = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.none = nn.Parameter(torch.empty(0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


class Watched:
    """A model with an optimizer of two param groups, and the watch over it."""

    def __init__(self) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD(
            [
                {"params": [*self.net.linear.parameters()]},
                {"params": [*self.net.conv.parameters(), self.net.scale, self.net.none]},
                {"params": [self.net.frozen]},
            ],
            lr=0.1,
        )
        aliases = [p.detach() for p in self.net.parameters() if p.requires_grad]
        self.watch = MemoryWatch(self.groups(), aliases)

    def groups(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.optimizer.param_groups]


def step(w: Watched) -> None:
    w.net.linear(torch.ones(1, 64)).sum().backward()
    w.optimizer.step()
    w.optimizer.zero_grad(set_to_none=True)


def give_other_memory(w: Watched) -> None:
    w.net.linear.weight.data = w.net.linear.weight.data.clone()


def transpose(w: Watched) -> None:
    w.net.linear.weight.data = w.net.linear.weight.data.t()


def reshape(w: Watched) -> None:
    w.net.linear.weight.data = w.net.linear.weight.data.view(32, 128)


def reinterpret(w: Watched) -> None:
    p = w.net.scale
    p.data = p.data.view(torch.int32).view(torch.float32)
    assert w.watch.matches(w.groups())
    p.data = p.data.view(1).view(torch.float16)[:1].view(())


def resize(w: Watched) -> None:
    """As FSDP1 frees and allocates; something else takes the old memory in between."""
    storage = w.net.linear.weight.untyped_storage()
    size, address = storage.nbytes(), storage.data_ptr()
    storage.resize_(0)
    taken = [torch.empty(size, dtype=torch.uint8) for _ in range(64)]
    storage.resize_(size)
    assert storage.data_ptr() != address
    del taken


def shrink(w: Watched) -> None:
    """Freed and allocated again with less; the address may be the same or not."""
    storage = w.net.linear.weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size - 64)


def swap(w: Watched) -> None:
    torch.utils.swap_tensors(w.net.linear.weight, nn.Parameter(torch.ones(64, 64)))


def swap_by_conversion(w: Watched) -> None:
    """``module.to()`` where it swaps tensors: it refuses one that has other references."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        w.net.linear.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def assign(w: Watched) -> None:
    state = {name: tensor.clone() for name, tensor in w.net.state_dict().items()}
    w.net.load_state_dict(state, assign=True)
    w.optimizer.param_groups[0]["params"] = [*w.net.linear.parameters()]


def add_group(w: Watched) -> None:
    w.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def add_empty_group(w: Watched) -> None:
    w.optimizer.param_groups.append({"params": []})


def regroup(w: Watched) -> None:
    """The same parameters in the same order, with a border between them elsewhere."""
    groups = w.groups()
    groups[1].insert(0, groups[0].pop())


def exchange(w: Watched) -> None:
    w.groups()[1][2:4] = w.groups()[1][3:1:-1]


def remove(w: Watched) -> None:
    del w.groups()[1][-1]


def resume(w: Watched) -> None:
    """Replaces the param groups and their dicts, but not the parameters."""
    w.optimizer.load_state_dict(w.optimizer.state_dict())


def same_memory(w: Watched) -> None:
    p = w.groups()[0][0]
    w.groups()[0][0] = nn.Parameter(p.detach())
    assert w.groups()[0][0] is not p


def default_device(w: Watched) -> None:
    torch.set_default_device("meta")


MOVED = (True, False)
REPLACED = (False, False)  # the aliases' memory is still there
HOLDS = (False, True)

Change = Callable[[Watched], object]
CHANGES: dict[str, tuple[Change, tuple[bool, bool]]] = {
    "nothing": (lambda w: None, HOLDS),
    "optimizer step": (step, HOLDS),
    "state loaded": (lambda w: w.net.load_state_dict(w.net.state_dict()), HOLDS),
    "optimizer state loaded": (resume, HOLDS),
    "other objects, same memory": (same_memory, HOLDS),
    "default device": (default_device, HOLDS),
    "frozen moved": (lambda w: w.net.frozen.data.share_memory_(), HOLDS),
    "share_memory": (lambda w: w.net.share_memory(), MOVED),
    "sent to a worker": (lambda w: ForkingPickler.dumps(w.net.linear.weight), MOVED),
    "storage freed": (lambda w: w.net.scale.untyped_storage().resize_(0), MOVED),
    "storage freed and allocated": (resize, MOVED),
    "storage smaller": (shrink, MOVED),
    "data": (give_other_memory, REPLACED),
    "transposed": (transpose, REPLACED),
    "reshaped": (reshape, REPLACED),
    "dtype, same memory": (reinterpret, REPLACED),
    "double": (lambda w: w.net.double(), REPLACED),
    "to half": (lambda w: w.net.to(torch.bfloat16), REPLACED),
    "memory format": (lambda w: w.net.to(memory_format=torch.channels_last), REPLACED),
    "swapped": (swap, REPLACED),
    "swapped by conversion": (swap_by_conversion, REPLACED),
    "assigned": (assign, REPLACED),
    "group added": (add_group, REPLACED),
    "empty group added": (add_empty_group, REPLACED),
    "regrouped": (regroup, REPLACED),
    "order": (exchange, REPLACED),
    "removed": (remove, REPLACED),
    "frozen": (lambda w: w.net.linear.bias.requires_grad_(False), REPLACED),
    "thawed": (lambda w: w.net.frozen.requires_grad_(True), REPLACED),
}


@pytest.fixture(autouse=True)
def usual_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, way: str) -> None:
    change, expected = CHANGES[name]
    watched = Watched()
    assert not watched.watch.moved()
    assert watched.watch.matches(watched.groups())
    change(watched)
    assert (watched.watch.moved(), watched.watch.matches(watched.groups())) == expected


def test_python_is_used_only_where_a_function_is_missing(way: str) -> None:
    if way == "compiled":
        # Every torch that the tests run on has the functions. If a later one lacks them, this says
        # so, and nothing else would.
        assert module.why_slow() == ""
        assert Watched().watch.why_slow == ""
    else:
        assert "lacks a function of its C interface" in module.why_slow()
        assert "aoti_torch_not_there" in module.why_slow()


def test_without_the_core_python_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYMBOLS", module.SYMBOLS[::-1])  # not looked up before
    monkeypatch.setattr(native, "core", None)
    assert "the compiled core does not load" in module.why_slow()
    watched = Watched()
    assert watched.watch.matches(watched.groups())
    give_other_memory(watched)
    assert not watched.watch.matches(watched.groups())


def test_what_the_core_refuses_is_compared_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("an unknown layout")

    core = native.core
    assert core is not None
    partly = ModuleType("partly")
    partly.WatchedMemory = core.WatchedMemory  # type: ignore[attr-defined]
    partly.ParameterReader = core.ParameterReader  # type: ignore[attr-defined]
    partly.WatchedParameters = refuse  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "core", partly)
    watched = Watched()
    assert "an unknown layout" in watched.watch.why_slow
    assert watched.watch.matches(watched.groups())
    watched.net.share_memory()
    assert watched.watch.moved()
    assert not watched.watch.matches(watched.groups())


def test_it_refers_to_aliases_and_never_to_parameters(way: str) -> None:
    parameter = nn.Parameter(torch.ones(4))
    alias = parameter.detach()
    before = alias._use_count()
    watch = MemoryWatch([[parameter]], [alias])
    assert watch.matches([[parameter]])
    assert parameter._use_count() == 1
    if way == "compiled":
        assert alias._use_count() == before + 1
    del watch
    assert alias._use_count() == before


def test_aliases_stay_alive_as_long_as_the_watch(way: str) -> None:
    watched = Watched()
    watch = watched.watch
    del watched
    gc.collect()
    filling = [torch.full((64, 64), float(i)) for i in range(64)]  # takes memory that was freed
    assert not watch.moved()
    assert not watch.matches([filling])
    assert not watch.matches([])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))]
)
def test_a_copy_watches_nothing(copied: Callable[[MemoryWatch], MemoryWatch], way: str) -> None:
    watched = Watched()
    other = copied(watched.watch)
    assert other.moved()
    assert not other.matches(watched.groups())
    del other
    assert watched.watch.matches(watched.groups())


def test_plain_tensors_are_watched_unless_they_are_said_to_be_frozen(way: str) -> None:
    master, frozen = torch.ones(3), nn.Parameter(torch.ones(3), requires_grad=False)
    watch = MemoryWatch(
        [[master, frozen]],
        [master.detach()],
        frozen=lambda t: isinstance(t, nn.Parameter),
    )
    frozen.data = torch.ones(5)
    assert watch.matches([[master, frozen]])
    assert watch.matches([(master,)])
    master.data = torch.ones(3)
    assert not watch.matches([[master, frozen]])
    assert not watch.matches([[frozen]])


class Wrapper(Tensor):
    """Has no memory and keeps its elements in another tensor, as a DTensor does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, requires_grad=True
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, *args: object) -> None:
        raise NotImplementedError


def test_of_a_wrapper_its_local_tensor_is_watched(way: str) -> None:
    inner = torch.ones(6)
    wrapper, plain = Wrapper(inner), nn.Parameter(torch.ones(2))
    asked: list[Tensor] = []

    def local(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        assert isinstance(tensor, Wrapper)
        return tensor.inner.view(-1)  # a new object each time

    watch = MemoryWatch([[wrapper, plain]], [inner.detach(), plain.detach()], local=local)
    assert watch.matches([[wrapper, plain]])
    assert len(asked) == 2
    wrapper.inner = inner.clone()
    assert not watch.matches([[wrapper, plain]])
    assert not watch.moved()


@pytest.mark.parametrize("wrong", [None, "weight", 3, object()])
def test_what_is_no_tensor_is_refused(wrong: object, way: str) -> None:
    with pytest.raises(TypeError, match=f"expected tensors, got {type(wrong).__name__}"):
        MemoryWatch([[nn.Parameter(torch.ones(2)), wrong]], [])  # type: ignore[list-item]


def test_an_error_of_a_callback_arrives(way: str) -> None:
    def local(tensor: Tensor) -> Tensor:
        raise LookupError("no shard here")

    with pytest.raises(LookupError, match="no shard here"):
        MemoryWatch([[Wrapper(torch.ones(2))]], [], local=local)


def test_a_callback_may_shorten_the_group(way: str) -> None:
    group: list[Tensor] = [Wrapper(torch.ones(2)) for _ in range(8)]
    shorten = False

    def local(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, Wrapper)
        inner = tensor.inner
        if shorten:
            group.clear()
        return inner

    watch = MemoryWatch([group], [], local=local)
    assert watch.matches([group])
    shorten = True
    watch.matches([group])  # must not read past the end
    assert group == []
    assert not watch.matches([group])


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_of_a_dtensor_its_local_tensor_is_watched(mesh: DeviceMesh, way: str) -> None:
    def shard(tensor: Tensor) -> Any:
        return nn.Parameter(DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False))

    parameter, other = shard(torch.ones(4, 3)), shard(torch.zeros(4, 3))
    assert parameter.data_ptr() == other.data_ptr() == 0
    watch = MemoryWatch([[parameter]], [local_tensor(parameter).detach()], local=local_tensor)
    assert watch.matches([[parameter]])
    assert not watch.matches([[other]])
    local_tensor(parameter).untyped_storage().share_memory_()
    assert watch.moved()


def test_an_alias_without_memory_is_refused(way: str) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError):
        MemoryWatch([[]], [sparse])


def test_training_goes_on_as_without_a_watch(way: str) -> None:
    def train(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(net.parameters())
        aliases = [p.detach() for p in net.parameters()]
        kept = MemoryWatch([[*net.parameters()]], aliases) if watch else None
        for _ in range(5):
            optimizer.zero_grad()
            functional.mse_loss(net(torch.ones(2, 4)), torch.ones(2, 1)).backward()
            optimizer.step()
            assert kept is None or kept.matches([[*net.parameters()]])
        return [p.detach() for p in net.parameters()]

    for a, b in zip(train(True), train(False), strict=True):
        assert torch.equal(a, b)
