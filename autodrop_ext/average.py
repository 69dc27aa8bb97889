"""Averages of parameters, and their swap in and out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import checks
from .saved import Form, dict_of, load
from .sharding import discard_gathered, is_cut, is_dtensor, is_flattened, local_tensor

Named = Sequence[tuple[str, Tensor]]

# Elements that are converted to the average's dtype at a time. On the CPU 4 MiB of float32, which
# the caches hold (1 MiB took 1.5 times as long on two cores, 64 MiB 5 times); on a GPU 64 MiB,
# because a launch takes as long as 10 million elements.
PIECE_ON_CPU, PIECE_ON_GPU = 1 << 20, 1 << 24

HELD = (
    "the parameters held their average: an interrupt had struck where the block of "
    "averaged_parameters() ends, or the call came from within a block, or a copy was made there; "
    "they have their own values again"
)


class ParameterAverage:
    """A running average ``a`` of parameters ``x``, moved towards them by ``a += c (x - a)``.

    :meth:`update` takes ``c = 1 - ((t - d) / t)**kappa``, with ``t`` optimizer steps since the
    start of the average and ``d`` of them since its last update: polynomial-decay averaging (Shamir
    and Zhang 2013, section 4) in a form that depends on the steps and not on the number of updates.
    Step ``s`` weighs about ``kappa s**(kappa - 1) / t**kappa``. :meth:`add` takes any ``c``.

    ``a`` has the shape, sharding and device of the parameters, in float32, or in their own dtype if
    that is float64 or complex: 4 bytes for each float32 or half-precision parameter, and nothing
    else between two calls. Half-precision parameters are converted in pieces of at most 64 MiB.

    In float32 an update with a small ``c`` is lost where ``c |x - a|`` is below half a unit in the
    last place of ``a``. If ``d`` is at least ``t / 512``, ``c`` is about 1/64 at least.

    Parameters that are not finite are left out. On a GPU the host waits at each update for the one
    bool that says so; a weight of 0 on the device would not keep a NaN out. Ranks decide this by
    themselves, without communication.

    Args:
        named: returns names, all different, and parameters as the optimizer has them (DTensors, not
            their local parts). It is called at every use. A bound method lets copies of this object
            find the parameters of a copied model.
        kappa: above 0; larger values forget faster.

    Attributes:
        steps: ``t`` at the last update.
        updates: snapshots in the average; 0 if there is none.
    """

    def __init__(self, named: Callable[[], Named], kappa: float = 8.0) -> None:
        if not callable(named):
            raise TypeError(f"named: expected a function, got {named!r}")
        self._named = named
        self.kappa = checks.number("kappa", kappa)
        self._own: list[tuple[Tensor, Tensor]] | None = None  # of parameters that are averaged now
        self.reset()

    def reset(self) -> None:
        """Forget the average and free its memory."""
        self.steps = self.updates = 0
        self._tensors: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}  # of the last update; some may be frozen since

    # ---- averaging --------------------------------------------------------------------------

    def update(self, steps: int = 1, *, known_finite: bool = False) -> str | None:
        """Take the parameters as they are now.

        Args:
            steps: ``d``, optimizer steps since the last update or, before the first one, since the
                start. Those before parameters that are not finite do not count.
            known_finite: whether all parameters are known to be finite, and need not be looked at.

        Returns:
            Why the average started over or why the parameters were left out, for a warning; None if
            neither happened.

        Raises:
            RuntimeError: no memory for the average.
        """
        checks.count("steps", steps, 1)
        named, problem = self._follow()
        t = self.steps + steps
        share = 1 - (self.steps / t) ** self.kappa
        not_finite = self._move(named, share, known_finite=known_finite)
        if not_finite is None:
            self.steps = t
        return not_finite or problem

    def add(self, share: float) -> str | None:
        """Take the parameters as they are now, with any ``c``.

        Args:
            share: ``c``, in (0, 1]; ``w_n / (w_1 + ... + w_n)`` gives the mean with the weights
                ``w``. The first snapshot counts as one with a share of 1.

        Returns:
            As :meth:`update`, which also gives the errors.
        """
        checks.number("share", share, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        named, problem = self._follow()
        return self._move(named, share) or problem

    def write_back(self) -> bool:
        """Set the parameters to their average for good, and start over.

        Returns:
            True if it was done, False if there is no average of the present parameters.
        """
        named, _ = self._follow()
        averages = self._tensors if self.updates else None
        self.reset()  # first: after an interrupt the parameters are whole, and not averaged twice
        if averages is None:
            return False
        _discard_gathered()
        _write((p, local_tensor(averages[name])) for name, p in named)
        return True

    def _follow(self) -> tuple[Named, str | None]:
        """Return the present parameters, and why an average of others was given up for them."""
        problem = HELD if self.restore() else None
        named = self._named()
        misfit = _misfit(named, self._tensors)
        if misfit is not None:
            if self.updates:
                problem = f"{misfit}; the average starts over"
            self.reset()
            self._tensors = _zeros(named)
        for name, p in named:
            if self._tensors[name].device != p.device:
                self._tensors[name] = self._tensors[name].to(p.device)
        self._parameters = dict(named)
        return named, problem

    @torch.no_grad()
    def _move(self, named: Named, share: float, *, known_finite: bool = False) -> str | None:
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for name, p in named:
            x = local_tensor(p)
            if x.numel():
                pair = (local_tensor(self._tensors[name]), x)
                groups.setdefault((x.device, x.dtype), []).append(pair)
        finite = (_are_finite([x for _, x in pairs]) for pairs in groups.values())
        if not (known_finite or all(finite)):
            name = next(n for n, p in named if not _are_finite([local_tensor(p)]))
            return f"{name} is not finite; the average leaves these parameters out"
        for pairs in groups.values():
            if share == 1 or not self.updates:
                torch._foreach_copy_([a for a, _ in pairs], [x for _, x in pairs])
            else:
                _lerp(pairs, share)
        self.updates += 1
        return None

    # ---- swapping ---------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Return why the parameters cannot hold their average, or None."""
        if not self.updates:
            return "there is none yet"
        return _misfit(list(self._present().items()), self._tensors)

    def _present(self) -> dict[str, Tensor]:
        return {**self._parameters, **dict(self._named())}  # also those that were frozen since

    @contextlib.contextmanager
    def swapped(self) -> Iterator[bool]:
        """Within the block the parameters hold their average.

        Afterwards they have their own bits again, also after an exception. They have them before if
        another method of this object is called within the block, because an interrupt may have
        struck where a block ends, and then the block is over without its end. Within the block
        there is a copy of the parameters. Statistics of batch normalisation belong to the
        parameters of the last step: measure them again within the block with
        ``torch.optim.swa_utils.update_bn(loader, model)``, and keep copies of them if training goes
        on. On several ranks all have to enter and leave the block.

        Yields:
            True if the parameters hold the average, False if there is none of these parameters.
        """
        self.restore()
        if self.problem() is not None:
            yield False
            return
        try:
            try:
                self._swap_in(self._present())
                yield True
            finally:
                self.restore()
        finally:
            self.restore()  # an interrupt may have cut the first one short

    def _swap_in(self, parameters: Mapping[str, Tensor]) -> None:
        _discard_gathered()
        with torch.inference_mode(False), torch.no_grad():
            own = [(p, local_tensor(p).clone()) for p in parameters.values()]
        self._own = own
        _write((p, local_tensor(self._tensors[name])) for name, p in parameters.items())

    @property
    def is_swapped_in(self) -> bool:
        """Whether the parameters hold the average."""
        return self._own is not None

    def restore(self) -> bool:
        """Give the parameters their own bits back, and return whether they held the average.

        Every other method does it first.
        """
        if self._own is None:
            return False
        _discard_gathered()
        _write(self._own)
        self._own = None
        return True

    def __getstate__(self) -> dict[str, Any]:
        # A copy that was made within a block gives its parameters their own bits at its first use.
        return {**self.__dict__, "_parameters": {}}

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return ``steps``, ``updates`` and ``tensors``: the average itself by name, no copies.

        The average of a DTensor is a DTensor, so that ``torch.distributed.checkpoint`` saves and
        loads it in place, also with another number of ranks; for this, ``tensors`` holds zeros
        before the first update. A file of one rank alone has that rank's part only, and no rank
        goes on with it. Parameters that FSDP1 has flattened are left out, because other
        ranks' parts would be missing.
        """
        self.restore()
        named = self._named()
        if not self.updates and _misfit(named, self._tensors) is not None:
            self._tensors = _zeros(named)
        flat = {name for name, p in named if is_flattened(p)}
        tensors = {name: a for name, a in self._tensors.items() if name not in flat}
        return {"steps": self.steps, "updates": self.updates, "tensors": tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> str | None:
        """Continue where :meth:`state_dict` was taken, bit for bit.

        Returns:
            Why the saved average cannot be continued with the present parameters, so that it starts
            over; None if it is continued.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has
                changed.
        """
        return self.restore_state(checked_average("state_dict", state_dict))

    def restore_state(self, saved: Mapping[str, Any]) -> str | None:
        """Continue a state that :func:`checked_average` has returned.

        Returns:
            As :meth:`load_state_dict`.
        """
        steps, updates, tensors = saved["steps"], saved["updates"], saved["tensors"]
        self.restore()
        if not updates:
            self.reset()
            return None
        named = self._named()
        misfit = _misfit(named, tensors) or self._part_of(tensors)
        if misfit is not None:
            self.reset()
            return f"{misfit}; the average starts over"
        if _misfit(named, self._tensors) is not None:
            self._tensors = _zeros(named)
        self.steps = self.updates = 0  # an interrupt leaves no average rather than a mixed one
        _write((self._tensors[name], local_tensor(a)) for name, a in tensors.items())
        self.steps, self.updates = steps, updates
        return None

    def _part_of(self, tensors: Mapping[str, Any]) -> str | None:
        """Return which saved tensor may be the part of another rank, or None.

        Whose part it is cannot be seen, and ranks that judge for themselves would go on with
        different averages. ``torch.distributed.checkpoint`` loads into the tensors that are here.
        """
        for name, a in tensors.items():
            if is_cut(a) and a is not self._tensors.get(name):
                return f"what was saved of {name} is one rank's part of it"
        return None


def _zeros(named: Named) -> dict[str, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        shaped = [(name, p) for name, p in named if not is_lazy(p)]
        tensors = {name: torch.zeros_like(p, dtype=_dtype_of(p)) for name, p in shaped}
    if len(tensors) < len(shaped):
        raise ValueError(f"named: expected different names, got {[name for name, _ in named]}")
    return tensors


def _dtype_of(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's average."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _misfit(named: Named, averages: Mapping[str, Tensor]) -> str | None:
    """Return why these are not the averages of these parameters, or None."""
    for name, p in named:
        if is_lazy(p):
            return f"{name} has no shape before the first forward pass"
        if name not in averages:
            return f"{name} has no average"
        a = averages[name]
        if a.shape != p.shape:
            return f"{name} was {tuple(a.shape)}, now it is {tuple(p.shape)}"
        if a.dtype != _dtype_of(p):
            return f"{name} was averaged in {a.dtype}, now it is {p.dtype}"
        if _sharding_of(a) != _sharding_of(p):
            return f"{name} was sharded as {_sharding_of(a)}, now as {_sharding_of(p)}"
    if len(averages) > len(named):
        gone = next(name for name in averages if name not in dict(named))
        return f"{gone} is no longer among the parameters"
    return None


def _sharding_of(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _check_average(name: str, value: Any) -> Tensor:
    tensor: Tensor = value
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not dense or value.dtype != _dtype_of(value):
        raise ValueError(
            f"{name}: expected a dense tensor of float32, float64 or a complex type, got {value!r}"
        )
    if not _are_finite([local_tensor(tensor)]):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return tensor


_FORM: Form = {
    "steps": checks.at_least(0),
    "updates": checks.at_least(0),
    "tensors": dict_of(_check_average),
}


def checked_average(name: str, value: Any) -> dict[str, Any]:
    """Return a saved average, checked; raises ValueError, which names the entry.

    Averages of the first version, whose tensors had other names, are taken for none.
    """
    if isinstance(value, Mapping) and "snapshots" in value:
        return {"steps": 0, "updates": 0, "tensors": {}}
    return load(value, _FORM, name)


@torch.no_grad()
def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return True if all tensors of one device are finite; the host waits for the device."""
    real = [_as_real(t) for t in tensors if t.numel()]
    if not real:
        return True
    if real[0].is_cpu:  # there the norm takes 15 times as long
        extremes = [extreme for t in real for extreme in torch.aminmax(t)]
    else:
        extremes = list(torch._foreach_norm(real, math.inf))
    return bool(torch.stack(extremes).isfinite().all())


