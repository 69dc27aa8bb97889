"""The sums of a window where only a part of the parameters is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..angle import FREEDOM_A_MOVER, movers, standard_error
from ..ops.device_sums import DeviceSums, NamedArenas
from ..ops.interface import Form, Sums
from ..ops.plan import FloatArray, Plan, Ranges
from ..ops.window_sums import COVARIANCES, WANDERING, Extra, Watched, WindowSums, by_device
from .draw import DrawnChunks, Sample, draw, num_chunks
from .error import SQUARES, margin, scatter, squares, variances
from .survey import Survey, num_windows
from .wandering import Wandering


def sums_of(sample: float | None, seed: int) -> Callable[..., WindowSums]:
    """What makes the sums of a meter: of everything, or of a sample."""
    if sample is None:
        return WindowSums
    return functools.partial(SampledSums, sample=Sample(sample, seed))


class SampledSums(WindowSums):
    """Sums of a random choice of chunks, drawn by how far each chunk moves.

    A survey comes first: over at most eight windows it measures the motion of every chunk, and no
    sums are taken. Then the sample is drawn and the arenas are made. A start over leaves the survey
    as it is, because the other ranks start over at the end of each window that one rank surveys.

    Args:
        tensors: what the chunks are drawn from.
        backend: "auto" or a name.
        sample: how much is read, and the seed.
        drawn: state of saved sums that will be loaded, with the motion that an earlier survey
            found; None for a survey.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`WindowSums`.
    """

    def __init__(
        self,
        tensors: Sequence[Watched],
        backend: str,
        drawn: Mapping[str, Any] | None = None,
        *,
        sample: Sample,
    ) -> None:
        super().__init__([], backend)
        self.sample = sample
        self._drawn: list[DrawnChunks] = []
        self._wandering: list[Wandering] = []
        self._motion: Mapping[str, FloatArray] = {}
        # Plans of everything: they find repeated tensors, and cost no arenas.
        self._members: list[tuple[Plan, list[Watched]]] = []
        for device, members in by_device(tensors).items():
            plan = Plan([(tensors[i].name, tensors[i].tensor) for i in members], device)
            kept = [members[segment.index] for segment in plan.segments]
            self.kept.append(kept)
            self._members.append((plan, [tensors[i] for i in kept]))
        elements = [watched.elements for watched in tensors]
        known = None if None in elements else sum(e for e in elements if e is not None)
        self._survey_windows = num_windows(known)
        self._survey: Survey | None = None
        if drawn is not None and drawn["sized"]:
            self._draw({name: moved.double().numpy() for name, moved in drawn["sizes"].items()})
        else:
            self._begin_survey()

    # ---- what is read -----------------------------------------------------------------------

    @property
    def fraction(self) -> float:
        """Part of the elements that is read."""
        return self.sample.fraction

    @property
    def device_bytes(self) -> int:
        """Bytes of the arenas and of the survey's copies on all devices together."""
        return super().device_bytes + (0 if self._survey is None else self._survey.device_bytes)

    @property
    def digests(self) -> list[str]:
        """For each device, a hash of the chunks that are read."""
        return [drawn.digest for drawn in self._drawn]

    def extras(self) -> list[Extra]:
        """The error of the angle."""
        return [SamplingError()]

    def _counted(self, device: DeviceSums) -> FloatArray:
        """Equally weighted elements that are worth as much as those that are read (Kish)."""
        drawn, count = self._drawn[self.devices.index(device)], len(device.plan.segments)
        all_of_them = np.bincount(drawn.tensor, drawn.expansion * drawn.length, count)
        squares = np.bincount(drawn.tensor, drawn.expansion**2 * drawn.length, count)
        worth: FloatArray = np.maximum(all_of_them**2 / np.maximum(squares, 1.0), 1.0)
        return worth

    def errors(self) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
        """For each device, what the error of the angle is made of.

        Covariances and products of the estimates, and how far motion wanders; see
        :class:`SamplingError`.
        """
        for device, drawn, wandering in zip(
            self.devices, self._drawn, self._wandering, strict=True
        ):
            rows, weights = device.rows(), device.plan.tensor_weights
            covariances = variances(scatter(rows, drawn), drawn.population, drawn.taken)
            of_stratum = weights[drawn.stratum_tensor]
            products = squares(covariances, drawn.taken, of_stratum)
            yield of_stratum @ covariances, products, weights @ wandering.table(rows)

    # ---- a window ---------------------------------------------------------------------------

    def begin_window(self) -> None:
        """Go on with the survey; after it, draw the sample."""
        if self._survey is None:
            return
        if not self._survey.done:
            self._survey.step()
        if self._survey.done:
            # The survey goes last, so that an interrupt before leaves the draw to be repeated.
            self._draw(self._survey.motion)
            self._survey = None

    def _begin_survey(self) -> None:
        self._survey = Survey([plan for plan, _ in self._members], self._survey_windows)

    def add(self, form: Form, *, first: bool) -> None:
        """Take a snapshot of the chunks, unless the survey goes on."""
        if self._survey is None:
            super().add(form, first=first)

    def close(self, k: int) -> Sums | None:
        """The sums of a window, expanded to all chunks; None during the survey."""
        return None if self._survey is not None else super().close(k)

    def _error_columns(self, device: DeviceSums) -> FloatArray:
        index = self.devices.index(device)
        drawn, rows = self._drawn[index], device.rows()
        covariances = variances(scatter(rows, drawn), drawn.population, drawn.taken)
        count = len(device.plan.segments)
        columns = [np.bincount(drawn.stratum_tensor, c, count) for c in covariances.T]
        return np.concatenate(
            [np.stack(columns, axis=1), self._wandering[index].table(rows)], axis=1
        )

    def _draw(self, motion: Mapping[str, FloatArray]) -> None:
        """Choose the chunks and make their arenas."""
        drawn, made, wandering = [], [], []
        for plan, members in self._members:
            lengths = [segment.flat.numel() for segment in plan.segments]
            of_tensor = [motion.get(watched.name) for watched in members]
            # The motion of other tensors, as a checkpoint may hold it, is of no use.
            fitting = [
                moved
                for moved, n in zip(of_tensor, lengths, strict=True)
                if moved is not None and len(moved) == num_chunks(n)
            ]
            surveyed = fitting if len(fitting) == len(lengths) else None
            labels = [watched.label for watched in members]
            chunks = draw(lengths, labels, self.sample, surveyed)
            ranges = Ranges(chunks.tensor, chunks.start, chunks.length, chunks.expansion)
            drawn.append(chunks)
            still = [np.zeros(num_chunks(n)) for n in lengths]
            wandering.append(Wandering(chunks, still if surveyed is None else surveyed))
            made.append(self._make_device(plan.device, members, ranges))
        self._motion, self._drawn, self._wandering = motion, drawn, wandering
        self.devices = made

    # ---- checkpoints ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Fraction, seed, digests of the chunks, and the motion that they were drawn by."""
        motion = {} if self._survey is not None else self._motion
        return {
            "fraction": self.sample.fraction,
            "seed": self.sample.seed,
            "drawn": self.digests,
            "sized": self._survey is None,
            # The survey has rounded the motion to float32.
            "sizes": {k: torch.from_numpy(v.astype(np.float32)) for k, v in motion.items()},
        }

    def problem_of(self, drawn: Mapping[str, Any], arenas: NamedArenas) -> str | None:
        """Why :meth:`load` cannot take saved arenas, or None."""
        given, seed = drawn["fraction"], drawn["seed"]
        if (given, seed) != (self.sample.fraction, self.sample.seed):
            return (
                f"it has sample={given:g} and seed={seed}, not {self.sample.fraction:g} and "
                f"{self.sample.seed}"
            )
        if self._survey is not None:
            return "it has no survey of how far the chunks move"
        if list(drawn["drawn"]) != self.digests:
            return "the parameters have other shapes, types or parts, so that others are drawn"
        return self._misfit(arenas)


