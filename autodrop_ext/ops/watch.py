"""Whether parameters still have the memory that a plan was made from.

A plan holds addresses. Three things invalidate them, and each needs another look:

- The memory of a storage moves while its tensors stay: ``share_memory_()``, sending a model to a
  ``torch.multiprocessing`` worker, ``untyped_storage().resize_()`` as FSDP1 calls it. Reading the
  old address would crash, so :meth:`MemoryWatch.moved` is for every read of the parameters.
- A parameter gets other memory or another layout: ``p.data = other``, ``.to()``,
  ``torch.utils.swap_tensors``. The plan's aliases keep the old memory alive, so that reading it is
  harmless but useless. :meth:`MemoryWatch.matches` sees it at the ends of a window.
- Other parameters take the place of the first, or are frozen or added. ``matches`` sees that too.

Both are compiled where this torch allows it. They use functions of torch's C interface
(``torch/csrc/inductor/aoti_torch/c/shim.h``) that are looked up here, because the compiled core is
built without torch. Elsewhere Python compares the same things, in more time;
:func:`why_slow` gives the reason.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import native

Groups = Sequence[Sequence[Tensor]]

SYMBOLS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_storage_size",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_delete_tensor_object",
)


class MemoryWatch:
    """Remembers where tensors are, and says whether they are still there.

    It compares what matters for a plan: memory and layout. It does not compare which Python objects
    hold them, because some engines and some functions given as ``params=`` make new tensor objects
    for the same memory at each call. The aliases keep their storages alive, so that no other
    parameter can get a remembered address unless :meth:`moved` returns True.

    A copy (``copy.deepcopy``, ``pickle``) watches nothing and reports that everything has moved: an
    address means nothing for copied tensors, so that its holder has to make a new plan.

    Args:
        groups: the parameters as they are now, as one sequence for each param group:
            ``[group["params"] for group in optimizer.param_groups]``.
        aliases: the tensors whose addresses the plan holds, such as ``p.detach()`` for each
            parameter. They must be plain tensors with memory. The watch keeps them alive, and with
            them their storages, as the plan does.
        frozen: called with each parameter that does not require gradients; parameters for which it
            returns True are not watched. None if all of those are frozen. The compiled watch keeps
            it, and the garbage collector does not see through that: it must not lead to the object
            that holds the watch.
        local: called with each parameter that is neither a ``torch.Tensor`` nor an
            ``nn.Parameter`` but an instance of a subclass; returns the plain tensor that holds its
            elements, for example ``DTensor.to_local()``. None if the parameters do so themselves.

    Raises:
        TypeError: ``groups`` holds something that is not a tensor.
        RuntimeError: torch gives no address of a tensor.

    Attributes:
        why_slow: why Python compares; empty where the compiled core does.
    """

    def __init__(
        self,
        groups: Groups,
        aliases: Sequence[Tensor],
        *,
        frozen: Callable[[Tensor], bool] | None = None,
        local: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._memory: Any
        self._parameters: Any
        self.why_slow = why_slow()
        compiled = _probe(SYMBOLS, native.core)
        with torch._C.DisableTorchFunction():
            if isinstance(compiled, _Compiled):
                core = compiled.core
                try:
                    self._memory = core.WatchedMemory(
                        compiled.addresses, compiled.allocate, list(aliases)
                    )
                    self._parameters = core.WatchedParameters(
                        compiled.reader, groups, frozen, local
                    )
                    return
                except RuntimeError as error:  # Python's comparison raises it again if it must
                    self.why_slow = f"the compiled comparison refused these tensors: {error}"
            self._memory = _Memory(aliases)
            self._parameters = _Parameters(groups, frozen, local)

    def moved(self) -> bool:
        """Whether any alias has another address, or a storage of another size, than at first."""
        return self._memory is None or bool(self._memory.moved())

    def matches(self, groups: Groups) -> bool:
        """Whether a plan of the remembered parameters holds for these, and nothing has moved.

        The parameters that are not frozen must be as many in each group, in the same order, and
        each must have the same address, sizes, strides and dtype.

        Args:
            groups: as for the constructor, read from the optimizer again.

        Raises:
            TypeError: ``groups`` holds something that is not a tensor.
        """
        if self.moved():
            return False
        # A mode, such as that of torch.set_default_device, would otherwise be asked for every
        # attribute of every tensor.
        with torch._C.DisableTorchFunction():
            return bool(self._parameters.matches(groups))

    def __getstate__(self) -> dict[str, Any]:
        why_slow = "it is a copy, which watches nothing"
        return {"_memory": None, "_parameters": None, "why_slow": why_slow}


def why_slow() -> str:
    """Why Python compares the addresses here; empty where the compiled core does."""
    compiled = _probe(SYMBOLS, native.core)
    return compiled if isinstance(compiled, str) else ""


# ---- compiled ---------------------------------------------------------------------------------


class _Compiled(NamedTuple):
    core: Any  # autodrop_ext._C
    addresses: dict[str, int]  # of the functions in SYMBOLS
    allocate: Callable[[list[Tensor]], list[Any]]
    reader: Any  # _C.ParameterReader


@functools.cache
def _probe(symbols: tuple[str, ...], core: Any) -> _Compiled | str:
    """What the compiled comparison needs, or the reason why it is not possible."""
    if core is None:
        return native.why_missing()
    try:
        allocate = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        # A library is searched together with those it depends on, and libtorch_cpu is one of them,
        # wherever it is installed.
        library = ctypes.CDLL(torch._C.__file__)
        addresses = {name: _address(getattr(library, name)) for name in symbols}
    except (AttributeError, OSError) as error:
        return f"torch {torch.__version__} lacks a function of its C interface: {error}"
    offset = _impl_offset()
    if offset is None:
        return f"torch {torch.__version__} lays Python tensors out in an unknown way"
    reader = core.ParameterReader(addresses, offset, Tensor, nn.Parameter, torch._C.TensorBase)
    return _Compiled(core, addresses, allocate, reader)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _impl_offset() -> int | None:
    """Bytes from a Python tensor to the pointer that is the C++ tensor; None if it is not found.

    Asking ``Tensor._cdata`` for the pointer takes 35 ns, more than the comparison of everything
    else. A handle made by torch would take 75 ns, and as a second reference to the parameter it
    would make ``torch.utils.swap_tensors`` refuse it.
    """
    plain = torch.empty(1, device="cpu")
    tensors = [plain, nn.Parameter(plain), plain.detach(), torch.empty(2, 3, device="cpu").t()]
    header: int = object.__basicsize__
    size: int = torch._C.TensorBase.__basicsize__
    word = ctypes.sizeof(ctypes.c_void_p)
    for offset in range(header, size - word + 1, word):
        found = [ctypes.c_void_p.from_address(id(t) + offset).value for t in tensors]
        if found == [t._cdata for t in tensors]:
            return offset
    return None


# ---- in Python --------------------------------------------------------------------------------


class _Memory:
    """As ``WatchedMemory`` in ``csrc/core/watch.h``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._memory = [*self._now()]

    def moved(self) -> bool:
        return self._memory != [*self._now()]

    def _now(self) -> Iterator[tuple[int, int]]:
        return ((t.data_ptr(), t.untyped_storage().nbytes()) for t in self._tensors)


