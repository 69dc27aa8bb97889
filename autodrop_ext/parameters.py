"""The tensors to measure: found whenever they may have changed, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .memory import distinct, has_memory
from .sharding import (
    LocalShard,
    is_dtensor,
    is_partitioned,
    local_shards,
    local_tensor,
    unwrap_optimizer,
    zero_optimizer_of,
    zero_shards,
    zero_tensors,
)

Named = tuple[str, Tensor]
IntArray = npt.NDArray[np.int64]
_ADDRESS = torch._C.TensorBase.data_ptr

_REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MEASURABLE = (*_REAL, torch.complex64, torch.complex128, torch.complex32)


class _Found(NamedTuple):
    """What the last search found."""

    ids: list[Any]  # of all parameters that were held, measured or not, by param group
    frozen: list[Tensor]  # held and not measured
    every: list[LocalShard]  # of all measured parameters
    kept: list[int]  # indices of those that are not the same memory as an earlier one
    forms: list[Any]  # of ``every``
    plain: list[Tensor]  # the parameters, if each is a shard by itself; otherwise empty


class ParameterSource:
    """The parameters of an optimizer, or given ones, as they are now.

    An optimizer's ``param_groups`` are never cached: ``load_state_dict``, ``add_param_group`` and
    wrappers replace them. Of sharded parameters it finds the part on this rank.

    A parameter is measured if it requires a gradient or has one, or if it did when this object
    looked or was notified before and has been held since: a discriminator may be frozen while
    ``step()`` is called, and adapters may be trained in turn. Tensors that are not an
    ``nn.Parameter``, such as float32 master weights, are always measured.

    Args:
        params: as that of :class:`~autodrop_ext.AngularVelocity`. A function is called at the ends
            of windows, and before each read if it returns tensors that are not an ``nn.Parameter``:
            it may have to compute them, and new ones of the same names and forms are the same.
    """

    def __init__(self, params: Any) -> None:
        self._optimizer: Optimizer | None = None
        self._zero: Any = None  # the DeepSpeed optimizer that steps ours
        self._read: Callable[[], Iterable[Any]] | None = None
        self._fixed: list[Any] = []
        self._measured: list[Tensor] = []  # when this object looked last
        self._found: _Found | None = None
        self._readable: IntArray  # addresses at which the shards had their form and memory
        params = unwrap_optimizer(params)
        if isinstance(params, Optimizer):
            self._optimizer = params
        elif callable(params) and not isinstance(params, nn.Module):
            self._read = params
        else:
            self._fixed = _listed(params)
            _named(self._fixed)  # wrong items fail here

    def check(self) -> None:
        """Raises TypeError if a parameter cannot be measured, as :meth:`shards` would.

        To be called early. Parameters may be sharded, replaced and filled later.
        """
        for name, parameter in self.named():
            _check_measurable(name, parameter)

    def named(self) -> list[Named]:
        """Return names and parameters to measure, as they are now."""
        return self._measured_of(_named(self._items()))

    def notice(self) -> None:
        """Remember parameters that the optimizer moves at the step that comes now.

        A schedule may call for the parameters when the gradients are gone and others are trained.
        """
        if self._optimizer is None or self._zero is not None:
            return
        groups = self._optimizer.param_groups
        every = (p for group in groups for p in group["params"])
        trained = [p for p in (self._found.frozen if self._found else every) if _is_trained(p)]
        if trained:
            known = set(map(id, self._measured))
            self._measured += [p for p in trained if id(p) not in known]

    def num_groups(self) -> int:
        """Return the param groups that the parameters come in; 1 if they come without."""
        return max(1, len(_groups(self._items())))

    def shards(self) -> list[LocalShard]:
        """Return what this rank holds of all measured parameters, and remember it.

        Identical views of the same memory count once.

        Raises:
            TypeError: a measured parameter is sparse, quantised or not floating-point; or a DTensor
                with a pending sum.
            ValueError: two parameters overlap in memory without being the same.
            RuntimeError: an engine keeps the parameters where they cannot be read.
        """
        self._found = None
        if self._optimizer is not None:
            self._zero = zero_optimizer_of(self._optimizer)
        items = self._items()
        frozen: list[Tensor] = []
        if self._zero is not None:
            every = zero_shards(self._zero)
        else:
            held = _named(items)
            every = _find(self._measured_of(held), items)
            measured = set(map(id, self._measured))
            frozen = [p for _, p in held if id(p) not in measured]
        kept = distinct([(shard.name, shard.tensor) for shard in every])
        whole = not any(is_dtensor(s.origin) or s.offset for s in every)
        plain = [s.origin for s in every] if whole else []
        with torch._C.DisableTorchFunction():
            self._found = _Found(_ids(items), frozen, every, kept, _forms(every), plain)
            self._readable = _addresses(self._found)
        return [every[i] for i in kept]

    def addresses(self) -> IntArray | None:
        """Return the address of each shard's first element now, int64 ``[num_shards]``.

        An address in another memory than before is fine: the parameter is the same.

        Returns:
            Addresses in the order of :meth:`shards`; None if the shards cannot be read as they were
            found: a parameter's memory is gone, or it has another shape, order in memory, dtype or
            device.

        Raises:
            RuntimeError: :meth:`shards` has found nothing yet.
        """
        found = self._found
        if found is None:
            raise RuntimeError("addresses: expected a call after shards(), got one before it")
        if self._read is not None and any(not _is_parameter(s.origin) for s in found.every):
            found = self._again(found, self._items())
            if found is None:
                return None
        with torch._C.DisableTorchFunction():
            now = _addresses(found)
            if not np.array_equal(now, self._readable):
                if _forms(found.every) != found.forms:
                    return None
                if not all(has_memory(_local(shard.origin)) for shard in found.every):
                    return None
                self._readable = now
        return now if len(found.kept) == len(now) else now[found.kept]

    def unchanged(self) -> bool:
        """Return True if :meth:`shards` would find the same parameters again.

        A parameter is the same if it is the same object with the same shape, order in memory, dtype
        and device, whatever memory it has now, or none for the moment. A new ``nn.Parameter`` from
        a function is the same if its memory is, and another new tensor if its name is.
        """
        found = self._found
        if found is None:
            return False
        found = self._again(found, self._items())
        if found is None:
            return False
        with torch._C.DisableTorchFunction():
            measured = set(map(id, self._measured)) if found.frozen else set()
            if any(id(p) in measured or _is_trained(p) for p in found.frozen):
                return False
            return _forms(found.every) == found.forms

    def _again(self, found: _Found, items: Sequence[Any]) -> _Found | None:
        """Return what was found, with new objects for the same parameters; None for others."""
        if _ids(items) == found.ids:
            return found
        if self._read is None:
            return None
        named = self._measured_of(_named(items))
        now = local_shards(named, _group_of(items))
        if _places(now) == _places(found.every):
            return found
        facts = [[(s.name, s.layout, s.group, s.part) for s in one] for one in (now, found.every)]
        if facts[0] != facts[1] or any(_is_parameter(p) for _, p in named):
            return None
        if _forms(now) != found.forms or distinct([(s.name, s.tensor) for s in now]) != found.kept:
            return None
        plain = [s.origin for s in now] if found.plain else []
        self._found = found._replace(ids=_ids(items), every=now, plain=plain, frozen=[])
        return self._found

    def _items(self) -> Sequence[Any]:
        """Return tensors, pairs and param groups as they are now."""
        if self._zero is not None:
            return zero_tensors(self._zero)
        if self._optimizer is not None:
            return self._optimizer.param_groups
        return self._fixed if self._read is None else _listed(self._read())

    def _measured_of(self, held: Sequence[Named]) -> list[Named]:
        """Return the parameters to measure, and remember that they are measured."""
        before = set(map(id, self._measured))
        named = [
            (name, p)
            for name, p in held
            if _is_trained(p) or id(p) in before or not _is_parameter(p)
        ]
        self._measured = [p for _, p in named]
        return named

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zero": None, "_found": None}


def _find(named: Sequence[Named], items: Sequence[Any]) -> list[LocalShard]:
    for name, parameter in named:
        _check_measurable(name, parameter)
        if is_partitioned(parameter):
            raise RuntimeError(
                f"{name}: expected a parameter with data, got one that DeepSpeed ZeRO-3 has "
                "partitioned; give the scheduler engine.optimizer, or params=engine.optimizer"
            )
        if parameter.is_meta:
            raise RuntimeError(f"{name}: expected a parameter with data, got one on device meta")
        if is_lazy(parameter):
            raise RuntimeError(
                f"{name}: expected a parameter with a shape at the first step, got one of a lazy "
                "module that has not seen an input"
            )
    return local_shards(named, _group_of(items))


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _is_trained(tensor: Tensor) -> bool:
    """Return True if torch's optimizers move the tensor."""
    return tensor.requires_grad or (tensor.is_leaf and tensor.grad is not None)


