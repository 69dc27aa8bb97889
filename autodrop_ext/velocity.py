"""The meter: angular velocity of the parameters, one reading a window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from . import rounding
from .arenas import Arenas, Form
from .backends import Sums, check_name, select
from .faults import Faults
from .parameters import Named, ParameterSource, signature
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

    Args:
        params: tensors, ``(name, tensor)`` pairs, param groups, an optimizer, or a function that
            returns one of the first three and is asked again at each end of a window. Frozen
            parameters are not watched, tied ones count once.
        window: ``k``, optimizer steps per window, at least 1.
        sample: None; reading a random part of the parameters is not in this version.
        seed: of the sample.
        backend: "auto", or the name of one (``autodrop doctor`` lists them).
        process_group: None; sharded parameters are not in this version.
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
        if process_group is not None:
            raise NotImplementedError(
                "process_group: expected None (this version measures unsharded parameters), "
                f"got {process_group!r}"
            )
        check_name(backend)
        self.window = window
        self.steps = 0
        self.windows = 0
        self.history: list[Reading] = []
        self._source = ParameterSource(params)
        self._source.named()  # wrong arguments fail here, not at the first step
        self._backend = backend
        self._fixed_form: Form | None = None if form == "auto" else form
        self._arenas: list[Arenas] | None = None
        self._signature: list[list[Any]] = []
        self._restore: dict[str, Any] | None = None
        self._faults = Faults()
        self._fresh = True
        self._forget()

    # ---- observing --------------------------------------------------------------------------

    def observe(self) -> Reading | None:
        """Take the parameters as they are now; call once after each optimizer step.

        Returns:
            A reading at the end of every window from the third on, otherwise None.

        Raises:
            ValueError: there is nothing to watch, or parameters partly overlap in memory.
            RuntimeError: no memory for the arenas.
        """
        if self._position == 0 or self._arenas is None:
            self._follow_parameters()
        for arenas in self._arenas or ():
            if self._fresh:
                arenas.begin(self._fixed_form or "delta")
            else:
                arenas.accumulate(first=self._position == 0)
        self._fresh = False
        self.steps += 1
        self._position += 1
        return self._close_window() if self._position == self.window else None

    def close(self) -> None:
        """Free the arenas. A later :meth:`observe` starts over."""
        self._arenas = None
        self._forget()

    @property
    def form(self) -> Form | None:
        """How the sums are held now: "sum" or "delta"; None before the first step."""
        return self._arenas[0].form if self._arenas else None

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas on all devices together; 0 before the first step."""
        return sum(12 * arenas.plan.arena_elements for arenas in self._arenas or ())

    # ---- following the parameters -----------------------------------------------------------

    def _follow_parameters(self) -> None:
        """Build the plans, or rebuild them if the parameters are not those they were made of."""
        tensors = self._source.tensors()
        if self._arenas is not None:
            if signature(tensors) == self._signature:
                return
            self._discard()
        self._build()
        self._signature = signature(tensors)

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
        named = self._source.named()
        if not named and self.steps == 0:
            raise ValueError(
                "params: expected at least one trainable parameter, got none "
                "(is requires_grad False everywhere?)"
            )
        by_device: dict[torch.device, list[Named]] = {}
        for name, parameter in named:
            if parameter.is_meta:
                raise TypeError(f"{name}: expected a parameter with data, got one on device 'meta'")
            by_device.setdefault(parameter.device, []).append((name, parameter))
        self._arenas = [
            Arenas(Plan(group, device), select(self._backend, device.type))
            for device, group in by_device.items()
        ]
        if self._restore is not None:
            self._load_arenas(self._restore)
            self._restore = None

    # ---- closing a window -------------------------------------------------------------------

    def _close_window(self) -> Reading | None:
        if signature(self._source.tensors()) != self._signature:
            self._discard()
            return None
        assert self._arenas is not None
        sums = Sums(0.0, 0.0, 0.0, 0.0)
        for arenas in self._arenas:
            sums += arenas.close(self.window)
        self.windows += 1
        self._position = 0
        if not all(map(math.isfinite, sums)):
            self._faults.not_finite(self._arenas, self.windows - 1, WINDOWS_FOR_ANGLE)
            self._forget()
            return self._keep(self._undefined())
        self._usable += 1
        if self._usable >= 2:
            self._faults.watch_displacement(sums, self._arenas)

        oldest, shared = self._variances
        newest = rounding.mean_variance(self.window, sums, self.form or "delta")
        self._variances = (shared, newest)
        if self._usable < WINDOWS_FOR_ANGLE:
            return self._keep(self._undefined())
        error = rounding.angle_error(sums, (oldest, shared, newest), self._num_elements)
        self._choose_form(sums, error)
        return self._keep(self._reading(sums, error))

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

    def _choose_form(self, sums: Sums, rounding_error: float) -> None:
        """Turn to the form that the next windows need, without losing one."""
        if self._fixed_form is not None or self._arenas is None:
            return
        if self.form == "sum":
            if rounding_error > CONVERT_TO_DELTA:
                for arenas in self._arenas:
                    arenas.to_delta(self.window)
            return
        in_sum_form = rounding.mean_variance(self.window, sums, "sum")
        variances = (in_sum_form, in_sum_form, in_sum_form)
        if rounding.angle_error(sums, variances, self._num_elements) < CONVERT_TO_SUM:
            for arenas in self._arenas:
                arenas.to_sum(self.window)
            # Rounding the two sums once is the error of a window of one step.
            rounded = rounding.mean_variance(1, sums, "sum")
            self._variances = tuple(max(v, rounded) for v in self._variances)  # type: ignore[assignment]

    @property
    def _num_elements(self) -> int:
        return sum(arenas.plan.num_elements for arenas in self._arenas or ())

    # ---- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts, form and, as CPU clones by parameter name, the arenas (12 bytes a parameter).

        Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads it. The
        history is not part of it.
        """
        state: dict[str, Any] = {
            "version": 1,
            "window": self.window,
            "steps": self.steps,
            "windows": self.windows,
            "position": self._position,
            "usable": self._usable,
            "fresh": self._fresh,
            "still": self._faults.still_windows,
            "variances": list(self._variances),
            "form": self.form,
            "arenas": {},
        }
        if self._restore is not None:
            state |= self._restore
        for arenas in self._arenas or ():
            state["arenas"] |= arenas.named()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit, with its window.

        Where the state has no arenas, or they do not fit the parameters, counts are restored, the
        meter warms up again, and a warning says so.

        Raises:
            ValueError: not a state of this class; nothing has been changed then.
        """
        problem = _problem_of(state_dict)
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
        if not state_dict["arenas"]:
            self._faults.cannot_continue("it was saved without the arenas", WINDOWS_FOR_ANGLE)
        else:
            self._restore = {"form": state_dict["form"], "arenas": state_dict["arenas"]}
            self._fresh = False
            self._position = state_dict["position"]
            self._usable = state_dict["usable"]
            self._faults.still_windows = state_dict["still"]
            before, last = state_dict["variances"]
            self._variances = (before, last)

    def _load_arenas(self, restore: dict[str, Any]) -> None:
        saved: Mapping[str, Mapping[str, Tensor]] = restore["arenas"]
        for arenas in self._arenas or ():
            problem = arenas.misfit(saved)
            if problem is not None:
                self._faults.cannot_continue(problem, WINDOWS_FOR_ANGLE)
                self._forget()
                return
        for arenas in self._arenas or ():
            arenas.load(restore["form"], saved)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_arenas"] = None
        state["_signature"] = []
        state["_restore"] = self.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_restore")
        self.__dict__.update(state)
        self._restore = None
        self.load_state_dict(saved)


def _problem_of(state: Any) -> str | None:
    """Why a state cannot be loaded, or None."""
    if not isinstance(state, Mapping):
        return type(state).__name__
    if state.get("version") != 1:
        return f"version {state.get('version')!r} (this release reads version 1)"
    kinds: dict[str, type | tuple[type, ...]] = {
        "window": int,
        "steps": int,
        "windows": int,
        "position": int,
        "usable": int,
        "fresh": bool,
        "still": int,
        "variances": (list, tuple),
        "form": (str, type(None)),
        "arenas": Mapping,
    }
    for key, kind in kinds.items():
        if key not in state:
            return f"no entry {key!r}"
        if not isinstance(state[key], kind):
            return f"{key}={state[key]!r}"
    return None
