"""MeteredScheduler: a scheduler that decides from the readings of a meter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..average import HELD, ParameterAverage, checked_average
from ..meter import AngularVelocity
from ..parameters import ParameterSource
from ..reading import Decision, Reading
from ..saved import Later, inside, load
from ..settings import METER, check_arguments
from ..sharding import zero_optimizer_of
from .base import NOTHING, Outcome, StepScheduler, as_floats, check_optimizer, in_precision_of
from .cooldown import COOLDOWN_FORM, Cooldown, Shape, check_shape

if TYPE_CHECKING:
    import matplotlib.figure


class MeteredScheduler(StepScheduler):
    """A scheduler that lowers rates if the readings of its meter say so.

    Subclasses implement :meth:`_decide`, which turns a reading into an :class:`Outcome` and changes
    nothing itself.

    Args:
        optimizer: whose learning rates are changed.
        arguments: of the constructor, by name: the settings, and ``params``, ``backend``,
            ``process_group``, ``on_reading``, ``on_drop`` and ``last_epoch``.
        **meter: arguments of the meter that are not the scheduler's own.

    Attributes:
        meter: the meter.
        min_lr: lower bound of each param group's rate.
    """

    min_lr: list[float]
    _record_type: ClassVar[type[Decision]] = Decision
    _window_follows_from: ClassVar[str] = ""
    """For messages: entries of a saved state, if the window follows from several."""
    average: bool = False
    _decided: int | None  # window of the newest reading that was decided on
    _cooldown: Cooldown | None
    _described_to_log: bool
    _averages_run: ClassVar[bool] = True
    """Whether ``average`` stands for an average over the run, which is moved at every window."""

    def __init__(self, optimizer: Optimizer, arguments: Mapping[str, Any], **meter: Any) -> None:
        optimizer = check_optimizer(optimizer)
        settings = check_arguments(self._settings, arguments)
        settings["min_lr"] = _one_for_each(settings["min_lr"], len(optimizer.param_groups))
        _check_one_rate(optimizer, settings)
        checks.callback("on_reading", arguments["on_reading"])
        checks.callback("on_drop", arguments["on_drop"])
        self.on_reading: Callable[[Any], object] | None = arguments["on_reading"]
        self.on_drop: Callable[[Any], object] | None = arguments["on_drop"]
        params = arguments["params"]
        self.meter = AngularVelocity(
            optimizer if params is None else params,
            **{s.name: settings[s.name] for s in METER if s.name in settings} | meter,
            backend=arguments["backend"],
            process_group=arguments["process_group"],
        )
        self._measures_own = params is None
        self._named: Callable[[], list[tuple[str, Tensor]]] = self.meter.named_parameters
        if params is not None:
            self._named = functools.partial(_to_average, ParameterSource(optimizer), self.meter)
        self._mean: ParameterAverage | None = None
        if self._averages_run and settings["average"]:
            self._mean = ParameterAverage(self._named)
        own = {s.name: settings[s.name] for s in self._settings if s.saved}
        super().__init__(optimizer, own, arguments["last_epoch"])
        self.meter.warn_through(self._warnings)

    def _at_start(self) -> dict[str, Any]:
        return {
            **super()._at_start(),
            "_decided": self._newest_window(),
            "_cooldown": None,
            "_described_to_log": False,
        }

    def reset(self) -> None:
        """Begin another run: what was measured is forgotten, and rates are the base rates again.

        Settings, parameters and the optimizer's state stay. Every rank must call it.
        """
        self.meter.start_over(self._first_window())
        self._take_cooldown(None)
        if self._mean is not None:
            self._mean.reset()
        super().reset()

    def _first_window(self) -> int:
        """Return the length of the first window of a run, optimizer steps."""
        return self.meter.window

    # ---- a step -----------------------------------------------------------------------------

    def _decide_step(self, *, warming_up: bool) -> Outcome:
        # At the first step of all, where every rank is: one with another warm-up would not come.
        self.meter.compare(self._facts)
        if not self._described_to_log:
            self._begin_log()
        if warming_up:
            return NOTHING
        reading = self._observe()
        if self._cooldown is not None:
            self._cool(self._cooldown)  # first, so that a decision holds the rates after this step
        return NOTHING if reading is None else self._decide(reading)

    def _observe(self) -> Reading | None:
        """Let the meter take the parameters, and return a reading if there is one to decide on."""
        if any(group.get("train_mode") is False for group in self.optimizer.param_groups):
            raise RuntimeError(
                "step: expected the parameters that a schedule-free optimizer trains, got those "
                "of its eval mode; call step() before optimizer.eval()"
            )
        self._end_block()
        reading = self.meter.observe(calls=self._step_count, facts=self._facts)
        if self._mean is not None and self.meter.all_started_over:
            self._mean.reset()  # some rank may have missed snapshots, this one among them
        else:
            self._update_average()
        return reading

    def _before_step(self, optimizer: Optimizer) -> None:
        super()._before_step(optimizer)
        if self._optimizer_steps >= self._linear_warmup:
            self.meter.notice_trained()
        # Asked first: whether a step moves parameters may have to be read from a GPU.
        swapped = self._mean is not None and self._mean.is_swapped_in
        if swapped and self._hook.moves(optimizer):
            self._end_block(hold=True)

    def _end_block(self, *, hold: bool = False) -> None:
        """Give the parameters their own values back, if they hold their average.

        Args:
            hold: whether the warning waits for the next :meth:`step`.
        """
        if self._mean is not None and self._mean.restore():
            if hold:
                self._warnings.hold()
            self._warnings.once("held", HELD)

    def _update_average(self) -> None:
        """Move the average where the meter has read the parameters, but not too often.

        Float32 averages lose accuracy if they move by less than 1/512 of the time at once: steps
        that are small next to the average round away.
        """
        if self._mean is None or not self.meter.has_read:
            return
        t = self._optimizer_steps - self._linear_warmup
        since = t - self._mean.steps
        if 512 * since >= t:
            # The optimizer's parameters are what is averaged; others may be measured.
            finite = self._measures_own and self.meter.met_finite()
            problem = self._mean.update(since, known_finite=finite)
            if problem is not None:
                self._warnings.once("average", problem)

    def _decide(self, reading: Reading) -> Outcome:
        """Return what follows from a reading; its window is ``_decided`` in the new state."""
        raise NotImplementedError

    def _report(self, record: Any) -> None:
        if self.on_reading is not None:
            self.on_reading(record)
        if record.dropped and self.on_drop is not None:
            self.on_drop(record)

    def _make_whole(self) -> None:
        newest = self.meter.history[-1] if self.meter.history else None
        if newest is not None and newest.window != self._decided:
            self._commit(self._decide(newest))  # other ranks may have decided on it
        super()._make_whole()
        self.meter.discard()

    def _facts(self) -> dict[str, Any]:
        """Return what decisions depend on; equal on all ranks."""
        return {
            **self._saved_settings(),
            "num_drops": self.num_drops,
            **self._saved_gathered(),
            "cooldown": Cooldown.saved(self._cooldown),
            "lr": as_floats(self._rates()),
        }

    # ---- learning rates ---------------------------------------------------------------------

    def _floor(self, group: int) -> float:
        """Return the lower bound of a param group's rate; 0 for those that were added later."""
        return self.min_lr[group] if group < len(self.min_lr) else 0.0

    def _dropped(self, factor: float, groups: Iterable[int] | None = None) -> list[float | None]:
        """Return the rates after a drop; None for those that stay as they are.

        During a cooldown all of them do.

        Args:
            factor: what rates are multiplied by.
            groups: whose rates are dropped; None for all.
        """
        lrs = self._rates()
        chosen = set(range(len(lrs)) if groups is None else groups)
        if self._cooldown is not None:
            chosen = set()
        return [
            _lower(lr, factor, self._floor(g)) if g in chosen else None for g, lr in enumerate(lrs)
        ]

    def _closed_form(
        self, factor: float, drops: Callable[[int], int], share: float = 1.0
    ) -> list[float]:
        """Return the base rates after ``drops`` of each group, within the warm-up its share."""
        lrs = [share * lr for lr in self._warmed(self.base_lrs)]
        for g in range(len(lrs)):
            for _ in range(drops(g)):
                lower = _lower(lrs[g], factor, self._floor(g))
                if lower is None:  # it stays at its floor
                    break
                lrs[g] = lower
        return lrs

    def _of_added_groups(self) -> dict[str, Any]:
        floors = [self._floor(g) for g in range(len(self.optimizer.param_groups))]
        return {**super()._of_added_groups(), "min_lr": floors}

    def cooldown(self, num_steps: int, shape: Shape = "linear") -> None:
        """Let the rates fall to ``min_lr`` over the next ``num_steps`` steps, whatever is measured.

        For someone who now knows when the run ends. A second call starts from the present rates,
        and :meth:`end_cooldown` ends it. Checkpoints hold the cooldown, readings go on, and steps
        count, also at a rate of 0. On several ranks all of them have to call it at the same step.

        Args:
            num_steps: calls of :meth:`step` that follow an optimizer step.
            shape: "linear", "sqrt" (``1 - sqrt(x)``) or "cosine", over the part ``x`` that is done.

        Raises:
            ValueError, TypeError: an argument is wrong.
            RuntimeError: the warm-up is not over.
        """
        if self._optimizer_steps < self._linear_warmup:
            raise RuntimeError(
                f"cooldown: expected a call after the warm-up of {self.warmup_steps} steps, got "
                f"one after {self._optimizer_steps}"
            )
        self._take_cooldown(
            Cooldown(
                self._optimizer_steps,
                checks.count("num_steps", num_steps, 1),
                check_shape("shape", shape),
                as_floats(self._rates()),
            )
        )
        self._begin_log()

    def end_cooldown(self) -> None:
        """Let drops go on after a :meth:`cooldown`, also before its end.

        The rates stay as they are until a drop, or until you set them; set them if they are 0. On
        several ranks all of them have to call it at the same step. Without a cooldown it does
        nothing.
        """
        self._take_cooldown(None)
        self._lowered = []  # rates that are set by hand now undo nothing
        self._begin_log()

    def _take_cooldown(self, cooldown: Cooldown | None) -> None:
        self._cooldown = cooldown
        self._hook.at_zero = cooldown is not None
        if cooldown is not None:  # it lets parameters stand still in the end
            self._warnings.mute("still", "half")

    def _cool(self, cooldown: Cooldown) -> None:
        now = as_floats(self._rates())
        if len(now) > len(cooldown.lrs):
            self._cooldown = cooldown = cooldown.joined(self._optimizer_steps, now)
        self._set_lrs(map(min, now, cooldown.lrs_at(self._optimizer_steps, self._floor)))
        self._note_lowered(now, as_floats(self._rates()))

    # ---- looking ----------------------------------------------------------------------------

    def _begin_log(self) -> None:
        """Give the settings and a cooldown to a log, as ``JsonLinesLog`` is one."""
        self._described_to_log = True
        begin = getattr(self.on_reading, "begin", None)
        if begin is not None:
            begin(self._described())

    def _described(self) -> dict[str, Any]:
        """Return what this scheduler was made with, for logs and titles of pictures."""
        described = {"scheduler": type(self).__name__, **self._all_settings()}
        described["lr"] = as_floats(self.base_lrs)
        if self._cooldown is not None:
            begin, steps, shape, _ = self._cooldown
            described["cooldown"] = {"begin": begin, "num_steps": steps, "shape": shape}
        return described

    def plot(self, path: Any = None) -> matplotlib.figure.Figure:
        """Draw what was measured, why rates were lowered or kept, and the learning rates.

        Args:
            path: where to save the picture, if anywhere.

        Raises:
            ImportError: matplotlib is not installed; it comes with ``autodrop_ext[plot]``.
            ValueError: nothing has been measured yet.
        """
        from ..plotting.run import plot_run

        records = [decision.as_dict() for decision in self.history]
        return plot_run(records, settings=self._described(), path=path)

    @contextlib.contextmanager
    def averaged_parameters(self) -> Iterator[bool]:
        """Within the block the parameters hold their average over the run, weighted to its end.

        For evaluation, and for saving a model that is to be used::

            with scheduler.averaged_parameters():
                evaluate(model)

        Save what a run is to be resumed from outside of the block. Afterwards the parameters have
        their bits back, also after an exception. A step of the optimizer, :meth:`step`,
        :meth:`state_dict` and another block end the block before, with a warning: a Ctrl-C may have
        struck right where a block ends, and then they give the parameters their own bits back.

        Averaged are the parameters of the optimizer, whatever ``params=`` measures, and those of
        other optimizers that it measures; master weights are not. The average takes 4 bytes a
        parameter, and within the block there is a copy of the parameters. It weighs the parameters
        after step ``s`` of ``t`` in proportion to ``s**7`` (Shamir and Zhang 2013, section 4).
        Statistics of batch normalisation belong to the parameters of the last step: measure them
        again within the block with ``torch.optim.swa_utils.update_bn(loader, model)``, and keep
        copies of them if training goes on. If parameters are sharded, all ranks have to enter the
        block, which takes a collective.

        Yields:
            True if the parameters hold the average; False, with one warning for each reason, if
            they keep their own values, on all ranks alike.

        Raises:
            RuntimeError: the scheduler was made with ``average=False``.
        """
        if self._mean is None:
            raise RuntimeError(
                "averaged_parameters: expected a scheduler that was made with average=True, got "
                f"average={self.average!r}"
            )
        self._end_block()
        problem = self._problem_of_average(self._mean)
        if problem is not None:
            self._warnings.once(problem, f"averaged_parameters() changed nothing: {problem}")
            yield False
            return
        with self._mean.swapped() as held:
            yield held

    def _problem_of_average(self, mean: ParameterAverage) -> str | None:
        """Return why parameters cannot hold the average, or None; equal on all ranks."""
        if any("train_mode" in group for group in self.optimizer.param_groups):
            return "a schedule-free optimizer has its own average; call optimizer.eval()"
        if zero_optimizer_of(self.optimizer) is not None:
            return "DeepSpeed's optimizer holds float32 copies of the model's parameters"
        problem = mean.problem()
        if not self.meter.same_on_all_ranks((problem is None, mean.steps, mean.updates)):
            return "ranks hold parts of the model, and have averages of different steps"
        if problem is None:
            return None
        return f"there is no average of the present parameters ({problem})"

    def close(self) -> None:
        """Take the hooks off the optimizer and free the sums. The learning rates stay."""
        super().close()
        self.meter.close()

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: settings, decisions, history and sums.

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. Learning
        rates are restored by the *optimizer's* ``load_state_dict``, as with torch's schedulers.
        Called by another thread, it waits for the end of a step. Called by a signal's handler in
        the middle of one, it has the last whole step, and a meter whose open window is discarded.
        """
        self._end_block()
        with self._lock:
            cooldown = Cooldown.saved(self._cooldown)
            state = {**super().state_dict(), "cooldown": cooldown, "meter": self.meter.state_dict()}
            if self._mean is not None:
                state["mean"] = self._mean.state_dict()
        return state

    def _all_settings(self) -> dict[str, Any]:
        of_meter = {s.name: getattr(self.meter, s.name) for s in self._settings if not s.saved}
        return {**of_meter, **self._saved_settings()}

    def _read(self, state: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        loaded = super()._read(state, kept)
        lows, groups = loaded["min_lr"], len(loaded["base_lrs"])
        if "min_lr" in kept:
            lows = lows[:groups]
        if not isinstance(lows, list) or len(lows) != groups:
            raise ValueError(
                f"state_dict['min_lr']: expected a value for each of the {groups} param groups of "
                f"state_dict['base_lrs'], got {lows!r}"
            )
        # Groups may have been added after the state was saved.
        loaded["min_lr"] = [*lows, *self.min_lr[groups:]]
        loaded["base_lrs"] = [*loaded["base_lrs"], *as_floats(self.base_lrs[groups:])]
        form: dict[str, Any] = {"cooldown": Later(inside(COOLDOWN_FORM), None)}
        if self._averages_run and loaded["average"]:
            form = {**form, "mean": Later(checked_average, None)}
        loaded |= load(state, form)
        cooldown = loaded["cooldown"]
        loaded["cooldown"] = None
        if cooldown is not None and cooldown["num_steps"] > 0:
            loaded["cooldown"] = Cooldown(**cooldown)
            steps = loaded["optimizer_steps"]
            if cooldown["begin"] > steps:
                raise ValueError(
                    "state_dict['cooldown']['begin']: expected at most "
                    f"optimizer_steps={steps}, got {cooldown['begin']}"
                )
        # All of the meter's state is checked by the meter, which loads it or changes nothing.
        loaded["meter"] = load(state, {"meter": lambda name, value: value})["meter"]
        name, possible = "state_dict['meter']", self._possible_windows(loaded)
        window = load(loaded["meter"], {"window": checks.at_least(1)}, name)["window"]
        if window not in possible:
            raise ValueError(
                f"{name}['window']: expected this scheduler's window="
                f"{' or '.join(map(str, possible))}{self._window_follows_from}, got {window}"
            )
        return loaded

    def _possible_windows(self, loaded: Mapping[str, Any]) -> Sequence[int]:
        """Return the windows that the meter of a saved state may have."""
        return [loaded.get("window", 1)]

    def _take_over_average(self, saved: Mapping[str, Any] | None) -> None:
        if not self.average:
            self._mean = None
            return
        self._mean = self._mean or ParameterAverage(self._named)
        problem = self._mean.restore_state(saved) if saved is not None else "none was saved"
        if problem is not None:
            self._warnings.once("average", f"the average over the run starts over ({problem})")

    def _take_over(self, loaded: dict[str, Any]) -> None:
        self.meter.load_state_dict(loaded["meter"], name="state_dict['meter']")
        super()._take_over(loaded)
        self._take_cooldown(loaded["cooldown"])
        if self._averages_run:
            self._take_over_average(loaded.get("mean"))
        self._decided = self._newest_window()

    def _newest_window(self) -> int | None:
        """Return the window of the meter's newest reading."""
        return self.meter.history[-1].window if self.meter.history else None