def _local(tensor: Any) -> Tensor:
    """Return a DTensor's local tensor, in a tenth of the time of ``to_local()``."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _addresses(found: _Found) -> IntArray:
    # Half of the time of a loop in Python: 45 ns a parameter, and this is called at every read.
    pointers = map(_ADDRESS, found.plain) if found.plain else map(_address, found.every)
    return np.fromiter(pointers, np.int64, len(found.every))


def _address(shard: LocalShard) -> int:
    return _local(shard.origin).data_ptr() + shard.offset * shard.origin.element_size()


def _forms(shards: Sequence[LocalShard]) -> list[Any]:
    """Return what must stay the same while shards are read from other memory, column by column."""
    origins: list[Any] = [shard.origin for shard in shards]
    tensors = [_local(origin) for origin in origins]
    return [
        [type(origin) for origin in origins],
        [tensor.dtype for tensor in tensors],
        [tensor.device for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [(o.shape, o.placements) for o, t in zip(origins, tensors, strict=True) if o is not t],
    ]


def _places(shards: Sequence[LocalShard]) -> list[Any]:
    """Return what is equal of new objects for the same memory."""
    return [
        (s.name, s.layout, s.group, s.part, s.tensor.data_ptr(), s.tensor.stride()) for s in shards
    ]


# ---- what is given as params= -----------------------------------------------------------------


def _listed(params: Any) -> list[Any]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params: expected an iterable of tensors, of (name, tensor) pairs or of param groups, "
            f"got {type(params).__name__}"
        )
    return list(params)


def _groups(items: Sequence[Any]) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)]


def _group_of(items: Sequence[Any]) -> Mapping[int, int]:
    """Return the index of the param group by ``id`` of the parameter; the first of several."""
    groups = list(enumerate(_groups(items)))
    return {id(p): g for g, group in reversed(groups) for p in group["params"]}


def _ids(items: Sequence[Any]) -> list[Any]:
    return [
        [id(p) for p in item["params"]]
        if isinstance(item, dict)
        else id(item[1] if isinstance(item, tuple) else item)
        for item in items
    ]


def _named(items: Sequence[Any]) -> list[Named]:
    """Return names and tensors; a number follows a name that another tensor has: ``weight (2)``."""
    named: list[Named] = []
    for i, item in enumerate(items):
        if isinstance(item, Tensor):
            named.append((f"params[{i}]", item))
        elif isinstance(item, dict) and "params" in item:
            tensors = item["params"]
            # torch fills in "param_names" for optimizers made of named parameters.
            names = item.get("param_names") or [
                f"param_groups[{i}]['params'][{j}]" for j in range(len(tensors))
            ]
            named.extend(zip(names, tensors, strict=True))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            named.append((str(item[0]), item[1]))
        else:
            raise TypeError(
                f"params[{i}]: expected a tensor, a (name, tensor) pair or a param group, "
                f"got {type(item).__name__}"
            )
    owner: dict[str, Tensor] = {}
    unique = []
    for name, tensor in named:
        other, number = name, 1
        while owner.setdefault(other, tensor) is not tensor:
            number += 1
            other = f"{name} ({number})"
        unique.append((other, tensor))
    return unique


def _check_measurable(name: str, parameter: Tensor) -> None:
    problem = None
    parameter = local_tensor(parameter)
    if is_lazy(parameter):
        return  # the first forward pass, before the first step, gives it a shape
    if parameter.layout != torch.strided:
        problem = f"layout {parameter.layout}"
    elif parameter.is_quantized or parameter.dtype not in _MEASURABLE:
        problem = f"dtype {parameter.dtype}"
    elif parameter.numel() and not parameter.is_meta and parameter.data_ptr() == 0:
        # Address 0 of something that has elements: a wrapper, such as torchao's tensors.
        problem = f"a {type(parameter).__name__} without memory of its own"
    if problem is not None:
        raise TypeError(
            f"{name}: expected a dense floating-point or complex parameter, got {problem}; "
            "freeze it (requires_grad=False) or pass the tensors to measure as params="
        )
