"""Which tensors are watched: looked up whenever they may have changed, named for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import deepspeed
from .distributed.engines import local_shards, unwrap_optimizer
from .distributed.shards import LocalShard, local_tensor
from .ops.memory import Named
from .ops.reference import DTYPES
from .ops.watch import MemoryWatch

_TRACKED_DTYPES = (*DTYPES, torch.complex64, torch.complex128, torch.complex32)


class ParameterSource:
    """The parameters of an optimizer, or given ones, as they are now.

    An optimizer's ``param_groups`` are never cached: ``load_state_dict``, ``add_param_group`` and
    wrappers replace them. For sharded parameters it gives the part on this rank.

    Args:
        params: an optimizer, also one wrapped by accelerate or DeepSpeed; or an iterable of
            tensors, of ``(name, tensor)`` pairs or of param groups; or a function without arguments
            that returns such an iterable.
    """

    def __init__(self, params: Any) -> None:
        self._optimizer: Optimizer | None = None
        self._zero: Any = None  # the DeepSpeed optimizer that steps ours
        self._read: Callable[[], Iterable[Any]] | None = None
        self._fixed: list[Named] = []
        self._fixed_groups: list[dict[str, Any]] = []
        self._watch: MemoryWatch | None = None
        params = unwrap_optimizer(params)
        if isinstance(params, Optimizer):
            self._optimizer = params
        elif callable(params) and not isinstance(params, nn.Module):
            self._read = params
        else:
            params = list(params) if isinstance(params, Iterator) else params  # read twice
            self._fixed = _named(params)
            self._fixed_groups = _dicts(params)

    def check(self) -> None:
        """Raises TypeError where a parameter cannot be watched, as :meth:`shards` would.

        To be called early. Parameters may be sharded, replaced and filled later.
        """
        for name, parameter in self._trainable():
            _check_trackable(name, parameter)

    def shards(self) -> list[LocalShard]:
        """What this rank holds of all trainable parameters.

        Raises:
            TypeError: a trainable parameter is sparse, quantised or not floating-point; or a
                DTensor with a pending sum.
            RuntimeError: an engine keeps the parameters where they cannot be read.
        """
        if self._optimizer is not None:
            self._zero = deepspeed.zero_optimizer_of(self._optimizer)
            if self._zero is not None:
                return deepspeed.zero_shards(self._zero)
        named = self._trainable()
        for name, parameter in named:
            _check_trackable(name, parameter)
            if deepspeed.is_partitioned(parameter):
                raise RuntimeError(
                    f"{name}: expected a parameter with data, got one that DeepSpeed ZeRO-3 has "
                    "partitioned; give the scheduler engine.optimizer, or params=engine.optimizer"
                )
        return local_shards(named, self._group_of())

    def num_groups(self) -> int:
        """Param groups that the parameters come in; 1 where they come without."""
        return max(1, len(self._groups()))

    def watch(self, shards: Sequence[LocalShard]) -> None:
        """Remember the parameters as they are, for :meth:`moved` and :meth:`unchanged`."""
        aliases = [shard.tensor for shard in shards]
        self._watch = MemoryWatch(self._now(), aliases, frozen=self._is_frozen, local=local_tensor)

    def moved(self) -> bool:
        """Whether memory of the watched shards is elsewhere; cheap enough for every step."""
        return self._watch is None or self._watch.moved()

    def unchanged(self) -> bool:
        """Whether the watched shards are still what :meth:`shards` would return."""
        return self._watch is not None and self._watch.matches(self._now())

    def _now(self) -> list[Sequence[Tensor]]:
        """The parameters of each param group without names or checks, frozen ones too."""
        if self._zero is not None:
            return [deepspeed.zero_tensors(self._zero)]
        if self._optimizer is not None:
            return [group["params"] for group in self._optimizer.param_groups]
        every = [parameter for _, parameter in self._all()]
        return [every, *(group["params"] for group in self._groups())]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zero": None, "_watch": None}

    def _trainable(self) -> list[Named]:
        is_frozen = self._is_frozen
        return [(name, p) for name, p in self._all() if not is_frozen(p)]

    def _all(self) -> list[Named]:
        if self._optimizer is not None:
            return _named(self._optimizer.param_groups)
        return self._fixed if self._read is None else _named(self._read())

    def _groups(self) -> list[dict[str, Any]]:
        if self._optimizer is not None:
            return list(self._optimizer.param_groups)
        return self._fixed_groups if self._read is None else _dicts(self._read())

    def _group_of(self) -> dict[int, int]:
        """Index of the param group by ``id`` of the parameter."""
        groups = enumerate(self._groups())
        return {id(p): g for g, group in groups for p in reversed(group["params"])}

    @property
    def _is_frozen(self) -> Callable[[Tensor], bool]:
        # No method: the compiled watch keeps it, and the garbage collector does not see through it.
        # A plain tensor given by hand, such as a master weight, need not require gradients.
        return _requires_no_gradient if self._optimizer is not None else _is_frozen_parameter


def _requires_no_gradient(tensor: Tensor) -> bool:
    return not tensor.requires_grad


def _is_frozen_parameter(tensor: Tensor) -> bool:
    return not tensor.requires_grad and isinstance(tensor, nn.Parameter)


def _dicts(params: Iterable[Any]) -> list[dict[str, Any]]:
    return [item for item in params if isinstance(item, dict)]


def _named(params: Any) -> list[Named]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params: expected an iterable of tensors, of (name, tensor) pairs or of param groups, "
            f"got {type(params).__name__}"
        )
    named: list[Named] = []
    for i, item in enumerate(params):
        if isinstance(item, Tensor):
            named.append((f"params[{i}]", item))
        elif isinstance(item, dict) and "params" in item:
            named.extend(_named_group(i, item))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            named.append((str(item[0]), item[1]))
        else:
            raise TypeError(
                f"params[{i}]: expected a tensor, a (name, tensor) pair or a param group, "
                f"got {type(item).__name__}"
            )
    return _unique(named)


def _unique(named: Sequence[Named]) -> list[Named]:
    """The same with a number behind names that other tensors have already: ``weight (2)``."""
    owner: dict[str, Tensor] = {}
    result = []
    for name, tensor in named:
        unique, number = name, 1
        while owner.setdefault(unique, tensor) is not tensor:
            number += 1
            unique = f"{name} ({number})"
        result.append((unique, tensor))
    return result


def _named_group(g: int, group: dict[str, Any]) -> list[Named]:
    tensors: Sequence[Tensor] = group["params"]
    names = group.get("param_names")  # torch fills it for optimizers made of named parameters
    if names is None:
        names = [f"param_groups[{g}]['params'][{i}]" for i in range(len(tensors))]
    return list(zip(names, tensors, strict=True))


def _check_trackable(name: str, parameter: Tensor) -> None:
    problem = None
    parameter = local_tensor(parameter)
    if parameter.layout != torch.strided:
        problem = f"layout {parameter.layout}"
    elif parameter.is_quantized or parameter.dtype not in _TRACKED_DTYPES:
        problem = f"dtype {parameter.dtype}"
    elif parameter.numel() and not parameter.is_meta and parameter.data_ptr() == 0:
        # Address 0 of something that has elements: a wrapper, such as torchao's tensors.
        problem = f"a {type(parameter).__name__} without memory of its own"
    if problem is not None:
        raise TypeError(
            f"{name}: expected a dense floating-point or complex parameter, got {problem}; "
            "freeze it (requires_grad=False) or pass the tensors to watch as params="
        )