class SamplingError:
    """Standard error and 95 % margin of a sampled angle, from numbers that ranks add up.

    The numbers are the six covariances of the totals, 21 sums of products for the degrees of
    freedom, and four that say how far motion wanders.
    """

    size = COVARIANCES + SQUARES + WANDERING

    def local(self, sums: WindowSums) -> list[float]:
        """This rank's numbers after a close."""
        assert isinstance(sums, SampledSums), "made by SampledSums.extras"
        numbers = np.zeros(self.size)
        for parts in sums.errors():
            numbers += np.concatenate(parts)
        plain: list[float] = numbers.tolist()
        return plain

    def fields(self, totals: Sums, numbers: Sequence[float]) -> dict[str, Any]:
        """``standard_error`` and ``margin`` of a reading, degrees; NaN where they are unknown."""
        covariances, rest = numbers[:COVARIANCES], numbers[COVARIANCES:]
        products, wandering = rest[:SQUARES], rest[SQUARES:]
        count, unread = movers(wandering), wandering[0]
        three = (totals.dot, totals.norm, totals.previous_norm)
        error = standard_error(*three, covariances)
        # Chunks without any scatter, such as one that moves among many that stand still, say
        # nothing about those that are not read.
        if count is None or (error == 0 and unread > 0):
            return self.unknown()
        freedom = FREEDOM_A_MOVER * count
        return {"standard_error": error, "margin": margin(*three, covariances, products, freedom)}

    def unknown(self) -> dict[str, Any]:
        """The fields of a reading whose error is not known."""
        return {"standard_error": math.nan, "margin": math.nan}
