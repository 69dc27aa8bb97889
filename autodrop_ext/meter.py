"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from . import angle, checks
from .averaging import own_bits_after
from .distributed.checkpoint import ArenaState, SavedSums, read_meter
from .distributed.exchange import Counts, Exchange, Facts
from .distributed.gathered import discard_gathered
from .distributed.group import check_group, find_group
from .distributed.layout import Layout, elements_here
from .distributed.shards import LocalShard
from .faults import Faults
from .messages import Warnings
from .ops import check_name
from .ops.device_sums import NamedArenas
from .ops.interface import Form, Sums
from .ops.memory import as_real, no_garbage_collection
from .ops.window_sums import EVERYTHING, Extra, Watched, WindowSums, fields_of, on_cpu
from .parameters import ParameterSource
from .parts import Parts
from .reading import HISTORY, Reading, remember
from .sampling.sums import sums_of
from .settings import METER, check_arguments
from .windows import Windows

WINDOWS_FOR_ANGLE = 3  # two displacements need three means


class AngularVelocity:
    """Angle between the displacements of neighbouring windows (UAI 2024, Definition 3.3).

    A window holds the parameters after ``window`` optimizer steps, ``m_i`` is their mean,
    ``s_i = m_i - m_{i-1}`` its displacement, and the angular velocity is the angle between ``s_i``
    and ``s_{i-1}`` in degrees. Call :meth:`observe` once after each optimizer step.

    The meter keeps 12 bytes per parameter on the parameter's device and reads every parameter once
    a step. ``snapshots=`` reads them less often. ``sample=`` reads only a random part of them, and
    every reading comes with its standard error (``docs/scaling.md``). The meter starts in delta
    form, which resolves any step size, and turns to the cheaper sum form once the rounding error of
    that form is known to be small, and back if it grows.

    Where ``torch.distributed`` is initialised, every rank measures its own part (DDP, FSDP, tensor
    parallel, pipelines, ZeRO), and one ``all_gather`` of 168 bytes a rank at the end of each window
    gives all of them the same reading; see ``docs/distributed.md``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window. Frozen
            parameters are not watched, tied ones count once.
        window: ``k``, optimizer steps per window, at least 1.
        sample: part of the parameters that is read, in (0, 1]: of every tensor a random choice of
            its chunks of 1,024 elements, at least two of them. A survey of at most 8 windows comes
            first. None or 1 for everything.
        seed: seed of the sample.
        snapshots: how many times a window the parameters are read, evenly spaced, the last time at
            the window's end; None for every step.
        per_tensor: whether readings have the angle of each parameter and of each param group.
        per_group: whether they have the angle of each param group.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: the ranks that train the model together: None for all there are, a process
            group, a ``DeviceMesh``, or :class:`~autodrop_ext.distributed.PipelineStages`.
        form: "auto", or "sum" or "delta" to hold the sums in one form.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        history: the last 10,000 readings.
        per_tensor, per_group: the arguments; a change counts from when plans are built next.
    """

    def __init__(
        self,
        params: Any,
        window: int = 64,
        *,
        sample: float | None = None,
        seed: int = 0,
        snapshots: int | None = None,
        per_tensor: bool = False,
        per_group: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        form: Literal["auto", "sum", "delta"] = "auto",
    ) -> None:
        settings = check_arguments(METER, locals())
        self._counter = Windows(settings["window"], settings["snapshots"])
        self.sample: float | None = settings["sample"]
        self.seed: int = settings["seed"]
        self.per_tensor: bool = settings["per_tensor"]
        self.per_group: bool = settings["per_group"]
        checks.one_of("form", form, ("auto", "sum", "delta"))
        check_group(process_group)
        check_name(backend)
        self.history: list[Reading] = []
        self._source = ParameterSource(params)
        self._source.check()  # wrong arguments fail here, not at the first step
        self._process_group = process_group
        self._precision = angle.Precision(None if form == "auto" else form)
        self._make_sums: Callable[..., WindowSums] = functools.partial(
            sums_of(self.sample, self.seed), backend=backend
        )
        self._faults = Faults()
        self._warns_by_itself = True
        self._exchange = Exchange(self._faults.warnings.owner)
        self._sums: WindowSums | None = None
        self._restore: SavedSums | None = None  # sums of a checkpoint, until the next step
        self._resharded: SavedSums | None = None  # the same, loaded through arena_state
        self._layout: Layout
        self._extras: list[Extra] = []
        self._observing = False  # stays True where an observation was interrupted
        self._averaging = False  # whether the parameters hold an average

    # ---- a window ---------------------------------------------------------------------------

    def observe(self, *, calls: int = 0, facts: Facts = dict) -> Reading | None:
        """Take the parameters as they are now; call once after each optimizer step, on every rank.

        Args:
            calls: calls of the scheduler's ``step()``, optimizer step or not; compared between
                ranks, so that a rank that skipped a step is noticed.
            facts: returns what decisions depend on, plain values by name; compared between ranks.

        Returns:
            A reading at the end of every window from the third on, otherwise None. Equal on all
            ranks.

        Raises:
            ValueError: there is nothing to watch, or parameters partly overlap in memory.
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: no memory for the sums; a rank is dead or late.
        """
        if self._averaging:
            raise RuntimeError("observe: expected parameters of a training step, got averaged ones")
        # A warning may be an error. It must not leave this half done, and must not keep one rank
        # from the collective.
        self._faults.warnings.hold()
        if self._observing:
            self._discard_interrupted()
        self._observing = True
        self._counter.steps += 1
        if self._counter.position == 1 or self._sums is None:
            self._begin_window()
        if not self._exchange.compared:
            self._exchange.compare_once(self._with_settings(facts))
        if self._counter.is_snapshot():
            self._take_snapshot()
        reading = (
            self._close_window(calls, facts)
            if self._counter.position >= self._counter.window
            else None
        )
        self._observing = False
        if self._warns_by_itself:
            self._faults.warnings.release()
        return reading

    def _begin_window(self) -> None:
        """Follow the parameters: build the sums, or build them again if the parameters changed."""
        if self._sums is not None and not self._source.unchanged():
            self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
            self._forget(self._counter.position)
        if self._sums is None:
            try:
                with no_garbage_collection():
                    self._build()
            except Exception:
                # Nothing was measured that would have to be discarded at the next step.
                self._start_over()
                self._observing = False
                raise
        elif not self._counter.spoiled:
            self._sums.begin_window()

    def _take_snapshot(self) -> None:
        assert self._sums is not None
        if not self._counter.spoiled and self._source.moved():
            self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
            self._counter.spoiled = True
        if not self._counter.spoiled:
            form = self._precision.form if self._sums.begun else self._precision.begin()
            self._sums.add(form, first=self._counter.taken == 0)
        self._counter.taken += 1

    def _close_window(self, calls: int, facts: Facts) -> Reading | None:
        """Nothing on the way to the collective may return or raise on one rank alone."""
        assert self._sums is not None
        self._counter.begin_close()
        changed = not self._source.unchanged()
        restart = changed or self._counter.spoiled
        totals = None if restart else self._sums.close(self._counter.snapshots_per_window)
        since = 0 if totals is None else self._counter.windows_since_restart + 1
        counts = Counts(
            self._counter.steps, self._counter.windows, self._counter.window, calls, since, restart
        )
        total, numbers = self._exchange.close(
            counts,
            self._layout,
            self._sums,
            totals or Sums(0.0, 0.0, 0.0, 0.0),
            [] if totals is None else self._extras,
            self._with_settings(facts),
        )
        self._counter.next_window()
        if changed:
            self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
            self._forget()
        if total.restart:
            self._start_over()
            return None
        self._counter.windows += 1
        if total.not_finite:
            self._faults.not_finite(
                self._sums,
                self._counter.windows - 1,
                WINDOWS_FOR_ANGLE,
                self._exchange.group,
                total.not_finite,
            )
            self._start_over()
            return self._keep(self._undefined())
        self._counter.windows_since_restart = since
        if since >= 2:
            self._faults.watch_displacement(total.sums, self._sums, first=since == 2)
        k, elements = self._counter.snapshots_per_window, (total.elements, total.effective_elements)
        error = self._precision.close(k, total.sums, *elements)
        if since < WINDOWS_FOR_ANGLE:
            return self._keep(self._undefined())
        form = self._precision.choose(k, total.sums, error, *elements)
        if form is not None:
            self._sums.convert(form, k)
        reading = self._reading(total.sums, error, numbers)
        self._faults.watch_certainty(reading)
        return self._keep(reading)

    def _reading(self, sums: Sums, rounding_error: float, numbers: list[float] | None) -> Reading:
        measured = angle.angle_of(sums.dot, sums.norm, sums.previous_norm)
        degrees, cosine = (None, None) if measured is None else measured
        return Reading(
            step=self._counter.steps,
            window=self._counter.windows - 1,
            angle=degrees,
            cosine=cosine,
            norm=math.sqrt(sums.norm),
            previous_norm=math.sqrt(sums.previous_norm),
            rounding_error=rounding_error,
            **fields_of(self._extras, sums, numbers),
        )

    def _undefined(self) -> Reading:
        unknown = fields_of(self._extras, None, None)
        return Reading(
            self._counter.steps,
            self._counter.windows - 1,
            None,
            None,
            math.nan,
            math.nan,
            **unknown,
        )

    def _keep(self, reading: Reading) -> Reading | None:
        if self._counter.windows < WINDOWS_FOR_ANGLE:
            return None
        remember(self.history, reading, HISTORY)
        return reading

    # ---- between windows --------------------------------------------------------------------

    def double_window(self) -> None:
        """Double the window: the last two windows become the last one of the new length.

        The mean that the next displacement is measured from is then the mean of both, and the next
        angle comes after two windows. Call it at a window's end.

        Raises:
            RuntimeError: a window is open, or two windows have not been closed since the meter
                started or started over.
        """
        if self._counter.position or self._sums is None or self._counter.windows_since_restart < 2:
            raise RuntimeError(
                "double_window: expected a call at a window's end, at least two windows after a "
                f"start, got one after {self._counter.position} of {self.window} steps and "
                f"{self.windows_since_restart} windows"
            )
        k = self._counter.snapshots_per_window
        self._observing = True  # where this is interrupted, the sums are discarded
        self._counter.double()
        self._sums.merge(k, self._counter.snapshots_per_window)
        self._precision.merged()
        self._observing = False

    @property
    def averaging(self) -> bool:
        """``True`` while the parameters hold an average, within :meth:`averaged`."""
        return self._averaging

    def rebase(self) -> None:
        """Measure the next displacement from the parameters as they are now.

        For parameters that were set by hand at a window's end (2021, Algorithm 1: averaging): the
        jump is no displacement. The last displacement, which the next angle needs, stays. In a
        meter that has not :attr:`started`, the parameters stand for a first window's mean.

        Raises:
            RuntimeError: the meter was not made with ``form="delta"``, or a window is open.
        """
        if self._precision.fixed != "delta":
            raise RuntimeError(
                "rebase: expected a meter with form='delta' (sums of earlier windows cannot be "
                f"moved), got form={self._precision.fixed or 'auto'!r}"
            )
        if self._counter.position:
            raise RuntimeError(
                "rebase: expected a call at a window's end, got one after "
                f"{self._counter.position} of {self.window} steps"
            )
        self._begin_window()
        assert self._sums is not None
        first = not self._sums.begun
        self._sums.rebase(self._counter.snapshots_per_window)
        if first:
            self._counter.windows_since_restart = 1
            self._counter.windows += 1

    @contextlib.contextmanager
    def averaged(self, windows: Literal["last", "all"] = "all") -> Iterator[None]:
        """Within the block the parameters hold a mean of window means; afterwards their own bits.

        Args:
            windows: "last" for the mean of the last whole window; "all" for that of both whole
                windows that the sums hold and the open one, weighted by their steps. Where there is
                no such window, the block changes nothing.

        Raises:
            RuntimeError: only a sample of the parameters is read.
        """
        if self.sample is not None:
            raise RuntimeError(
                f"averaged parameters: expected a meter that reads everything, got sample="
                f"{self.sample:g}, whose sums have no mean of the other parameters; use "
                "sample=None, or torch.optim.swa_utils.AveragedModel"
            )
        waiting = (self._restore, self._resharded)
        only_loaded = self._sums is None and self._restore is not None
        if only_loaded:
            self._build()  # a checkpoint's sums, before the first step
        weights = self._counter.mean_weights(last_only=windows == "last")
        uncertain = self._observing or self._counter.spoiled or not self._source.unchanged()
        if weights is None or uncertain or self._sums is None or self._averaging:
            yield
            return
        if only_loaded:
            # The first forward pass of FSDP may move shards: the first step builds again.
            sums, self._sums = self._sums, None
            self._restore, self._resharded = waiting
        else:
            sums = self._sums
        with self._discarding_gathered(), own_bits_after(sums.devices, self._moved_memory):
            self._averaging = True
            try:
                sums.write_mean(self._counter.snapshots_per_window, self._counter.taken, weights)
                yield
            finally:
                self._averaging = False

    @contextlib.contextmanager
    def _discarding_gathered(self) -> Iterator[None]:
        """Let engines gather parameters again within the block, and again after it."""
        if not self._layout.sharded:
            yield
            return
        discard_gathered()
        try:
            yield
        finally:
            discard_gathered()

    def _moved_memory(self) -> dict[str, Tensor]:
        """Memory of the parameters by name, where they are others than when sums were built."""
        if self._source.unchanged():
            return {}
        return {shard.name: as_real(shard.tensor) for shard in self._source.shards()}

    def close(self) -> None:
        """Free the sums. A later :meth:`observe` starts over."""
        self._sums = None
        self._start_over()

    # ---- starting over ----------------------------------------------------------------------

    def _start_over(self, position: int = 0) -> None:
        """Forget the sums; the counts of steps and windows go on.

        Args:
            position: steps of the open window that have been observed.
        """
        self._counter.start_over(position)
        self._precision.start_over()
        self._faults.still_windows = 0
        if self._sums is not None:
            self._sums.reset()

    def _forget(self, position: int = 0) -> None:
        """Forget sums of parameters that are watched no longer."""
        self._sums = None
        self._start_over(position)

    def discard(self) -> None:
        """Discard the open window: the loop that calls :meth:`observe` may have lost a step.

        Call it after an interrupt between an optimizer step and :meth:`observe`, or inside of it.
        """
        self._discard_interrupted()
        if self._warns_by_itself:
            self._faults.warnings.release()

    def _discard_interrupted(self) -> None:
        if self._counter.discard():
            self._start_over()
        self._observing = False
        self._faults.interrupted(WINDOWS_FOR_ANGLE)

    # ---- building ---------------------------------------------------------------------------

    def _build(self) -> None:
        shards = self._find_group()
        group = self._exchange.group
        if not shards and group.size == 1 and self._counter.steps <= 1:
            raise ValueError(
                "params: expected at least one trainable parameter, got none "
                "(is requires_grad False everywhere?)"
            )
        if self.per_tensor and group.num_stages > 1:
            raise ValueError(
                "per_tensor: expected a model that is not cut into pipeline stages, whose ranks "
                f"hold different parameters, got {group.num_stages} stages"
            )
        watched = [
            Watched(
                shard.name,
                shard.tensor,
                group.weight(shard),
                f"{shard.name}|{shard.layout}|{shard.part}",
                elements_here(shard, group),
            )
            for shard in shards
        ]
        saved = self._restore
        sums: WindowSums = self._make_sums(watched, drawn=None if saved is None else saved.drawn)
        self._layout = Layout([[shards[i] for i in kept] for kept in sums.kept], group)
        self._extras = self._make_extras(sums)
        self._source.watch(shards)
        if saved is not None:
            self._continue(saved, sums)
        if self._counter.position == 1 and not self._counter.spoiled:
            sums.begin_window()
        # Last, so that an interrupt before it leaves everything to be built again.
        self._sums = sums
        self._restore = self._resharded = None

    def _find_group(self) -> list[LocalShard]:
        """What is on this rank; the ranks that decide together are known then."""
        shards = self._source.shards()
        self._exchange.group = find_group(self._process_group, shards)
        return shards

    def _make_extras(self, sums: WindowSums) -> list[Extra]:
        extras = sums.extras()
        if self.per_tensor or self.per_group:
            names = [shard.name for shard in self._layout.shards]
            group_of = [shard.group for shard in self._layout.shards]
            groups = self._source.num_groups()
            extras.append(Parts(names, group_of, groups, per_tensor=self.per_tensor))
        return extras

    def _continue(self, saved: SavedSums, sums: WindowSums) -> None:
        """Fill new sums with saved ones, or start over where they do not fit."""
        saved, problem = saved.completed(self._resharded)
        problem = problem or sums.problem_of(saved.drawn, saved.arenas)
        if problem is None:
            sums.load(saved.form, saved.arenas)
            return
        self._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
        if self._exchange.group.size == 1:
            self._start_over(position=min(self._counter.position, 1))
        else:
            # The other ranks may be able to go on: end the window with them, and say so then.
            self._start_over(self._counter.position)
            self._counter.spoiled = True

    def compare(self, facts: Facts = dict) -> None:
        """Compare settings between the ranks, once; :meth:`observe` does it where nobody has.

        Call it where all ranks are at the same place. Ranks with different windows would otherwise
        wait for each other.

        Args:
            facts: as in :meth:`observe`.

        Raises:
            DisagreementError: ranks have different settings; the message names the first of them,
                the ranks and their values. Raised on all ranks alike.
        """
        if self._exchange.compared:
            return
        if self._sums is None:
            self._find_group()
        self._exchange.compare_once(self._with_settings(facts))

    def _with_settings(self, facts: Facts) -> Facts:
        return lambda: {**self._settings(), **facts()}

    def _settings(self) -> dict[str, Any]:
        """Return what readings depend on, next to the parameters."""
        settings = {setting.name: getattr(self, setting.name) for setting in METER}
        return settings | {"form": self._precision.fixed}

    # ---- looking ----------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Optimizer steps per window."""
        return self._counter.window

    @property
    def snapshots(self) -> int | None:
        """How many times a window the parameters are read; None for every step."""
        return self._counter.snapshots

    @property
    def steps(self) -> int:
        """Optimizer steps observed."""
        return self._counter.steps

    @property
    def windows(self) -> int:
        """Windows closed."""
        return self._counter.windows

    @property
    def windows_since_restart(self) -> int:
        """Windows closed since the meter started or started over."""
        return self._counter.windows_since_restart

    @property
    def started(self) -> bool:
        """``True`` if there is something that the next displacement is measured from."""
        return self._restore is not None or (self._sums is not None and self._sums.begun)

    @property
    def form(self) -> Form | None:
        """Form that holds the sums now, "sum" or "delta"; None before the first step."""
        return None if self._sums is None else self._precision.form

    @property
    def fraction(self) -> float | None:
        """Part of the parameters that is read; None before the first step."""
        return None if self._sums is None else self._sums.fraction

    @property
    def device_bytes(self) -> int:
        """Bytes of the sums and of a survey's copies on all devices; 0 before the first step."""
        return 0 if self._sums is None else self._sums.device_bytes

    def warn_through(self, warnings: Warnings) -> None:
        """Give warnings to the object that uses this meter, which decides when to release them."""
        self._faults.warnings = warnings
        self._exchange.owner = warnings.owner
        self._warns_by_itself = False

    @property
    def num_groups(self) -> int:
        """Param groups that the watched parameters come in now."""
        return self._source.num_groups()

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts, form and, as CPU clones by parameter name, the sums (12 bytes a parameter).

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. The
        history is not part of it. The sums of sharded parameters are not either, because the other
        ranks' parts would be missing: save :attr:`arena_state` too.
        """
        counter, waiting, fresh = self._counter, self._restore, not self.started
        if self._observing:  # or interrupted: the window is discarded in the state
            counter = copy.copy(counter)
            fresh = counter.discard() or fresh
        spoiled = counter.spoiled
        arenas: NamedArenas = {}
        drawn: Mapping[str, Any] = EVERYTHING if self._sums is None else self._sums.state()
        if waiting is not None:
            drawn, arenas = waiting.drawn, dict(waiting.arenas)
        elif self._sums is not None and not self._layout.sharded:
            # Sums of parameters that were replaced inside of the window are those of old memory.
            spoiled = spoiled or not self._source.unchanged()
            arenas = {} if spoiled or self._observing else on_cpu(self._sums.views())
        return {
            "version": 1,
            **counter.state(),
            "spoiled": spoiled,
            "fresh": fresh,
            "still": 0 if fresh else self._faults.still_windows,
            "variances": list(self._precision.variances),
            "form": self.form if waiting is None else waiting.form,
            "sample": dict(drawn),
            "arenas": arenas,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], name: str = "state_dict") -> None:
        """Continue from a :meth:`state_dict`, bit for bit, with its window.

        If the state has no sums, or they do not fit the parameters or the sample, counts are
        restored, the meter warms up again, and a warning says so.

        Args:
            state_dict: the state.
            name: how error messages call it.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has been
                changed.
        """
        saved = read_meter(state_dict, name)
        self._sums = None
        self._observing = False
        self._counter.window, self._counter.snapshots = saved.window, saved.snapshots
        self._counter.steps, self._counter.windows = saved.steps, saved.windows
        self._start_over()
        self._restore = saved.sums
        if saved.sums is None and not saved.spoiled:
            return
        self._counter.restore(
            saved.steps,
            saved.windows,
            saved.position,
            saved.windows_since_restart,
            spoiled=saved.spoiled,
        )
        if saved.sums is not None:
            self._precision.form, self._precision.variances = saved.form, saved.variances
            self._faults.still_windows = saved.still_windows

    @property
    def arena_state(self) -> ArenaState:
        """The sums for ``torch.distributed.checkpoint``, saved and loaded next to the state.

        They are DTensors like the parameters, so that another number of ranks can go on in the
        middle of a window. Those of a sample are left out, and the meter warms up again.
        """
        return ArenaState(self._shards_to_save, self._sums_to_save, self._take_sums)

    def _shards_to_save(self) -> dict[str, LocalShard]:
        shards = self._source.shards()
        group = find_group(self._process_group, shards)
        # Parameters of two pipeline stages may have the same name.
        front = "" if group.num_stages == 1 else f"stage {group.stage}: "
        kept = [] if self.sample is not None else [s for s in shards if not s.flat]
        return {front + shard.name: shard for shard in kept}

    def _sums_to_save(self) -> SavedSums:
        if self._sums is not None:
            return SavedSums(self._precision.form, self._counter.steps, self._sums.views())
        waiting = self._resharded or self._restore
        return SavedSums(
            self.form or "delta", self._counter.steps, {} if waiting is None else waiting.arenas
        )

    def _take_sums(self, saved: SavedSums) -> None:
        self._resharded = saved
        if self._sums is not None:
            # The counts in this meter are older; the next step finds out whether they fit.
            self._restore = SavedSums(self._precision.form, self._counter.steps, {})
            self._sums = None

    def __getstate__(self) -> dict[str, Any]:
        live = {"_sums": None, "_exchange": None, "_resharded": None}
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_layout", "_extras")}
        return {**kept, **live, "_restore": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_restore")
        self.__dict__.update(state)
        self._exchange = Exchange(self._faults.warnings.owner)
        self._restore = None
        self.load_state_dict(saved)