def _to_average(trained: ParameterSource, meter: AngularVelocity) -> list[tuple[str, Tensor]]:
    """Return the parameters of the optimizer, and those of other ones that are measured, too.

    Master weights are not: averaged is what the model is evaluated with.
    """
    named = trained.named()
    held = {id(p) for _, p in named}
    others = [(n, p) for n, p in meter.named_parameters() if isinstance(p, nn.Parameter)]
    return [*named, *((f"measured: {name}", p) for name, p in others if id(p) not in held)]


def _lower(lr: float | Tensor, factor: float, floor: float) -> float | None:
    """Return ``max(floor, factor * lr)`` in the rate's own precision; None if that is not lower."""
    now = float(lr)
    lower = in_precision_of(lr, max(floor, factor * now))
    return lower if lower < now else None


def _check_one_rate(optimizer: Optimizer, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if param groups would get different rates and the optimizer refuses them.

    D-Adaptation and Prodigy estimate one distance ``d`` for all groups, after ``k`` steps.
    """
    groups = optimizer.param_groups
    if len(groups) < 2 or not all({"d", "k"} <= group.keys() for group in groups):
        return
    for name in ("per_group", "min_lr"):
        value = settings.get(name)
        if value is True or (isinstance(value, list) and len(set(value)) > 1):
            raise ValueError(
                f"{name}: expected the same rate for all param groups, because "
                f"{type(optimizer).__qualname__} accepts no others, got {value!r}"
            )


def _one_for_each(min_lr: float | list[float], groups: int) -> list[float]:
    values = min_lr if isinstance(min_lr, list) else [min_lr] * groups
    if len(values) != groups:
        raise ValueError(
            f"min_lr: expected one number or {groups}, one per param group, got {len(values)}"
        )
    return values
