"""Every schedule that is compared: its settings, where they come from, and how it is made.

The settings here are the only ones; a run may replace them one by one. What is given in epochs of
the papers' 200 is scaled to the length of the run, because the runs here differ in length by ten.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler

from autodrop_ext import AutoDrop, EpochAutoDrop
from autodrop_ext.schedulers.auto_window import window_for

from .baselines import HypergradientAdamW, HypergradientSGD, TrainableLearningRate
from .driver import Driver
from .recipe import Recipe

_LAST = 0.01  # share of the initial rate at which schedules with a free end are made to end


@dataclass
class Setup:
    """What a schedule is made for.

    Attributes:
        model: whose parameters are trained.
        recipe: optimizer and its settings.
        lr: initial rate, the highest one of those schedules that rise first.
        epochs, steps_per_epoch: length of the run.
        settings: of the schedule.
        on_reading: takes AutoDrop's readings.
        on_average: called after EpochAutoDrop has replaced the parameters by their average.
        warmup_steps: over which the rate rises linearly before the schedule takes over.
    """

    model: nn.Module
    recipe: Recipe
    lr: float
    epochs: int
    steps_per_epoch: int
    settings: dict[str, Any]
    on_reading: Callable[[Any], object] | None = None
    on_average: Callable[..., object] | None = None
    warmup_steps: int = 0

    @property
    def steps(self) -> int:
        """Of the run, without its warm-up; at least 1."""
        return max(1, self.epochs * self.steps_per_epoch - self.warmup_steps)

    @property
    def window(self) -> int:
        """AutoDrop's ``k`` in this run: the setting, or the recipe's, or the rule's."""
        window = self.settings["window"]
        if window is None:
            window = self.recipe.window or "auto"
        if window == "auto":
            # Without the floor of 16 of the package's window="auto": short runs would never drop.
            window = window_for(
                self.steps,
                factor=self.settings["factor"],
                min_samples=self.settings["min_samples"],
            )
        return int(window)

    def plain_settings(self) -> dict[str, Any]:
        """For JSON, with AutoDrop's window as it is in this run."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings.items()}
        return {**settings, "window": self.window} if "window" in settings else settings

    def optimizer(self) -> Optimizer:
        """The recipe's, at the initial rate."""
        r, params = self.recipe, self.model.parameters()
        if r.optimizer in ("adam", "adamw"):
            kind = optim.AdamW if r.optimizer == "adamw" else optim.Adam
            return kind(
                params,
                lr=self.lr,
                betas=r.betas,
                eps=r.eps,
                weight_decay=r.weight_decay,
                fused=True,
            )
        return optim.SGD(
            params,
            lr=self.lr,
            momentum=r.momentum,
            nesterov=r.nesterov,
            weight_decay=r.weight_decay,
            fused=True,
        )