def _as_real(tensor: Tensor) -> Tensor:
    if tensor.is_conj():
        tensor = tensor.conj()  # no copy, unlike resolve_conj()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _lerp(pairs: list[tuple[Tensor, Tensor]], share: float) -> None:
    """Move averages by ``share`` towards parameters, all of one device and one dtype."""
    average, parameter = pairs[0]
    convert = average.dtype != parameter.dtype
    limit = PIECE_ON_CPU if average.is_cpu else PIECE_ON_GPU
    for batch in _batches(pairs, limit) if convert else [pairs]:
        averages, parameters = [a for a, _ in batch], [x for _, x in batch]
        if convert:
            given, parameters = parameters, [torch.empty_like(a) for a in averages]
            torch._foreach_copy_(parameters, given)
        torch._foreach_lerp_(averages, parameters, share)


def _batches(
    pairs: Iterable[tuple[Tensor, Tensor]], limit: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Group pairs up to ``limit`` elements; larger ones are cut along their longest side."""
    batch: list[tuple[Tensor, Tensor]] = []
    room = limit
    for average, parameter in pairs:
        n, shape = average.numel(), average.shape
        side = max(range(len(shape)), key=shape.__getitem__, default=0)
        rows = max(1, shape[side] * limit // n) if n > limit else 0
        cut = (torch.split(t, rows, side) if rows else [t] for t in (average, parameter))
        for a, x in zip(*cut, strict=True):
            if batch and a.numel() > room:
                yield batch
                batch, room = [], limit
            batch.append((a, x))
            room -= a.numel()
    yield batch


def _write(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy local values into tensors, in one operation that no interrupt divides.

    Tensors that were given another shape since are left out.
    """
    written = [(p, local_tensor(p), value) for p, value in pairs]
    written = [(p, local, value) for p, local, value in written if local.shape == value.shape]
    if not written:
        return
    tensors, locals_, values = map(list, zip(*written, strict=True))
    with torch.inference_mode():  # there, inference tensors can be written to, and others too
        torch._foreach_copy_(locals_, values)
    for tensor, local in zip(tensors, locals_, strict=True):
        if tensor is not local and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # of the DTensor around it


def _discard_gathered() -> None:
    if dist.is_available() and dist.is_initialized():  # without ranks there is no FSDP
        discard_gathered()