class _Parameters:
    """As ``WatchedParameters`` in ``csrc/bindings_watch.cpp``."""

    def __init__(
        self,
        groups: Groups,
        frozen: Callable[[Tensor], bool] | None,
        local: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._frozen = frozen
        self._local = local
        self._layouts = self._now(groups)

    def matches(self, groups: Groups) -> bool:
        return self._layouts == self._now(groups)

    def _now(self, groups: Groups) -> list[list[Any]]:
        return [self._layouts_of(self._watched(group)) for group in groups]

    def _watched(self, group: Sequence[Tensor]) -> list[Tensor]:
        for tensor in group:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"params: expected tensors, got {type(tensor).__name__}")
        frozen, local = self._frozen, self._local
        watched = [t for t in group if t.requires_grad or not (frozen is None or frozen(t))]
        if local is None:
            return watched
        return [t if type(t) in (Tensor, nn.Parameter) else local(t) for t in watched]

    @staticmethod
    def _layouts_of(tensors: Sequence[Tensor]) -> list[Any]:
        # List comprehensions over one attribute are the cheapest way to look at many tensors.
        return [
            [t.data_ptr() for t in tensors],
            [t.dtype for t in tensors],
            [t.shape for t in tensors],
            [t.stride() for t in tensors],
        ]
