"""How fast steps are, and the line that says so."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def duration(seconds: float) -> str:
    """`1:02:03`, `12:34` or `0:07`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class Speed:
    """How fast an interval's steps were.

    images_per_second: of the whole batch. data_wait: the share of the time in which the devices may have waited for a
    batch (see `Clock.fetch`). mfu: the operations that the steps need (`train.step.flops.model_flops`), as a share of
    what the devices' bfloat16 peak allows (`train.step.peaks`); None where that is not known.
    """

    seconds_per_step: float
    images_per_second: float
    data_wait: float
    mfu: float | None = None

    def numbers(self) -> dict[str, float]:
        """For the files and TensorBoard; without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def words(self) -> list[str]:
        """`123 ms/step`, `1041 images/s`, `MFU 41%`, `data 0.3%`."""
        seconds = self.seconds_per_step
        shown = [f"{seconds:.2f} s/step" if seconds >= 1 else f"{_digits(1000 * seconds)} ms/step"]
        shown.append(f"{_digits(self.images_per_second)} images/s")
        if self.mfu is not None:
            shown.append(f"MFU {_digits(100 * self.mfu)}%")
        return [*shown, f"data {_digits(100 * self.data_wait)}%"]


def _digits(value: float) -> str:
    """A whole number, with one decimal below ten."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


class Progress:
    """Prints one plain line a logging interval: step, speed, loss, gradient norm, time left."""

    def __init__(self, name: str, steps: int, log: Callable[[str], None]):
        self.name, self.steps, self.log = name, steps, log

    def line(
        self, step: int, values: Mapping[str, float], seconds_a_step: float, speed: Speed | None, skipped: int
    ) -> None:
        """`values` are means over the interval; `skipped` counts the whole stage; no speed: it is not known yet."""
        parts = [
            f"{self.name} {step}/{self.steps}",
            *(speed.words() if speed else ()),
            f"loss {values['loss']:.4f}",
            f"gradient {values['gradient_norm']:.3g}",
            f"{duration((self.steps - step) * seconds_a_step)} left",
        ]
        if skipped:
            parts.append(f"{skipped} skipped")
        self.log(" | ".join(parts))


def mean_of(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each number over the reports; what is not finite stays out unless nothing else is left."""

    def mean(values: list[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    return {name: mean([float(report[name]) for report in reports]) for name in reports[0]} if reports else {}


class History:
    """The steps since the last line was printed, how many of the last ones were skipped without a break, and in all.

    The count of all starts at that of the state that training goes on from.
    """

    def __init__(self) -> None:
        self._reports: list[Mapping[str, Any]] = []
        self.skipped = self.skipped_in_a_row = 0

    def add(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Adds reports that are on the host already."""
        for report in reports:
            self.skipped += int(report["skipped"])
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if report["skipped"] else 0
        self._reports.extend(reports)

    def take(self) -> dict[str, float]:
        """Means over what was added, with the last learning rate and the number of `steps`; starts anew."""
        reports, self._reports = self._reports, []
        values = mean_of(reports)
        return {**values, "learning_rate": float(reports[-1]["learning_rate"]), "steps": len(reports)}


class Clock:
    """Seconds in the stage over all its starts, and seconds a step without compilation and pauses."""

    def __init__(self) -> None:
        self.before = 0.0
        self._start = self._mark = time.monotonic()
        self._left_out, self._waited = 0, 0.0

    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def compiled(self) -> None:
        """Called after the first step, whose time is mostly compilation."""
        self._mark, self._left_out, self._waited = time.monotonic(), 1, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside counts towards `seconds` but not towards a lap."""
        entered = time.monotonic()
        yield
        self._mark += time.monotonic() - entered

    @contextlib.contextmanager
    def fetch(self, idle: Callable[[], bool]) -> Iterator[None]:
        """Time inside is a wait for data if the devices are `idle` at its end.

        If they are not, the batch came in time. If they are, they have waited since they became idle, which may be
        later than the fetch began: all of it counts, so that the wait is never taken for less than it is.
        """
        entered = time.monotonic()
        yield
        if idle():
            self._waited += time.monotonic() - entered

    def lap(self, steps: int) -> tuple[float, float | None]:
        """The mean seconds a step over the `steps` since the last call, and the share of them waited for data.

        An interval of the first step alone can only be timed with its compilation: its share is None.
        """
        now, counted = time.monotonic(), steps - self._left_out
        seconds = max((now - self._mark) / counted if counted else now - self._start, 1e-9)
        share = min(self._waited / (counted * seconds), 1.0) if counted else None
        self._mark, self._left_out, self._waited = now, 0, 0.0
        return seconds, share
