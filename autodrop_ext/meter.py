"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from . import checks
from .faults import Faults
from .messages import Warnings
from .ops import check_name
from .ops.plan import LANES, FloatArray
from .parameters import ParameterSource
from .ranks import Ranks, Row, agree, check_facts, check_group, digest, facts_differ, find_group
from .reading import HISTORY, PartReading, Reading, remember
from .saved import Entries
from .sharding import LocalShard
from .sketch import Sketch, Totals, standard_error
from .windows import Windows

WINDOWS_FOR_ANGLE = 3  # two displacements need three means

Facts = Callable[[], Mapping[str, Any]]
"""Returns what decisions depend on, plain values by name; "lr" holds the learning rates."""


class AngularVelocity:
    """Angle between the displacements of neighbouring windows (UAI 2024, Definition 3.3).

    A window holds the parameters after ``window`` optimizer steps, ``m_i`` is their mean,
    ``s_i = m_i - m_{i-1}`` its displacement, and the angular velocity is the angle between ``s_i``
    and ``s_{i-1}`` in degrees. Call :meth:`observe` once after each optimizer step.

    The meter reads every parameter once a step and adds it to a table of ``buckets`` float64 sums,
    of which it keeps three (6 MiB by default), whatever the size of the model. The angle has the
    standard error ``sin(angle) / sqrt(buckets)``, 0.11 degrees at most by default. It is exact if
    the model has at most ``buckets`` elements. See ``docs/scaling.md``.

    If ``torch.distributed`` is initialised, every rank adds its own part (DDP, FSDP, tensor
    parallel, pipelines, ZeRO). At the end of each window one ``all_gather`` of a short row and one
    ``all_reduce`` of the table give all ranks the same reading; see ``docs/distributed.md``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window. Parameters
            that have never required a gradient are not measured, tied ones count once.
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
            group, a ``DeviceMesh``, or :class:`~autodrop_ext.ranks.PipelineStages`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        history: the last 10,000 readings.
        snapshots, buckets, per_tensor, per_group: the arguments.
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
        snapshots = None if snapshots is None else checks.count("snapshots", snapshots, 1)
        self._windows = Windows(checks.window(window), snapshots)
        self.buckets = check_buckets("buckets", buckets)
        self.per_tensor = checks.flag("per_tensor", per_tensor)
        self.per_group = checks.flag("per_group", per_group)
        check_group(process_group)
        check_name(backend)
        self.history: list[Reading] = []
        self._source = ParameterSource(params)
        self._source.check()  # wrong arguments fail here, not at the first step
        self._process_group = process_group
        self._backend = backend
        self._faults = Faults(Warnings(type(self).__name__))
        self._warns_by_itself = True
        self._compared = False  # whether the ranks have compared their settings
        self._sketch: Sketch | None = None
        self._saved: Mapping[str, Any] | None = None  # tables of a checkpoint, until the next step
        self._ranks = Ranks()
        self._layout = (0.0, 0.0, 0.0, 0.0)  # layout, held, elements, model_elements

    # Counts --------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Optimizer steps per window."""
        return self._windows.window

    @property
    def snapshots(self) -> int | None:
        """Reads of the parameters per window; None for one after every step."""
        return self._windows.snapshots

    @property
    def steps(self) -> int:
        """Optimizer steps observed."""
        return self._windows.steps

    @property
    def windows(self) -> int:
        """Windows closed."""
        return self._windows.windows

    @property
    def windows_since_restart(self) -> int:
        """Windows closed since the meter started or started over."""
        return self._windows.windows_since_restart

    # A window ------------------------------------------------------------------------------------

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
            ValueError: there is nothing to measure, or parameters partly overlap in memory.
            DisagreementError: ranks did not measure the same; raised on all of them alike.
            RuntimeError: a rank is dead or late.
        """
        # A warning may be an error. It must not leave this half done, and must not keep one rank
        # from the collective.
        self._faults.warnings.hold()
        try:
            reading = self._observe(calls, facts)
        except BaseException:
            self.discard()
            raise
        if self._warns_by_itself:
            self._faults.warnings.release()
        return reading

    def _observe(self, calls: int, facts: Facts) -> Reading | None:
        windows = self._windows
        windows.steps += 1
        if windows.position == 1 or self._sketch is None:
            self._begin_window()
        self._compare_once(facts)
        if windows.is_snapshot():
            self._read()
        if windows.position < windows.window:
            return None
        return self._close_window(calls, facts)

    def _begin_window(self) -> None:
        """Follow the parameters: make the tables, or make them again if the parameters changed."""
        if self._sketch is not None and not self._source.unchanged():
            self._parameters_changed()
            self._windows.start_over(self._windows.position)
        if self._sketch is None:
            self._build()

    def _read(self) -> None:
        assert self._sketch is not None
        if not self._windows.spoiled:
            addresses = self._source.addresses()
            if addresses is None:
                self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
                self._windows.spoiled = True
            else:
                self._sketch.add(addresses)
        self._windows.taken += 1

    def _close_window(self, calls: int, facts: Facts) -> Reading | None:
        """Nothing on the way to the collective may return or raise on one rank alone."""
        assert self._sketch is not None
        sketch, windows, ranks = self._sketch, self._windows, self._ranks
        windows.begin_close()
        changed = not self._source.unchanged()
        restart = changed or windows.spoiled
        table = None if restart else sketch.join()
        row = self._row(calls, restart, facts)
        verdict = self._agree(row, facts)
        windows.next_window()
        if changed:
            self._parameters_changed()
        if verdict.restart:
            self._start_over()
            return None
        windows.windows += 1
        if verdict.not_finite:
            self._not_finite(verdict.not_finite)
            return self._keep(self._undefined())
        windows.windows_since_restart = int(row.windows_since_restart)
        if table is not None:
            ranks.add_up(table)
        sums = sketch.close(windows.snapshots_per_window, sketch.weight)
        if sketch.own:
            sums = ranks.add_numbers(sums)
        totals = sketch.totals(sums)
        self._faults.watch_motion(sketch, totals, windows.windows_since_restart)
        if windows.windows_since_restart < WINDOWS_FOR_ANGLE:
            return self._keep(self._undefined())
        return self._keep(self._reading(totals))

    def _row(self, calls: int, restart: bool, facts: Facts) -> Row:
        assert self._sketch is not None
        windows, ranks = self._windows, self._ranks
        values = dict(self._with_settings(facts)())
        rates = values.pop("lr", None)
        checksum = 0.0 if restart else self._sketch.checksum()
        return Row(
            steps=windows.steps,
            windows=windows.windows,
            window=windows.window,
            calls=calls,
            windows_since_restart=0 if restart else windows.windows_since_restart + 1,
            restart=restart,
            not_finite=not math.isfinite(checksum),
            settings=digest([json.dumps(values)]),
            rates=digest([json.dumps(rates)]),
            stage=ranks.stage,
            num_stages=ranks.num_stages,
            checksum=checksum,
            **self._held._asdict(),
        )

    def _agree(self, row: Row, facts: Facts) -> Agreement:
        windows = self._windows
        ended = f"window {windows.windows} ended after {windows.steps} optimizer steps"
        rows = self._ranks.gather(row, f"{ended}, but it could not be compared")
        verdict = agree(rows)
        if facts_differ(rows):
            self._compare(facts)
        return verdict

    def _reading(self, totals: Totals) -> Reading:
        assert self._sketch is not None
        groups = len(totals.dot) - (len(self._sketch.names) if self.per_tensor else 0)
        parts = [self._part(totals, i) for i in range(len(totals.dot))]
        whole = self._part(Totals(*(column[:groups].sum(keepdims=True) for column in totals)), 0)
        named = dict(zip(self._sketch.names, parts[groups:], strict=True)) if self.per_tensor else None
        return Reading(
            step=self.steps,
            window=self.windows - 1,
            **whole._asdict(),
            per_tensor=named,
            per_group=tuple(parts[:groups]) if self.per_group or self.per_tensor else None,
        )

    def _part(self, totals: Totals, i: int) -> PartReading:
        assert self._sketch is not None
        dot, norm, previous = (float(column[i]) for column in totals)
        angle, cosine = angle_of(dot, norm, previous)
        error = math.nan if angle is None else standard_error(angle, self._sketch.buckets)
        return PartReading(angle, cosine, math.sqrt(norm), math.sqrt(previous), error)

    def _undefined(self) -> Reading:
        return Reading(self.steps, self.windows - 1, None, None, math.nan, math.nan, math.nan)

    def _keep(self, reading: Reading) -> Reading | None:
        if self.windows < WINDOWS_FOR_ANGLE:
            return None
        remember(self.history, reading, HISTORY)
        return reading

    # Between windows -----------------------------------------------------------------------------

    def double_window(self) -> None:
        """Double the window: the last two windows become the last one of the new length.

        The mean that the next displacement is measured from is then the mean of both, and the next
        angle comes after two windows. Call it at a window's end.

        Raises:
            RuntimeError: a window is open, or two windows have not been closed since the meter
                started or started over.
        """
        windows = self._windows
        if windows.position or self._sketch is None or windows.windows_since_restart < 2:
            raise RuntimeError(
                "double_window: expected a call at a window's end, at least two windows after a "
                f"start, got one after {windows.position} of {windows.window} steps and "
                f"{windows.windows_since_restart} windows"
            )
        try:
            windows.double()
            self._sketch.merge()
        except BaseException:
            self._start_over()
            raise

    def set_window(self, window: int) -> None:
        """Measure with another window from now on, and start over."""
        self._windows.window = window
        self._start_over()

    def rebase(self) -> None:
        """Measure the next displacement from the parameters as they are now.

        For parameters that were set by hand at a window's end (2021, Algorithm 1: averaging): the
        jump is no displacement. The last displacement, which the next angle needs, stays. If the
        meter has not :attr:`started`, the parameters stand for a first window's mean.

        Raises:
            RuntimeError: a window is open.
        """
        windows = self._windows
        if windows.position:
            raise RuntimeError(
                f"rebase: expected a call at a window's end, got one after {windows.position} of "
                f"{windows.window} steps"
            )
        self._begin_window()
        assert self._sketch is not None
        addresses = self._source.addresses()
        if addresses is None:
            raise RuntimeError("rebase: expected parameters that can be read")
        first = windows.windows_since_restart == 0
        self._sketch.rebase(addresses, self._ranks.add_up)
        if first:
            windows.windows_since_restart = 1
            windows.windows += 1

    @property
    def started(self) -> bool:
        """Whether there is a mean that the next displacement is measured from."""
        return self._windows.windows_since_restart > 0

    def close(self) -> None:
        """Free the tables. A later :meth:`observe` starts over."""
        self._sketch = None
        self._start_over()

    def discard(self) -> None:
        """Discard the open window: the loop that calls :meth:`observe` may have lost a step.

        Call it after an interrupt between an optimizer step and :meth:`observe`, or inside of it.
        """
        if self._windows.interrupted() and self._sketch is not None:
            self._sketch.start_over()
        self._faults.interrupted(WINDOWS_FOR_ANGLE)

    def _start_over(self) -> None:
        """Forget the windows; the counts of steps and windows go on."""
        self._windows.start_over()
        self._faults.still_windows = 0
        if self._sketch is not None:
            self._sketch.start_over()

    def _parameters_changed(self) -> None:
        self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
        self._sketch = None

    def _not_finite(self, ranks: list[int]) -> None:
        assert self._sketch is not None
        self._faults.not_finite(
            self._sketch.tensors, self.windows - 1, WINDOWS_FOR_ANGLE, self._ranks, ranks
        )
        self._start_over()

    # Building ------------------------------------------------------------------------------------

    def _build(self) -> None:
        shards = self._source.shards()
        ranks = find_group(self._process_group, shards)
        if not shards and ranks.size == 1 and self.steps <= 1:
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
            num_groups=self._source.num_groups() if self.per_group else 1,
            per_tensor=self.per_tensor,
            stage=ranks.stage if ranks.num_stages > 1 else None,
            backend=self._backend,
        )
        self._ranks, self._held = ranks, held_by(ranks, shards)
        self._source.follow()
        self._continue(sketch)
        self._sketch, self._saved = sketch, None

    def _continue(self, sketch: Sketch) -> None:
        """Fill new tables with saved ones, or start over if they do not fit."""
        saved, windows = self._saved, self._windows
        if saved is None:
            return
        problem = sketch.problem_of(saved)
        if problem is not None:
            self._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
            windows.start_over(min(windows.position, 1))
            return
        sketch.load_state_dict(saved)
        if saved["running"] is None or sketch.sharded:
            # The open window's table is on other ranks: it begins again with the present step.
            sketch.discard_running()
            windows.begin_again(min(windows.position, 1))

    def _compare_once(self, facts: Facts) -> None:
        if not self._compared:
            self._compare(facts)
            self._compared = True

    def _compare(self, facts: Facts) -> None:
        values = dict(self._with_settings(facts)())
        here = (self._ranks.stage, values)
        gathered = self._ranks.gather_objects(here, "its settings could not be compared")
        check_facts([values for _, values in gathered], [stage for stage, _ in gathered])

    def compare(self, facts: Facts = dict) -> None:
        """Compare settings between the ranks, once; :meth:`observe` does it if nobody has.

        Call it at a place that all ranks come to. Ranks with different windows would otherwise wait
        for each other.

        Args:
            facts: as in :meth:`observe`.

        Raises:
            DisagreementError: ranks have different settings; the message names the first of them,
                the ranks and their values. Raised on all ranks alike.
        """
        if self._sketch is None and not self._compared:
            self._ranks = find_group(self._process_group, self._source.shards())
        self._compare_once(facts)

    def _with_settings(self, facts: Facts) -> Facts:
        names = ("window", "snapshots", "buckets", "per_tensor", "per_group")
        return lambda: {**{name: getattr(self, name) for name in names}, **facts()}

    # Looking -------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes of the tables and plans on all devices; 0 before the first step."""
        return 0 if self._sketch is None else self._sketch.device_bytes

    @property
    def num_groups(self) -> int:
        """Param groups that the measured parameters come in now."""
        return self._source.num_groups()

    def warn_through(self, warnings: Warnings) -> None:
        """Give warnings to the object that uses this meter, which decides when to release them."""
        self._faults.warnings = warnings
        self._warns_by_itself = False

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counts and tables, which any rank can continue on any number of ranks.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. The
        history is not part of it. The table of the open window is included if every rank has all
        parameters; if they are sharded, the open window begins again after a resume. With
        ``buckets=None`` on sharded parameters there are no tables in it, and the meter warms up
        again.
        """
        sketch, windows = self._sketch, self._windows
        tables: Mapping[str, Any] = NO_TABLES
        if self._saved is not None:
            tables = self._saved
        elif sketch is not None:
            # A window in which the parameters were replaced is not to be continued.
            usable = not windows.spoiled and self._source.unchanged()
            tables = sketch.state_dict(running=usable and not sketch.sharded)
        return {
            "version": 2,
            **windows.state(),
            "still": self._faults.still_windows,
            "tables": dict(tables),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], name: str = "state_dict") -> None:
        """Continue where :meth:`state_dict` was taken, with its window.

        If the state has no tables, or they do not fit the parameters, counts are restored, the
        meter warms up again, and a warning says so. The same goes for a state of version 1.

        Args:
            state_dict: the state.
            name: how error messages call it.

        Raises:
            ValueError: not a state of this class; the message names the entry, and nothing has been
                changed.
        """
        saved = SavedMeter.read(Entries(state_dict, name))
        self._sketch = None
        self._windows.restore(saved)
        self._faults.still_windows = saved.still
        self._saved = saved.tables
