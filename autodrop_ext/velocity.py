"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from . import rounding
from .arenas import Arenas, Form
from .backends import Sums, check_name, select
from .distributed import (
    Agreement,
    DisagreementError,
    Holding,
    Ranks,
    Row,
    agree,
    check_group,
    find_ranks,
)
from .faults import Faults
from .meter_state import ArenaState, SavedArenas, problem_of
from .parameters import ParameterSource, signature
from .plan import Plan
from .reading import Reading, angle_of

HISTORY = 10_000
"""Readings that a meter or scheduler keeps."""

CONVERT_TO_DELTA = 0.01  # degrees of rounding error in sum form
CONVERT_TO_SUM = 0.005  # half of it, so that the form does not swing from window to window

WINDOWS_FOR_ANGLE = 3  # two displacements need three means


class AngularVelocity:
    """Angle between the displacements of neighbouring windows (UAI 2024, Definition 3.3).

    A window holds the parameters after ``window`` optimizer steps, ``m_i`` is their mean,
    ``s_i = m_i - m_{i-1}`` its displacement, and the angular velocity is the angle between ``s_i``
    and ``s_{i-1}`` in degrees. Call :meth:`observe` once after each optimizer step.

    The meter keeps 12 bytes per parameter on the parameter's device and reads every parameter once
    a step. It starts in delta form, which resolves any step size, and turns to the cheaper sum form
    once the rounding error of that form is known to be small, and back if it grows.

    Where ``torch.distributed`` is initialised, every rank measures what lies on it (DDP, FSDP,
    tensor parallel, pipelines, ZeRO), and one ``all_gather`` of 128 bytes a rank at the end of each
    window gives all of them the same reading; see ``docs/distributed.md``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window. Frozen
            parameters are not watched, tied ones count once.
        window: ``k``, optimizer steps per window, at least 1.
        sample: None; reading a random part of the parameters is not in this version.
        seed: of the sample.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: the ranks that train the model together: None for all there are, a process
            group, a ``DeviceMesh``, or :class:`~autodrop_ext.distributed.PipelineStages`.
        form: "auto", or "sum" or "delta" to hold the sums in one form.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        steps: optimizer steps observed.
        windows: windows closed.
        history: the last 10,000 readings.
    """

    def __init__(
        self,
        params: Any,
        window: int = 64,
        *,
        sample: float | None = None,
        seed: int = 0,
        backend: str = "auto",
        process_group: Any = None,
        form: Literal["auto", "sum", "delta"] = "auto",
    ) -> None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"window: expected an int, got {window!r}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 optimizer step, got {window}")
        if form not in ("auto", "sum", "delta"):
            raise ValueError(f"form: expected 'auto', 'sum' or 'delta', got {form!r}")
        if sample is not None:
            raise NotImplementedError(
                f"sample: expected None (this version reads every parameter), got {sample!r}"
            )
        check_group(process_group)
        check_name(backend)
        self.window = window
        self.steps = 0
        self.windows = 0
        self.history: list[Reading] = []
        self._source = ParameterSource(params)
        self._source.check()  # wrong arguments fail here, not at the first step
        self._backend = backend
        self._process_group = process_group
        self._ranks: Ranks | None = None
        self._holding: Holding | None = None
        self._calls = 0
        self._fixed_form: Form | None = None if form == "auto" else form
        self._form: Form = self._fixed_form or "delta"
        self._arenas: list[Arenas] | None = None
        self._signature: list[list[Any]] = []
        self._restore: SavedArenas | None = None
        self._resharded: SavedArenas | None = None
        self._faults = Faults()
        self._fresh = True
        self._forget()

    # ---- observing --------------------------------------------------------------------------

    def observe(self, *, calls: int = 0) -> Reading | None:
        """Take the parameters as they are now; call once after each optimizer step, on every rank.

        Args:
            calls: how often the training loop came by, optimizer step or not; compared between
                ranks, so that one that skipped a step is told.

        Returns:
            A reading at the end of every window from the third on, otherwise None. Equal on all
            ranks.

        Raises:
            ValueError: there is nothing to watch, or parameters partly overlap in memory.
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: no memory for the arenas; a rank is dead or late.
        """
        self._calls = calls
        if self._position == 0 or self._arenas is None:
            self._follow_parameters()
        if self._fresh:
            self._form = self._fixed_form or "delta"
        for arenas in self._arenas or ():
            if self._fresh:
                arenas.begin(self._form)
            else:
                arenas.accumulate(first=self._position == 0)
        self._fresh = False
        self.steps += 1
        self._position += 1
        return self._close_window() if self._position == self.window else None

    def rebase(self) -> None:
        """Measure the next displacement from the parameters as they are now.

        For parameters that were set by hand at a window's end (2021, Algorithm 1: averaging): the
        jump is no displacement. The last displacement, which the next angle needs, stays. In a
        meter that has not :attr:`started`, the parameters stand for a first window's mean.

        Raises:
            RuntimeError: the meter was not made with ``form="delta"``, or a window is open.
        """
        if self._fixed_form != "delta":
            raise RuntimeError(
                "rebase: expected a meter with form='delta' (sums of earlier windows cannot be "
                f"moved), got form={self._fixed_form or 'auto'!r}"
            )
        if self._position != 0:
            raise RuntimeError(
                f"rebase: expected a call at a window's end, got one after {self._position} of "
                f"{self.window} steps"
            )
        self._follow_parameters()
        if self._fresh:
            for arenas in self._arenas or ():
                arenas.begin("delta")
            self._fresh = False
            self._usable = 1
            self.windows += 1
        for arenas in self._arenas or ():
            arenas.rebase(self.window)

    def close(self) -> None:
        """Free the arenas. A later :meth:`observe` starts over."""
        self._arenas = None
        self._forget()

    @property
    def started(self) -> bool:
        """Whether there is something that the next displacement is measured from."""
        return not self._fresh

    @property
    def form(self) -> Form | None:
        """How the sums are held now: "sum" or "delta"; None before the first step."""
        return None if self._arenas is None else self._form

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas on all devices together; 0 before the first step."""
        return sum(12 * arenas.plan.arena_elements for arenas in self._arenas or ())

    # ---- following the parameters -----------------------------------------------------------

    def _follow_parameters(self) -> None:
        """Build the plans, or rebuild them if the parameters are not those they were made of."""
        if self._arenas is not None:
            if signature(self._source.tensors()) == self._signature:
                return
            self._discard()
        self._build()
        self._signature = signature(self._source.tensors())

    def _discard(self) -> None:
        self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
        self._arenas = None
        self._forget()

    def _forget(self) -> None:
        """Start over with the next step; the counts of steps and windows go on."""
        self._position = 0
        self._fresh = True
        self._usable = 0  # windows since the start over
        self._variances = (0.0, 0.0)  # of the means before and at the last close
        self._faults.still_windows = 0

    def _build(self) -> None:
        shards = self._source.shards()
        self._ranks = find_ranks(self._process_group, shards)
        if not shards and self._ranks is None and self.steps == 0:
            raise ValueError(
                "params: expected at least one trainable parameter, got none "
                "(is requires_grad False everywhere?)"
            )
        by_device: dict[torch.device, list[int]] = {}
        for i, shard in enumerate(shards):
            if shard.tensor.is_meta:
                raise TypeError(
                    f"{shard.name}: expected a parameter with data, got one on device 'meta'"
                )
            by_device.setdefault(shard.tensor.device, []).append(i)
        self._arenas = []
        kept = []
        for device, members in by_device.items():
            plan = Plan(
                [(shards[i].name, shards[i].tensor) for i in members],
                device,
                [1.0 if self._ranks is None else self._ranks.weight(shards[i]) for i in members],
            )
            self._arenas.append(Arenas(plan, select(self._backend, device.type)))
            kept.append([shards[members[segment.index]] for segment in plan.segments])
        self._holding = Holding(kept, self._ranks)
        if self._restore is not None:
            self._load_arenas(self._restore)
            self._restore = None
        self._resharded = None

    # ---- closing a window -------------------------------------------------------------------

    def _close_window(self) -> Reading | None:
        """Nothing on the way to the collective may return or raise on one rank alone."""
        changed = signature(self._source.tensors()) != self._signature
        local = Sums(0.0, 0.0, 0.0, 0.0)
        for arenas in self._arenas or ():
            local += arenas.close(self.window)
        usable = self._usable + 1
        self._position = 0
        total = self._agree(local, -1 if changed else usable)
        if changed:
            self._discard()
            return None
        if total.start_over:
            self._forget()
            return None
        self.windows += 1
        sums = Sums(*total.sums)
        if total.not_finite:
            self._faults.not_finite(
                self._arenas or (),
                self.windows - 1,
                WINDOWS_FOR_ANGLE,
                self._ranks,
                total.not_finite,
            )
            self._forget()
            return self._keep(self._undefined())
        self._usable = usable
        if self._usable >= 2:
            self._faults.watch_displacement(sums, self._arenas or ())

        oldest, shared = self._variances
        newest = rounding.mean_variance(self.window, sums, self.form or "delta")
        self._variances = (shared, newest)
        if self._usable < WINDOWS_FOR_ANGLE:
            return self._keep(self._undefined())
        error = rounding.angle_error(sums, (oldest, shared, newest), total.elements)
        self._choose_form(sums, error, total.elements)
        return self._keep(self._reading(sums, error))

    def _agree(self, sums: Sums, usable: int) -> Agreement:
        """The sums of all ranks together."""
        assert self._holding is not None
        if self._ranks is None:
            bad = [] if all(map(math.isfinite, sums)) else [0]
            return Agreement(sums, self._holding.elements, usable < 0, bad)
        row = Row(
            steps=self.steps,
            windows=self.windows,
            window=self.window,
            calls=self._calls,
            usable=usable,
            layout=self._holding.layout,
            held=self._holding.held,
            stage=self._ranks.stage,
            num_stages=self._ranks.num_stages,
            elements=self._holding.elements,
            model_elements=self._holding.model_elements,
            replicated=self._holding.replicated([a.per_tensor for a in self._arenas or ()]),
            **sums._asdict(),
        )
        try:
            return agree([Row(*values) for values in self._ranks.gather(row)])
        except RuntimeError as error:
            self._forget()
            if isinstance(error, DisagreementError):
                raise
            raise RuntimeError(
                f"AngularVelocity: window {self.windows} ended on rank {self._ranks.rank} after "
                f"{self.steps} optimizer steps, but its sums could not be exchanged with the other "
                f"{self._ranks.size - 1} ranks: one of them is dead, late, or counts fewer steps; "
                "no learning rate was changed"
            ) from error

    def _reading(self, sums: Sums, rounding_error: float) -> Reading:
        measured = angle_of(sums.dot, sums.norm, sums.previous_norm)
        angle, cosine = (None, None) if measured is None else measured
        return Reading(
            step=self.steps,
            window=self.windows - 1,
            angle=angle,
            cosine=cosine,
            norm=math.sqrt(sums.norm),
            previous_norm=math.sqrt(sums.previous_norm),
            rounding_error=rounding_error,
        )

    def _undefined(self) -> Reading:
        return Reading(self.steps, self.windows - 1, None, None, math.nan, math.nan)

    def _keep(self, reading: Reading) -> Reading | None:
        if self.windows < WINDOWS_FOR_ANGLE:
            return None
        self.history.append(reading)
        del self.history[:-HISTORY]
        return reading

    def _choose_form(self, sums: Sums, rounding_error: float, elements: float) -> None:
        """Turn to the form that the next windows need, without losing one."""
        if self._fixed_form is not None:
            return
        if self._form == "sum":
            if rounding_error > CONVERT_TO_DELTA:
                self._form = "delta"
                for arenas in self._arenas or ():
                    arenas.to_delta(self.window)
            return
        in_sum_form = rounding.mean_variance(self.window, sums, "sum")
        variances = (in_sum_form, in_sum_form, in_sum_form)
        if rounding.angle_error(sums, variances, elements) < CONVERT_TO_SUM:
            self._form = "sum"
            for arenas in self._arenas or ():
                arenas.to_sum(self.window)
            # Rounding the two sums once is the error of a window of one step.
            rounded = rounding.mean_variance(1, sums, "sum")
            self._variances = tuple(max(v, rounded) for v in self._variances)  # type: ignore[assignment]

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts, form and, as CPU clones by parameter name, the arenas (12 bytes a parameter).

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. The
        history is not part of it. Of sharded parameters the arenas are not either, because the
        other ranks' parts would be missing: save :attr:`arena_state` too.
        """
        return {
            "version": 1,
            "window": self.window,
            "steps": self.steps,
            "windows": self.windows,
            "position": self._position,
            "usable": self._usable,
            "fresh": self._fresh,
            "still": self._faults.still_windows,
            "variances": list(self._variances),
            "form": self.form if self._restore is None else self._restore.form,
            "arenas": self._named_arenas(),
        }

    def _named_arenas(self) -> dict[str, Any]:
        if self._restore is not None:
            return dict(self._restore.arenas)
        if self._holding is not None and self._holding.sharded:
            return {}
        return {name: a for arenas in self._arenas or () for name, a in arenas.named().items()}

    @property
    def arena_state(self) -> ArenaState:
        """The arenas for ``torch.distributed.checkpoint``: saved and loaded beside the state.

        They are DTensors like the parameters, so that another number of ranks can go on in the
        middle of a window.
        """
        return ArenaState(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit, with its window.

        Where the state has no arenas, or they do not fit the parameters, counts are restored, the
        meter warms up again, and a warning says so.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        problem = problem_of(state_dict)
        if problem is not None:
            raise ValueError(f"state_dict: expected a state of AngularVelocity, got {problem}")
        self._arenas = None
        self._restore = None
        self._forget()
        self.window = state_dict["window"]
        self.steps = state_dict["steps"]
        self.windows = state_dict["windows"]
        if state_dict["fresh"]:
            return
        self._restore = SavedArenas(state_dict["form"], self.steps, state_dict["arenas"])
        self._form = state_dict["form"]
        self._fresh = False
        self._position = state_dict["position"]
        self._usable = state_dict["usable"]
        self._faults.still_windows = state_dict["still"]
        before, last = state_dict["variances"]
        self._variances = (before, last)

    def _take_arenas(self, saved: SavedArenas) -> None:
        """Hold arenas that were loaded apart until the next step."""
        self._resharded = saved
        if self._arenas is not None:
            # The counts in this meter are older; the next step finds out whether they fit.
            self._restore = SavedArenas(self._form, self.steps, {})
            self._arenas = None

    def _load_arenas(self, saved: SavedArenas) -> None:
        """Fill new arenas with saved ones, or start over where they do not fit."""
        saved, problem = saved.completed(self._resharded)
        problem = problem or next(
            (p for a in self._arenas or () if (p := a.misfit(saved.arenas)) is not None), None
        )
        if problem is None:
            for arenas in self._arenas or ():
                arenas.load(saved.form, saved.arenas)
            return
        self._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
        position = self._position
        self._forget()
        if self._ranks is not None:
            # The other ranks may be able to go on: end the window with them, and say so then.
            self._position, self._usable = position, -2

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state |= {"_arenas": None, "_signature": [], "_holding": None, "_ranks": None}
        state |= {"_restore": self.state_dict(), "_resharded": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_restore")
        self.__dict__.update(state)
        self._restore = None
        self.load_state_dict(saved)
