"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from . import angle as rounding
from .distributed import (
    Agreement,
    Holding,
    LocalShard,
    Ranks,
    check_group,
    elements_per_rank,
    find_ranks,
    model_elements,
)
from .distributed.checkpoint import (
    WINDOWS_FOR_ANGLE,
    ArenaState,
    SavedArenas,
    load_arenas,
    load_state,
    state_of,
)
from .distributed.exchange import Counts, Exchange
from .faults import Faults
from .meter_arguments import check_counting, check_sample
from .ops import Sums, check_name
from .ops.device_sums import Arenas, Form
from .ops.window_sums import Reader, Wanted
from .parameters import ParameterSource, signature
from .parts import Added
from .reading import Reading, remember
from .sampling.auto import AutoFraction
from .sampling.draw import FloatArray, Sample
from .sampling.survey import Survey, num_windows

HISTORY = 10_000
"""Readings that a meter or scheduler keeps."""


class AngularVelocity:
    """Angle between the displacements of neighbouring windows (UAI 2024, Definition 3.3).

    A window holds the parameters after ``window`` optimizer steps, ``m_i`` is their mean,
    ``s_i = m_i - m_{i-1}`` its displacement, and the angular velocity is the angle between ``s_i``
    and ``s_{i-1}`` in degrees. Call :meth:`observe` once after each optimizer step.

    The meter keeps 12 bytes per parameter on the parameter's device and reads every parameter once
    a step; with ``sample=`` only a random part of them, and every reading comes with its standard
    error (``docs/scaling.md``). It starts in delta form, which resolves any step size, and turns to
    the cheaper sum form once the rounding error of that form is known to be small, and back if it
    grows.

    Where ``torch.distributed`` is initialised, every rank measures what lies on it (DDP, FSDP,
    tensor parallel, pipelines, ZeRO), and one ``all_gather`` of 136 bytes a rank at the end of each
    window gives all of them the same reading; see ``docs/distributed.md``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window. Frozen
            parameters are not watched, tied ones count once.
        window: ``k``, optimizer steps per window, at least 1.
        sample: part of the parameters that is read, in (0, 1]: of every tensor a random choice of
            its chunks of 1,024 elements, at least two of them. "auto": begins with 1/64 and
            changes once to the smallest power of two whose standard error stays within
            ``tolerance``. None or 1 for everything.
        seed: of the sample.
        tolerance: standard error that ``sample="auto"`` aims at, degrees.
        per_tensor: whether readings tell the angle of each parameter and each param group too.
        per_group: whether they tell that of each param group.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: the ranks that train the model together: None for all there are, a process
            group, a ``DeviceMesh``, or :class:`~autodrop_ext.distributed.PipelineStages`.
        form: "auto", or "sum" or "delta" to hold the sums in one form.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Attributes:
        steps: optimizer steps observed.
        windows: windows closed.
        choices: how often a sample took the place of another.
        history: the last 10,000 readings.
        per_tensor, per_group: as given; a change counts from when plans are built next.
    """

    def __init__(
        self,
        params: Any,
        window: int = 64,
        *,
        sample: float | Literal["auto"] | None = None,
        seed: int = 0,
        tolerance: float = 0.01,
        per_tensor: bool = False,
        per_group: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        form: Literal["auto", "sum", "delta"] = "auto",
    ) -> None:
        check_counting(window, form, per_tensor, per_group)
        check_sample(sample, seed, tolerance)
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
        self._calls = 0
        self._sample = sample
        self._seed = seed
        self._auto = AutoFraction(float(tolerance)) if sample == "auto" else None
        self._fraction: float | None = None  # that is read now, where it was chosen
        self.per_tensor = per_tensor
        self.per_group = per_group
        self.choices = 0
        self._exchange = Exchange()
        self._fixed_form: Form | None = None if form == "auto" else form
        self._form: Form = self._fixed_form or "delta"
        self._reader: Reader | None = None
        self._next: Reader | None = None  # gathers its first windows beside the other
        self._survey: Survey | None = None
        self._sizes: Mapping[str, FloatArray] | None = None  # that a sample is drawn by
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
        if self._position == 0 or self._reader is None:
            self._follow_parameters()
        if self._fresh:
            self._form = self._fixed_form or "delta"
        for reader in self._readers():
            reader.take(self._form, first=self._position == 0)
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
        self._follow_parameters(ahead=False)
        if self._fresh:
            for reader in self._readers():
                reader.take("delta", first=True)
            self._fresh = False
            self._usable = 1
            self.windows += 1
        for reader in self._readers():
            for arenas in reader.arenas:
                arenas.rebase(self.window)

    def close(self) -> None:
        """Free the arenas. A later :meth:`observe` starts over."""
        self._reader = None
        self._forget()

    @property
    def started(self) -> bool:
        """Whether there is something that the next displacement is measured from."""
        return not self._fresh

    @property
    def form(self) -> Form | None:
        """Form that holds the sums now, "sum" or "delta"; None before the first step."""
        return None if self._reader is None else self._form

    @property
    def fraction(self) -> float | None:
        """Part of the parameters that is read now; None before the first step."""
        if self._reader is None:
            return None
        return 1.0 if self._reader.sample is None else self._reader.sample.fraction

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas and of a survey's copies on all devices; 0 before the first step."""
        copies = 0 if self._survey is None else self._survey.device_bytes
        return copies + sum(reader.device_bytes for reader in self._readers())

    @property
    def tolerance(self) -> float | None:
        """Standard error that ``sample="auto"`` aims at, degrees; None without it."""
        return None if self._auto is None else self._auto.tolerance

    @tolerance.setter
    def tolerance(self, degrees: float) -> None:
        if self._auto is not None:
            self._auto.tolerance = float(degrees)

    @property
    def num_groups(self) -> int:
        """Param groups that the watched parameters come in now."""
        return self._source.num_groups()

    @property
    def _sampled(self) -> bool:
        """Whether only a part is read, or may be."""
        return self._sample not in (None, 1) and self.fraction != 1

    @property
    def _arenas(self) -> list[Arenas] | None:
        return None if self._reader is None else self._reader.arenas

    @property
    def _holding(self) -> Holding | None:
        return None if self._reader is None else self._reader.holding

    def _readers(self) -> list[Reader]:
        return [reader for reader in (self._reader, self._next) if reader is not None]

    # ---- following the parameters -----------------------------------------------------------

    def _follow_parameters(self, *, ahead: bool = True) -> None:
        """Build the plans, or rebuild them if the parameters are not those they were made of.

        Args:
            ahead: whether a window begins now, and a survey goes on.
        """
        if self._reader is not None and self._now() != self._signature:
            self._discard()
        if self._reader is None:
            self._build()
            self._signature = self._now()
        if ahead:
            self._follow_choice()

    def _now(self) -> list[list[Any]]:
        """What plans are made of; equal while they hold."""
        return [*signature(self._source.tensors()), [self._source.num_groups()]]

    def _discard(self) -> None:
        self._faults.parameters_changed(WINDOWS_FOR_ANGLE)
        self._reader = None
        self._forget(anew=True)  # for other parameters another part may do

    def _forget(self, *, anew: bool = False) -> None:
        """Start over with the next step; the counts of steps and windows go on."""
        self._position = 0
        self._fresh = True
        self._usable = 0  # windows since the start over
        self._variances = (0.0, 0.0)  # of the means before and at the last close
        self._faults.still_windows = 0
        self._next = self._survey = None
        self._stays = False  # with the part that is read, for want of memory
        if self._reader is not None and self._reader.sample is None and self._auto is None:
            self._reader.forget()
        else:
            # All ranks start over together, and must survey and choose in step.
            self._reader = self._fraction = self._sizes = None
        if self._auto is not None:
            self._auto.restart(anew=anew)

    def _build(self) -> None:
        shards = self._source.shards()
        self._ranks = find_ranks(self._process_group, shards)
        if not shards and self._ranks is None and self.steps == 0:
            raise ValueError(
                "params: expected at least one trainable parameter, got none "
                "(is requires_grad False everywhere?)"
            )
        if self._auto is not None and self._fraction is None:
            self._fraction = self._auto.start(model_elements(shards, self._ranks))
        self._exchange.ranks = self._ranks
        if self._restore is not None and self._restore.sized:
            self._sizes = self._restore.sizes
        self._reader = self._read(shards)
        if self._restore is not None:
            self._sizes = self._restore.sizes
        if self._reader.sample is not None and self._sizes is None:
            plans = [arenas.plan for arenas in self._reader.arenas]
            self._survey = Survey(plans, num_windows(elements_per_rank(shards, self._ranks)))
        saved, self._restore = self._restore, None
        if saved is not None:
            load_arenas(self, saved)
        self._resharded = None

    def _follow_choice(self) -> None:
        """At a window's beginning: let another choice gather its first windows, once it is known.

        Either the fraction was chosen, or the survey is over and the sample can be drawn by it.
        """
        if self._position != 0 or self._stays:
            return
        if self._survey is not None:
            self._survey.step()
            if self._survey.done:
                self._sizes, self._survey = self._survey.sizes, None
        chosen = None if self._auto is None else self._auto.chosen
        assert self._reader is not None
        anew = self._reader.sample is not None and self._reader.sizes is not self._sizes
        if self._next is None and (anew or chosen not in (None, self.fraction)):
            before, self._fraction = self._fraction, chosen or self._fraction
            try:
                self._next = self._read(self._source.shards())
            except RuntimeError as error:
                # The other ranks go on, and so does this one, with what it has.
                self._fraction, self._sizes = before, self._reader.sizes
                self._stays = True
                self._faults.no_memory_for_more(error)

    def _read(self, shards: Sequence[LocalShard]) -> Reader:
        fraction = self._fraction if self._sample == "auto" else self._sample
        wanted = Wanted(
            self.per_tensor,
            self.per_group,
            self._source.num_groups(),
            (self._sample not in (None, 1), self._auto is not None),
            f"{self._sample} {self._seed} {self.per_tensor} {self.per_group}",
        )
        return Reader(
            shards,
            self._ranks,
            self._backend,
            None if fraction in (None, 1) else Sample(float(fraction), self._seed),
            wanted,
            sizes=self._sizes,
            foresee=self._auto is not None and self._auto.chosen is None,
        )

    # ---- closing a window -------------------------------------------------------------------

    def _close_window(self) -> Reading | None:
        """Nothing on the way to the collective may return or raise on one rank alone."""
        changed = self._now() != self._signature
        if self._next is not None and self._next.windows == WINDOWS_FOR_ANGLE - 1:
            # This window gives the next reader's first angle.
            self._reader, self._next = self._next, None
            self.choices += 1
        assert self._reader is not None
        local = self._reader.close(self.window)
        if self._next is not None:
            self._next.close(self.window)
        usable = self._usable + 1
        self._position = 0
        total, added = self._agree(local, -1 if changed else usable)
        if changed:
            self._discard()
            return None
        if total.start_over:
            self._forget(anew=True)  # as on the rank that had to start over
            return None
        self.windows += 1
        sums = Sums(*total.sums)
        undefined = self._undefined()
        if total.not_finite:
            self._faults.not_finite(
                self._reader.arenas,
                self.windows - 1,
                WINDOWS_FOR_ANGLE,
                self._ranks,
                total.not_finite,
            )
            self._forget()
            return self._keep(undefined)
        self._usable = usable
        if self._usable >= 2:
            self._faults.watch_displacement(sums, self._reader.arenas, sampled=self._sampled)

        oldest, shared = self._variances
        newest = rounding.mean_variance(self.window, sums, self.form or "delta")
        self._variances = (shared, newest)
        if self._usable < WINDOWS_FOR_ANGLE:
            return self._keep(undefined)
        elements = total.elements
        if added is not None and added.spread:
            elements = min(elements, elements**2 / added.spread)  # as many equal weights (Kish)
        error = rounding.angle_error(sums, (oldest, shared, newest), elements)
        self._choose_form(sums, error, elements)
        if self._auto is not None and added is not None and self._reader.sizes is not None:
            self._auto.take(sums, added.foreseen)
        return self._keep(
            self._reader.details.reading(self.steps, self.windows - 1, sums, error, added)
        )

    def _agree(self, sums: Sums, usable: int) -> tuple[Agreement, Added | None]:
        """The sums of all ranks together, and the numbers beside them where ranks sent them."""
        assert self._reader is not None
        counts = Counts(self.steps, self.windows, self.window, self._calls, usable)
        try:
            return self._exchange.agree(self._reader, counts, sums)
        except RuntimeError:
            self._forget()
            raise

    def _undefined(self) -> Reading:
        nan, error = math.nan, math.nan if self._sampled else 0.0
        return Reading(self.steps, self.windows - 1, None, None, nan, nan, error, margin=error)

    def _keep(self, reading: Reading) -> Reading | None:
        if self.windows < WINDOWS_FOR_ANGLE:
            return None
        remember(self.history, reading, HISTORY)
        return reading

    def _choose_form(self, sums: Sums, rounding_error: float, elements: float) -> None:
        """Turn to the form that the next windows need, without losing one."""
        if self._fixed_form is not None:
            return
        form = rounding.better_form(self._form, self.window, sums, rounding_error, elements)
        if form == self._form:
            return
        self._form = form
        for reader in self._readers():
            reader.convert(form, self.window)
        if form == "sum":
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
        return state_of(self)

    @property
    def arena_state(self) -> ArenaState:
        """The arenas for ``torch.distributed.checkpoint``: saved and loaded beside the state.

        They are DTensors like the parameters, so that another number of ranks can go on in the
        middle of a window. Those of a sample are left out, and the meter warms up again.
        """
        return ArenaState(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit, with its window.

        Where the state has no arenas, or they do not fit the parameters or the sample, counts are
        restored, the meter warms up again, and a warning says so.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        load_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state |= {"_reader": None, "_next": None, "_survey": None, "_signature": [], "_ranks": None}
        state |= {"_exchange": Exchange(), "_restore": self.state_dict(), "_resharded": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_restore")
        self.__dict__.update(state)
        self._restore = None
        self.load_state_dict(saved)
