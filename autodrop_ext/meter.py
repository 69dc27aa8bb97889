"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import checks
from .agreement import Facts, Row, digests_of
from .faults import Faults
from .memory import no_garbage_collection
from .messages import Warnings
from .ops import check_name
from .parameters import ParameterSource
from .ranks import Ranks, check_group, find_group, is_alone
from .reading import HISTORY, UNDEFINED, Reading, remember
from .saved import Form, Later, exactly, inside, load
from .settings import METER, USE_BUCKETS, check_arguments, removed
from .sharding import LocalShard
from .sketch import NO_TABLES, TABLES_FORM, Sketch
from .windows import Windows

WINDOWS_FOR_ANGLE = 3  # two displacements need three means

GetFacts = Callable[[], Facts]


class AngularVelocity:
    """Angle between the displacements of neighbouring windows (UAI 2024, Definition 3.3).

    A window holds the parameters after ``window`` optimizer steps, ``m_i`` is their mean,
    ``s_i = m_i - m_{i-1}`` its displacement, and the angular velocity is the angle between ``s_i``
    and ``s_{i-1}`` in degrees. Call :meth:`observe` once after each optimizer step.

    The meter reads every parameter once a step and adds it to a table of ``buckets`` float64 sums,
    of which it keeps three (6 MiB by default), whatever the size of the model. The angle has the
    standard error ``sin(angle) / sqrt(buckets)``, 0.11 degrees at most by default. It is exact if
    the model has at most ``buckets`` elements. See ``docs/scaling.md``, and for several ranks
    ``docs/distributed.md``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window, and before
            each read if it returns tensors that are not an ``nn.Parameter``, such as sums that it
            computes. Parameters that have never required a gradient are not measured, tied ones
            count once.
        window: ``k``, optimizer steps per window, at least 1.
        snapshots: how many times a window the parameters are read, evenly spaced, the last time at
            the window's end; None for every step.
        buckets: float64 sums in a table, a multiple of 4,096; None for exact angles, at 24 bytes
            for each element of the model.
        per_tensor: whether readings have the angle of each parameter and of each param group; for
            exact angles only.
        per_group: whether they have the angle of each param group, which then has its own table.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: the ranks that train the model together: None for all there are, a process
            group, a ``DeviceMesh``, or :class:`~autodrop_ext.PipelineStages`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        history: the last 10,000 readings.
        buckets, per_tensor, per_group: the arguments.
        has_read: whether the last :meth:`observe` has read the parameters.
    """

    @removed(sample=USE_BUCKETS, seed=USE_BUCKETS, form="every angle is resolved without it")
    def __init__(
        self,
        params: Any,
        window: int = 64,
        *,
        snapshots: int | None = None,
        buckets: int | None = 2**18,
        per_tensor: bool = False,
        per_group: bool = False,
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        settings = check_arguments(METER, locals())
        self._counter = Windows(settings["window"], settings["snapshots"])
        self.buckets: int | None = settings["buckets"]
        self.per_tensor: bool = settings["per_tensor"]
        self.per_group: bool = settings["per_group"]
        check_group(process_group)
        check_name(backend)
        self.history: list[Reading] = []
        self.has_read = False
        self._source = ParameterSource(params)
        self._source.check()  # wrong arguments fail here, not at the first step
        self._process_group = process_group
        self._backend = backend
        self._faults = Faults(Warnings(type(self).__name__))
        self._warns_by_itself = True
        self.all_started_over = False  # several ranks together, in the last observe()
        self._closed_finite: bool | None = None  # the window that the last observe() closed
        self._observing = False  # state_dict() may be called in the middle of a step
        self._compared = False  # whether the ranks have compared their settings
        self._sketch: Sketch | None = None
        self._saved: Mapping[str, Any] | None = None  # tables of a checkpoint, until the next step
        self._ranks = Ranks()
        self._layout: dict[str, float] = {}  # what this rank holds

    # Counts --------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Optimizer steps per window."""
        return self._counter.window

    @property
    def snapshots(self) -> int | None:
        """Reads of the parameters per window; None for one after every step."""
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
        """Whether there is a mean that the next displacement is measured from."""
        return self._counter.windows_since_restart > 0

    @property
    def num_groups(self) -> int:
        """Param groups that the measured parameters come in now."""
        return self._source.num_groups()

    @property
    def device_bytes(self) -> int:
        """Bytes of the tables and plans on all devices; 0 before the first step."""
        return 0 if self._sketch is None else self._sketch.device_bytes

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """Names and parameters that are measured, as they are now; sharded ones as DTensors."""
        return self._source.named()

    # A window ------------------------------------------------------------------------------------

    def notice_trained(self) -> None:
        """Notice which parameters have gradients; call right before an optimizer step, if at all.

        Without it, parameters that are trained in turn, or whose gradients are deleted before
        :meth:`observe`, are noticed only if they require a gradient when the parameters are read.
        """
        self._source.notice()

    def observe(self, *, calls: int = 0, facts: GetFacts = dict) -> Reading | None:
        """Take the parameters as they are now; call once after each optimizer step, on every rank.

        Args:
            calls: calls of the scheduler's ``step()``, optimizer step or not; compared between
                ranks, so that a rank that skipped a step is noticed.
            facts: returns what decisions depend on, plain values by name; compared between ranks.

        Returns:
            A reading at the end of every window from the third on, otherwise None. Equal on all
            ranks.

        Raises:
            ValueError: there is nothing to measure, or parameters partly overlap in memory.
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: a rank is dead or late.
        """
        # A warning may be an error. It must not leave this half done, and must not keep one rank
        # from the collective.
        self._faults.warnings.hold()
        self._observing = True
        try:
            reading = self._observe(calls, facts)
        except BaseException:
            if self._warns_by_itself:
                self.discard()
            # Otherwise a scheduler does: other ranks may decide on the reading that was lost here.
            raise
        finally:
            self._observing = False
        if self._warns_by_itself:
            self._faults.warnings.release()
        return reading

    def _observe(self, calls: int, facts: GetFacts) -> Reading | None:
        counter = self._counter
        counter.steps += 1
        if counter.position == 1 or self._sketch is None:
            self._begin_window()
        self.compare(facts)
        self.has_read = self.all_started_over = False
        self._closed_finite = None
        if counter.is_snapshot():
            self._read()
        return self._close_window(calls, facts) if counter.position >= counter.window else None

    def _begin_window(self) -> None:
        """Follow the ranks: a process group may have been made again, of another size as well."""
        if self._sketch is not None:
            ranks = self._find_ranks(self._sketch.shards)
            if not ranks.weighs_like(self._ranks):
                # Weights follow from the number of ranks; the closed windows' tables do not.
                self._saved, self._sketch = self._sketch.state_dict(running=False), None
            self._ranks = ranks
        if self._sketch is None:
            sketch, self._ranks = self._new_sketch()
            self._layout = self._ranks.layout(sketch.shards)
            self._continue(sketch)
            self._sketch, self._saved = sketch, None

    def _read(self) -> None:
        assert self._sketch is not None
        self._source.notice()
        if not self._counter.spoiled:
            addresses = self._source.addresses()
            if addresses is None:
                self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
                self._counter.spoiled = True
            else:
                self._sketch.add(addresses)
                self.has_read = True
        self._counter.taken += 1

    def _close_window(self, calls: int, facts: GetFacts) -> Reading | None:
        """Nothing on the way to the collective may return or raise on one rank alone."""
        assert self._sketch is not None
        sketch, counter, ranks = self._sketch, self._counter, self._ranks
        counter.closing = counter.windows + 1
        changed = not self._source.unchanged()
        restart = changed or counter.spoiled
        table = sketch.join()
        values = self._with_settings(facts)
        row = self._row(calls, restart, table, values)
        self._closed_finite = not (restart or row.not_finite)
        verdict = ranks.agree(row, values)
        self.all_started_over = ranks.size > 1 and (verdict.restart or bool(verdict.not_finite))
        counter.next_window()
        if changed:
            self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
            self._sketch = None
        if verdict.restart:
            self._start_over()
            return None
        if verdict.incomplete:
            sketch.discard_running()
            return None
        counter.windows += 1
        if verdict.not_finite:
            self._faults.not_finite(
                sketch.tensors, self.windows - 1, WINDOWS_FOR_ANGLE, ranks, verdict.not_finite
            )
            self._start_over()
            return self._keep(Reading(self.steps, self.windows - 1, *UNDEFINED))
        counter.windows_since_restart += 1
        if not sketch.own:
            ranks.add_up(table)
        sums = sketch.close(counter.snapshots_per_window)
        if sketch.own:
            ranks.add_up(torch.from_numpy(sums))
        totals = sketch.totals(sums)
        self._faults.watch_motion(sketch, totals, counter.window, counter.windows_since_restart)
        if counter.windows_since_restart < WINDOWS_FOR_ANGLE:
            return self._keep(Reading(self.steps, self.windows - 1, *UNDEFINED))
        whole, of_groups, of_tensors = sketch.angles(totals)
        per_group = of_groups if self.per_group or self.per_tensor else None
        per_tensor = of_tensors if self.per_tensor else None
        return self._keep(Reading(self.steps, self.windows - 1, *whole, per_tensor, per_group))

    def _row(self, calls: int, restart: bool, table: Tensor, facts: Facts) -> Row:
        counter = self._counter
        # Not a dot product: on a CPU, that waits for all threads of a busy machine.
        length = 0.0 if restart else float(torch.linalg.vector_norm(table))
        settings, rates = digests_of(facts)
        return Row(
            steps=counter.steps,
            windows=counter.windows,
            window=counter.window,
            calls=calls,
            windows_since_restart=0 if restart else counter.windows_since_restart + 1,
            restart=restart,
            incomplete=counter.incomplete,
            not_finite=not math.isfinite(length),
            settings=settings,
            rates=rates,
            checksum=length * length,
            **self._layout,
        )

    def _keep(self, reading: Reading) -> Reading | None:
        if self.windows < WINDOWS_FOR_ANGLE:
            return None
        remember(self.history, reading, HISTORY)
        return reading

    def met_finite(self) -> bool:
        """Return True if the table shows that the last read met finite elements only.

        It is False if that is not known: the table of exact angles, with a bucket for each element,
        is not looked at, because looking at the parameters is quicker.
        """
        if not self.has_read or self._sketch is None or not self._sketch.buckets:
            return False
        return self._sketch.is_finite() if self._closed_finite is None else self._closed_finite

    # Between windows -----------------------------------------------------------------------------

    def double_window(self) -> None:
        """Double the window: the last two windows become the last one of the new length.

        The next displacement is measured from the mean of both; the next angle comes after two
        windows.

        Raises:
            RuntimeError: a window is open, or fewer than two were closed since the meter started.
        """
        counter = self._counter
        if counter.position or self._sketch is None or counter.windows_since_restart < 2:
            raise RuntimeError(
                "double_window: expected a call at a window's end, at least two windows after a "
                f"start, got one after {counter.position} of {counter.window} steps and "
                f"{counter.windows_since_restart} windows"
            )
        counter.window *= 2
        counter.windows_since_restart = 1
        self._sketch.merge()

    def start_over(self, window: int) -> None:
        """Forget all windows, and measure with another window from now on."""
        self._counter.window = window
        self._start_over()

    def rebase(self) -> None:
        """Measure the next displacement from the parameters as they are now.

        For parameters that were set by hand at a window's end (2021, Algorithm 1: averaging): the
        jump is no displacement, and the last displacement stays. If the meter has not
        :attr:`started`, the parameters stand for a first window's mean.

        Raises:
            RuntimeError: a window is open, or the parameters cannot be read.
        """
        counter = self._counter
        if counter.position:
            raise RuntimeError(
                f"rebase: expected a call at a window's end, got one after {counter.position} of "
                f"{counter.window} steps"
            )
        self._begin_window()
        assert self._sketch is not None
        addresses = self._source.addresses()
        if addresses is None:
            raise RuntimeError("rebase: expected parameters that can be read")
        self._sketch.add(addresses)
        table = self._sketch.join()
        if self._sketch.sharded and not self._sketch.own:
            self._ranks.add_up(table)
        self._sketch.rebase()
        if not self.started:
            counter.windows_since_restart = 1
            counter.windows += 1

    def close(self) -> None:
        """Free the tables. A later :meth:`observe` starts over."""
        self._sketch = None
        self._start_over()

    def discard(self) -> None:
        """Discard the open window: the loop that calls :meth:`observe` may have lost a step.

        Call it after an interrupt between an optimizer step and :meth:`observe`, or inside of it.
        """
        if self._counter.discard() and self._sketch is not None:
            self._sketch.start_over()
        self._faults.interrupted(WINDOWS_FOR_ANGLE)

    def _start_over(self) -> None:
        """Forget the windows; the counts of steps and windows go on."""
        self._counter.start_over()
        self._faults.still_windows = 0
        if self._sketch is not None:
            self._sketch.start_over()

    # Building ------------------------------------------------------------------------------------

    def _find_ranks(self, shards: Sequence[LocalShard]) -> Ranks:
        return find_group(self._process_group, shards, self._faults.warnings.owner)

    @no_garbage_collection()
    def _new_sketch(self) -> tuple[Sketch, Ranks]:
        """Return empty tables for the parameters and the ranks as they are now."""
        shards = self._source.shards()
        ranks = self._find_ranks(shards)
        if not shards and ranks.size == 1 and self.steps == 1:
            raise ValueError(
                "params: expected at least one trainable parameter, got none "
                "(is requires_grad False everywhere?)"
            )
        if self.per_tensor and ranks.num_stages > 1:
            raise ValueError(
                "per_tensor: expected a model that is not cut into pipeline stages, whose ranks "
                f"hold different parameters, got {ranks.num_stages} stages"
            )
        sketch = Sketch(
            shards,
            [ranks.weight(shard) for shard in shards],
            buckets=self.buckets,
            num_groups=self._source.num_groups() if self.per_group or self.per_tensor else 1,
            per_tensor=self.per_tensor,
            stage=ranks.stage if ranks.num_stages > 1 else None,
            backend=self._backend,
            num_stages=ranks.num_stages,
        )
        return sketch, ranks

    def _continue(self, sketch: Sketch) -> None:
        """Fill new tables with saved ones, or start over if they do not fit."""
        saved, counter = self._saved, self._counter
        late = counter.position > 1  # 1: the present step
        if saved is None or not (late or self.started):
            return
        problem = sketch.problem_of(saved)
        if problem is not None:
            if counter.windows or late:  # otherwise nothing is lost
                self._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
            counter.start_over(counter.position)
            counter.spoiled = late
            return
        sketch.load_state_dict(saved)
        if sketch.sharded or not saved["whole"]:
            # The open window's table was on other ranks. The next window begins where it would
            # have begun, so that a rank that loads a state alone is in step with the others.
            sketch.discard_running()
            counter.incomplete = counter.taken > 0

    def compare(self, facts: GetFacts = dict) -> None:
        """Compare settings between the ranks, once; :meth:`observe` does it if nobody has.

        Call it at a place that all ranks come to: ranks with different windows would otherwise wait
        for each other.

        Args:
            facts: as in :meth:`observe`.

        Raises:
            DisagreementError: ranks have different settings; raised on all of them alike.
        """
        if not self._compared and not is_alone(self._process_group):
            shards = self._source.shards() if self._sketch is None else self._sketch.shards
            self._find_ranks(shards).compare(self._with_settings(facts))
        self._compared = True

    def same_on_all_ranks(self, value: Any) -> bool:
        """Return True if ranks that hold parts of one model give equal values; a collective then.

        Replicas compare nothing, because one of them may be evaluated alone.
        """
        if is_alone(self._process_group):
            return True
        shards = self._source.shards() if self._sketch is None else self._sketch.shards
        ranks = self._find_ranks(shards)
        if ranks.num_stages == 1 and not any(shard.split for shard in shards):
            return True
        values = ranks.gather_objects(value)
        return all(other == values[0] for other in values)

    def _with_settings(self, facts: GetFacts) -> Facts:
        return {**{setting.name: getattr(self, setting.name) for setting in METER}, **facts()}

    def warn_through(self, warnings: Warnings) -> None:
        """Give warnings to the object that uses this meter, which decides when to release them."""
        self._faults.warnings = warnings
        self._warns_by_itself = False

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counts and tables, which any rank can continue on any number of ranks.

        Plain values and tensors only, without the history. If parameters are sharded, the open
        window is left out after a resume; with ``buckets=None`` the meter then warms up again. It
        also does if this is called while :meth:`observe` runs, by the handler of a signal or
        another thread. Before the first step there are tables of zeros, into which
        ``torch.distributed.checkpoint`` can load, unless a lazy module has no shape yet.
        """
        sketch, counter = self._sketch, self._counter
        counts = counter.state()
        tables: Mapping[str, Any] = NO_TABLES
        if self._observing:
            counts |= {"position": 0, "usable": 0, "spoiled": False}
        elif self._saved is not None:
            tables = self._saved
        elif sketch is None and not any(is_lazy(p) for _, p in self.named_parameters()):
            tables = self._new_sketch()[0].state_dict(running=False)
        elif sketch is not None and self._source.unchanged():  # no tables of other parameters
            tables = sketch.state_dict(running=not counter.spoiled)
        still = self._faults.still_windows
        return {"version": 2, **counts, "still": still, "tables": dict(tables)}

    def load_state_dict(self, state_dict: Mapping[str, Any], name: str = "state_dict") -> None:
        """Continue where :meth:`state_dict` was taken, with its window.

        If the state has no tables, or they do not fit the parameters, counts are restored, the
        meter warms up again, and a warning says so.

        Args:
            state_dict: the state.
            name: how error messages call it.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has been
                changed.
        """
        saved = _checked(state_dict, name)
        self._sketch = None
        self._counter.restore(saved)
        self._faults.still_windows = saved["still"]
        # A state from before the first step has nothing to continue.
        self._saved = saved["tables"] if saved["usable"] or saved["position"] else None
        if saved["version"] == 1:
            self._faults.cannot_continue("it is of an earlier release", WINDOWS_FOR_ANGLE)

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own tensors: the plan's addresses are those of the original.
        saved = self._saved if self._sketch is None else self.state_dict()["tables"]
        live = {"_sketch": None, "_ranks": Ranks(), "_saved": saved}
        return {**self.__dict__, **live}


def _checked(state: Any, name: str) -> dict[str, Any]:
    """Return a saved state of a meter; raises ValueError, which names the entry."""
    saved = load(state, _COUNTS, name)
    if saved["version"] == 1:  # its sums are those of an earlier release
        return {**saved, "position": 0, "usable": 0, "spoiled": False, "tables": NO_TABLES}
    saved |= load(state, _TABLES, name)
    window, steps, position = saved["window"], saved["steps"], saved["position"]
    if position >= window or position > steps:
        raise ValueError(
            f"{name}['position']: expected less than window={window} and at most steps={steps}, "
            f"got {position}"
        )
    return saved


_COUNTS: Form = {
    "version": exactly(1, 2),
    "window": checks.at_least(1),
    "snapshots": Later(checks.none_or(checks.at_least(1)), None),
    "steps": checks.at_least(0),
    "windows": checks.at_least(0),
    "still": checks.at_least(0),
}
_TABLES: Form = {
    "position": checks.at_least(0),
    "usable": checks.at_least(0),
    "spoiled": checks.flag,
    "tables": inside(TABLES_FORM),
}