@dataclass(frozen=True)
class Schedule:
    """One way to set the learning rate.

    Attributes:
        label: in tables and pictures.
        source: where the settings come from.
        build: makes it.
        settings: by name; None where :attr:`build` computes it from the length of the run.
        search: values that are tried together with each initial rate when settings are chosen.
        rates: whether initial rates are tried at all.
        warms: :attr:`build` makes the warm-up by itself.
    """

    label: str
    source: str
    build: Callable[[Setup], Driver]
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rates: bool = True
    warms: bool = False

    def driver(self, setup: Setup) -> Driver:
        """The schedule for a run, with the run's warm-up."""
        driver = self.build(setup)
        if not self.warms:
            driver.warmup_steps = setup.warmup_steps
        return driver

    def settings_with(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with some replaced.

        Raises:
            ValueError: the schedule has no setting of that name.
        """
        unknown = sorted(set(changes) - set(self.settings))
        if unknown:
            names = ", ".join(self.settings) or "none"
            raise ValueError(f"settings: {self.label} has {names}; got {', '.join(unknown)}")
        return {**self.settings, **changes}


def _constant(s: Setup) -> Driver:
    return Driver(s.optimizer())


def _autodrop(s: Setup) -> Driver:
    optimizer = s.optimizer()
    settings = {**s.settings, "window": s.window}
    return Driver(
        optimizer,
        AutoDrop(
            optimizer,
            **settings,
            buckets=None,
            warmup_steps=s.warmup_steps,
            on_reading=s.on_reading,
        ),
    )


def _epoch_autodrop(s: Setup) -> Driver:
    optimizer = s.optimizer()
    settings = dict(s.settings)
    if settings["delay"] is None:
        settings["delay"] = max(1, round(s.epochs * 20 / 200))
    if settings["threshold"] is None:
        settings["threshold"] = 0.01 if s.epochs >= 100 else settings["max_threshold"]
    scheduler = EpochAutoDrop(
        optimizer, **settings, on_reading=s.on_reading, on_average=s.on_average
    )
    return Driver(optimizer, scheduler, "epoch")


def _step(s: Setup) -> Driver:
    optimizer = s.optimizer()
    milestones = [round(part * s.epochs) for part in s.settings["milestones"]]
    scheduler = lr_scheduler.MultiStepLR(optimizer, milestones, gamma=s.settings["factor"])
    return Driver(optimizer, scheduler, "epoch")


def _exponential(s: Setup) -> Driver:
    optimizer = s.optimizer()
    gamma = s.settings["gamma"] or _LAST ** (1 / s.epochs)
    return Driver(optimizer, lr_scheduler.ExponentialLR(optimizer, gamma), "epoch")


def _linear(s: Setup) -> Driver:
    optimizer = s.optimizer()
    return Driver(optimizer, lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=s.steps))


def _cosine(s: Setup) -> Driver:
    optimizer = s.optimizer()
    return Driver(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=s.steps))


def _plateau(s: Setup) -> Driver:
    optimizer = s.optimizer()
    patience = s.settings["patience"]
    if patience is None:
        patience = max(1, round(s.epochs * 10 / 200))
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=s.settings["factor"], patience=patience
    )
    return Driver(optimizer, scheduler, "loss")


def _clr(s: Setup) -> Driver:
    optimizer = s.optimizer()
    half = s.settings["half_cycle_epochs"] or max(1.0, min(10.0, s.epochs / 10))
    scheduler = lr_scheduler.CyclicLR(
        optimizer,
        base_lr=s.lr * s.settings["base"],
        max_lr=s.lr,
        step_size_up=max(1, round(half * s.steps_per_epoch)),
        mode="triangular2",
        cycle_momentum=False,
    )
    return Driver(optimizer, scheduler)


def _onecycle(s: Setup) -> Driver:
    optimizer = s.optimizer()
    scheduler = lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.steps + 1)
    return Driver(optimizer, scheduler)


def _hypergradient(s: Setup) -> Driver:
    r, params, beta = s.recipe, s.model.parameters(), s.settings["beta"]
    if r.optimizer in ("adam", "adamw"):
        if r.optimizer == "adam" and r.weight_decay:
            raise ValueError("recipe: HD has Adam without weight decay only, got some")
        return Driver(
            HypergradientAdamW(
                params, s.lr, beta, betas=r.betas, eps=r.eps, weight_decay=r.weight_decay
            )
        )
    return Driver(
        HypergradientSGD(
            params,
            s.lr,
            beta,
            momentum=r.momentum,
            nesterov=r.nesterov,
            weight_decay=r.weight_decay,
        )
    )


def _trainable(s: Setup) -> Driver:
    optimizer = s.optimizer()
    gap = max(s.settings["least_gap"], round(s.settings["gap_epochs"] * s.steps_per_epoch))
    return Driver(optimizer, TrainableLearningRate(optimizer, gap, bound=s.settings["bound"]))


def _schedule_free(s: Setup) -> Driver:
    schedulefree = _extra("schedulefree")
    r, params = s.recipe, s.model.parameters()
    settings = {
        "warmup_steps": s.warmup_steps or round(s.settings["warmup"] * s.steps),
        "weight_decay": r.weight_decay,
    }
    if r.optimizer in ("adam", "adamw"):
        optimizer = schedulefree.AdamWScheduleFree(
            params, lr=s.lr, betas=r.betas, eps=r.eps, **settings
        )
    else:
        # Its momentum does not multiply the step by 1 / (1 - momentum), as SGD's does.
        optimizer = schedulefree.SGDScheduleFree(
            params, lr=s.lr / (1 - r.momentum), momentum=r.momentum, **settings
        )
    return Driver(optimizer, averages=True)


def _prodigy(s: Setup) -> Driver:
    prodigyopt = _extra("prodigyopt")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
        optimizer = prodigyopt.Prodigy(
            s.model.parameters(),
            lr=1.0,
            d_coef=s.settings["d_coef"],
            weight_decay=s.recipe.weight_decay,
        )
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=s.steps)
    return Driver(
        optimizer, scheduler, lr=lambda: optimizer.param_groups[0]["d"] * _first_lr(optimizer)
    )


def _first_lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _extra(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"this schedule needs {name}: pip install 'autodrop_ext[bench]'", name=name
        ) from error


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule("constant", "", _constant),
    "autodrop": Schedule(
        "AutoDrop",
        "UAI 2024, section 4.1; window: 64 on CIFAR (Table 15), 640 on ImageNet, elsewhere "
        "the package's rule that it can reach 1/100 of the initial rate, without its floor of 16; "
        "exact angles, as the papers have them (buckets=None)",
        _autodrop,
        {
            "window": None,
            "factor": 0.95,
            "threshold": 0.1,
            "buffer_size": 10,
            "min_samples": 10,
            "kernel": "value",
            "min_lr": 0.0,
        },
        warms=True,
    ),
    "epoch-autodrop": Schedule(
        "EpochAutoDrop",
        "2021, section 4 (recommended setting); delay: 20 of 200 epochs; threshold: 0.01 degrees, "
        "but runs of under 100 epochs start at the upper bound, since 20 epochs never met 0.01; "
        "exact angles, which this threshold needs (buckets=None, the default)",
        _epoch_autodrop,
        {"factor": 0.2, "threshold": None, "max_threshold": 1.0, "delay": None, "min_lr": 1e-4},
    ),
    "step": Schedule(
        "step decay",
        "2021, Table 1: factor 0.2; after 60, 120 and 160 of 200 epochs, as the Wide ResNet paper "
        "has it, which both papers follow",
        _step,
        {"milestones": (0.3, 0.6, 0.8), "factor": 0.2},
    ),
    "exponential": Schedule(
        "exponential",
        "UAI 2024, section 6.1, searches gamma, a factor an epoch, from 0.8 to 0.999: so do the "
        "papers' models, and others with --search; else the gamma that ends at 1/100",
        _exponential,
        {"gamma": None},
    ),
    "linear": Schedule("linear", "to zero at the end of the run", _linear),
    "cosine": Schedule("cosine", "to zero at the end of the run", _cosine),
    "plateau": Schedule(
        "ReduceLROnPlateau",
        "torch's defaults (factor 0.1, patience 10 of 200 epochs), on the training loss",
        _plateau,
        {"factor": 0.1, "patience": None},
    ),
    "clr": Schedule(
        "CLR triangular2",
        "Smith 2017: from a quarter of the rate; half a cycle of 2 to 10 epochs, here a tenth of "
        "the run",
        _clr,
        {"base": 0.25, "half_cycle_epochs": None},
    ),
    "onecycle": Schedule("OneCycle", "torch's defaults; momentum cycles too", _onecycle),
    "hd": Schedule(
        "HD",
        "UAI 2024, section 6.1: beta out of 1e-3, 1e-4, 1e-5, searched as there",
        _hypergradient,
        {"beta": 1e-4},
        search={"beta": (1e-3, 1e-4, 1e-5)},
    ),
    "tlr": Schedule(
        "TLR",
        "UAI 2024, section 6.1: gap 0.33 epochs, bound 1/4; a gap of at least 50 steps, five times "
        "the memory of momentum 0.9: the movements of shorter ones go the same way by construction",
        _trainable,
        {"gap_epochs": 0.33, "least_gap": 50, "bound": 0.25},
    ),
    "schedule-free": Schedule(
        "schedule-free",
        "its authors' advice: with SGD at ten times the rate, warm-up (a twentieth of the run)",
        _schedule_free,
        {"warmup": 0.05},
        warms=True,
    ),
    "prodigy": Schedule(
        "Prodigy + cosine",
        "its authors' advice: rate 1 with cosine annealing, d_coef 0.5 to 2; an Adam also where "
        "the others run SGD",
        _prodigy,
        {"d_coef": 1.0},
        search={"d_coef": (0.5, 1.0, 2.0)},
        rates=False,
    ),
}
