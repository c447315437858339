"""Where the numbers go: a progress line, `metrics.jsonl`, TensorBoard."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.files import write_atomically
from dalle2_jax.evaluation.curves import METRICS_FILE, read_records


class MetricsWriter:
    """Appends one JSON object a call to `metrics.jsonl` and the same numbers to TensorBoard; a context manager.

    Opened at the step that training goes on from, it drops later lines, so that a run that was stopped and resumed
    leaves the file of one that was not. With several processes only one is `enabled`.
    """

    def __init__(self, stage_dir: Path, step: int = 0, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        self.path = stage_dir / METRICS_FILE
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(stage_dir), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records numbers of one kind (`"train"`, `"validation"`) at one step."""
        if not self._enabled:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """Shows a picture, uint8 [h, w, 3], in TensorBoard."""
        if self._enabled:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_recorded(stage_dir: Path, step: int, kind: str) -> bool:
    """Whether `metrics.jsonl` has numbers of one kind at one step."""
    records = read_records(stage_dir / METRICS_FILE)
    return any((record["step"], record["kind"]) == (step, kind) for record in records)


def duration(seconds: float) -> str:
    """`1:02:03`, `12:34` or `0:07`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Prints one plain line a logging interval: step, images/s, loss, gradient norm, rate, time left."""

    def __init__(self, name: str, steps: int, batch_size: int, log: Callable[[str], None]):
        self.name, self.steps, self.batch_size, self.log = name, steps, batch_size, log

    def line(self, step: int, values: Mapping[str, float], seconds_a_step: float, skipped: int) -> None:
        """`values` are means over the interval; `skipped` counts the whole stage."""
        parts = [
            f"{self.name} {step}/{self.steps}",
            f"{self.batch_size / seconds_a_step:.0f} images/s",
            f"loss {values['loss']:.4f}",
            f"gradient {values['gradient_norm']:.3g}",
            f"rate {values['learning_rate']:.2e}",
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
    """The steps since the last line was printed, and how many of the last ones were skipped without a break."""

    def __init__(self) -> None:
        self._reports: list[Mapping[str, Any]] = []
        self.skipped_in_a_row = 0

    def add(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Adds reports that are on the host already."""
        for report in reports:
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
        self._left_out = 0

    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def compiled(self) -> None:
        """Called after the first step, whose time is mostly compilation."""
        self._mark, self._left_out = time.monotonic(), 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside counts towards `seconds` but not towards `seconds_a_step`."""
        entered = time.monotonic()
        yield
        self._mark += time.monotonic() - entered

    def seconds_a_step(self, steps: int) -> float:
        """The mean over the `steps` since the last call."""
        now, counted = time.monotonic(), steps - self._left_out
        # An interval of the first step alone can only be timed with its compilation.
        result = (now - self._mark) / counted if counted else now - self._start
        self._mark, self._left_out = now, 0
        return max(result, 1e-9)
