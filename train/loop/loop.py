"""One loop for every stage: steps, logs, validation, previews, checkpoints, resume.

    result = train_stage(task, record, stage_dir, batches=make_iterator, mesh=make_mesh(), options=LoopOptions())

A stage that was stopped, killed or whose newest checkpoint is damaged goes on from the newest whole checkpoint by
itself, bit-equal to a run left alone: parameters, optimizer, average, key, step and the data iterator's position all
come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.checkpoint import CheckpointWriter, StageRecord, restore_latest, write_record
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.sharding import (
    DEFAULT_RULES,
    SMALLEST_SPLIT,
    Rules,
    batch_sharding,
    partition,
    processes,
    put_batch_on_devices,
    put_on_devices,
)
from train.config.recipe import Task
from train.loop.clock import Clock, History, Progress, Speed, duration
from train.loop.evaluate import Evaluator
from train.loop.metrics import MetricsWriter
from train.loop.profile import FOLDER, Profile
from train.loop.signals import StopSignals
from train.step.flops import model_flops
from train.step.peaks import PEAKS
from train.step.programs import Programs, make_programs
from train.step.state import abstract_state, create_state

HostBatch = Mapping[str, Any]

# In a row; one bad batch is skipped, a run that only skips has diverged.
MOST_SKIPPED = 50
# Steps the host may be ahead of the devices.
MOST_AHEAD = 2
# Steps between two looks, with several processes, at whether any of them has received a signal.
STEPS_BETWEEN_AGREEMENTS = 10


class BatchIterator(Protocol):
    """What the loop asks of the data: host batches, and a position as JSON. grain's iterators are such."""

    def __next__(self) -> HostBatch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Result:
    """How a stage ended: at which step, after how many seconds in all, and by which signal if it was stopped."""

    step: int
    seconds: float
    finished: bool
    signal: int | None = None


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How stages are trained, whichever they are.

    rules, smallest_split: see `sharding.partition`; for parameters, optimizer state and frozen parameters.
    profile: the first and the last step, counted from 1 at this start, of which a trace goes to `profile/` in the
    stage's folder; None: no trace. stop_after_steps: stop and save, as a signal does, when a stage has taken so many;
    None: at its end. programs: makes what is compiled, such as a cache of what was.
    """

    rules: Rules = DEFAULT_RULES
    smallest_split: int = SMALLEST_SPLIT
    profile: tuple[int, int] | None = None
    stop_after_steps: int | None = None
    programs: Callable[[Task, Mesh, Any], Programs] = make_programs


def train_stage(
    task: Task,
    record: StageRecord,
    stage_dir: Path,
    *,
    batches: Callable[[], BatchIterator],
    validation: Sequence[HostBatch] = (),
    mesh: Mesh,
    initial: Any = None,
    options: LoopOptions,
    log: Callable[[str], None] = print,
) -> Result:
    """Trains one stage to `task.recipe.steps`, from its newest checkpoint if there is one.

    Args:
        record: what is recorded of the stage, beside how far it is.
        batches: makes the endless iterator of this process's part of the training batches; numpy arrays of numbers in
            them go to the devices, the rest (captions) stays on the host.
        validation: a fixed list of held-out batches; the first one's images are also the preview's.
        initial: parameters to start from instead of random ones, where there is no checkpoint yet.

    Raises:
        InputError: for a run that has diverged.
        CheckpointError: if every checkpoint is damaged.
    """
    name = record.stage
    with CheckpointWriter(stage_dir) as writer, StopSignals() as signals:
        stage = _Stage(task, name, stage_dir, mesh, options, writer, signals, log)
        evaluator = Evaluator(name, task.recipe, stage_dir, mesh, stage.programs, validation, log)
        parameters = count_parameters(stage.abstract["params"])
        return stage.train(batches, evaluator, dataclasses.replace(record, parameters=parameters), initial)


@dataclass
class _Reports:
    """The reports of steps that the devices have been given and whose numbers are not on the host yet."""

    in_flight: list[Any] = field(default_factory=list)
    log_pending: bool = False

    def wait(self) -> None:
        """Keeps the host from running further ahead of the devices than `MOST_AHEAD` steps."""
        if len(self.in_flight) > MOST_AHEAD:
            jax.block_until_ready(self.in_flight[-1 - MOST_AHEAD])

    def take(self) -> list[Any]:
        """The numbers of all of them, on the host."""
        reports, self.in_flight, self.log_pending = jax.device_get(self.in_flight), [], False
        return reports


class _Stage:
    """One stage in training: what its steps share."""

    def __init__(
        self,
        task: Task,
        name: str,
        directory: Path,
        mesh: Mesh,
        options: LoopOptions,
        writer: CheckpointWriter,
        signals: StopSignals,
        log: Callable[[str], None],
    ):
        self.task, self.recipe, self.name, self.directory, self.mesh = task, task.recipe, name, directory, mesh
        self.options, self.writer, self.signals, self.log = options, writer, signals, log
        self.abstract = abstract_state(task, mesh, options.rules, options.smallest_split)
        frozen = {} if task.frozen is None else task.frozen
        self.frozen = put_on_devices(frozen, partition(frozen, mesh, options.rules, options.smallest_split))
        self.programs = options.programs(task, mesh, self.abstract)
        self.clock, self.history = Clock(), History()
        self.progress = Progress(name, self.recipe.steps, log)
        self.busy_seconds: float | None = None
        self.remarks: set[str] = set()

    def train(
        self, batches: Callable[[], BatchIterator], evaluator: Evaluator, record: StageRecord, initial: Any
    ) -> Result:
        """From the newest checkpoint, or from `initial` or random parameters, to the last step or a stop."""
        recipe, steps = self.recipe, self.recipe.steps
        restored = restore_latest(self.directory, self.abstract)
        if restored is not None:
            for sentence in restored.damaged:
                self.log(f"{sentence}; going on from step {restored.step} instead")
            self.clock.before = float(restored.metadata.get("seconds", 0.0))
            if restored.step < steps:
                self.log(f"{self.name} goes on from step {restored.step}")
        first = restored.step if restored else 0
        done = evaluator.done_at(first)
        step, iterator = first, None
        try:
            if first < steps:
                iterator = batches()
                if restored:
                    iterator.set_state(restored.iterator)
            self._write_record(record, first, self.clock.before, False)  # not before all that can be refused
            state = restored.state if restored else self._first_state(batches, initial)
            with MetricsWriter(self.directory, first, enabled=jax.process_index() == 0) as metrics:
                if restored:
                    # What was due at this step, and the stop or the kill came before it.
                    with self.clock.pause():
                        evaluator.run(first, state, self.frozen, metrics, *done)
                if first < steps:
                    profiled = self.options.profile if jax.process_index() == 0 else None
                    with Profile(self.name, profiled, self.directory / FOLDER, self.log) as profile:
                        step, state = self._steps(state, first, iterator, evaluator, metrics, profile)
            if step >= recipe.steps:
                record = dataclasses.replace(record, measured=evaluator.measure(state["ema"], self.frozen))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        self.writer.wait()
        return self._end(record, step)

    def _first_state(self, batches: Callable[[], BatchIterator], initial: Any) -> Any:
        """The state at step 0; what is fitted to the data is only where there are no parameters to start from."""
        if initial is not None:
            return create_state(self.task, self.abstract, initial)
        with contextlib.closing(self._opened(batches)) as opened:
            fitted = self.task.fit(opened, self.frozen, self.mesh, self.log)
        return create_state(self.task, self.abstract, fitted=fitted)

    def _opened(self, batches: Callable[[], BatchIterator]) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices, from an iterator of their own that is opened when the first one is asked for."""
        iterator = batches()
        try:
            while True:
                yield self._on_devices(next(iterator))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _steps(
        self,
        state: Any,
        first: int,
        iterator: BatchIterator,
        evaluator: Evaluator,
        metrics: MetricsWriter,
        profile: Profile,
    ) -> tuple[int, Any]:
        """Trains on from step `first`. What the devices have to do next is given to them before they are done.

        Numbers are read from them while they take the step after; only what looks at the state itself (checkpoint,
        validation, preview) lets them come to rest. The order of these lines is what a bit-equal resume rests on.
        """
        recipe, step, reports = self.recipe, first, _Reports()
        self.history.skipped = int(state["skipped"])
        batch = self._on_devices(next(iterator))
        while True:
            with profile.step(step + 1 - first, reports.in_flight):
                state, report = self.programs.step(state, batch, self.frozen)
            step += 1
            if reports.log_pending:
                self._log(step - 1, reports, metrics)
            reports.in_flight.append(report)
            stopping = self._is_stopping(step)
            last = step >= recipe.steps or stopping
            if last or _due(step, recipe.checkpoint_every):
                # Before the next batch is fetched, so that the position is the one after this step.
                self.writer.save(step, state, iterator=iterator.get_state(), metadata={"seconds": self.clock.seconds()})
            if not last:
                with self.clock.fetch(report["loss"].is_ready), jax.profiler.TraceAnnotation("next batch"):
                    batch = self._on_devices(next(iterator))
            if step == first + 1:
                self.busy_seconds = self._busy_seconds(state, batch, self.frozen)  # while the devices take it
                jax.block_until_ready(report)
                self.clock.compiled()
            reports.wait()
            if profile.ends(step - first):
                jax.block_until_ready(report)
                with self.clock.pause():
                    profile.stop()
            full = len(reports.in_flight) >= MOST_SKIPPED
            reports.log_pending = last or full or _due(step, recipe.log_every)
            rests = (recipe.checkpoint_every, recipe.validate_every, recipe.preview_every)
            if reports.log_pending and (last or any(_due(step, every) for every in rests)):
                self._log(step, reports, metrics, last)
            if not stopping or step >= recipe.steps:
                with self.clock.pause():
                    evaluator.run(step, state, self.frozen, metrics)
            if last:
                return step, state

    def _log(self, step: int, reports: _Reports, metrics: MetricsWriter, last: bool = False) -> None:
        """Takes the reports up to `step` from the devices and writes the line that is due there."""
        self.history.add(reports.take())
        self._check_diverged(step)
        if last or _due(step, self.recipe.log_every):
            values = self.history.take()
            seconds, wait = self.clock.lap(values.pop("steps"))
            speed = None
            if wait is not None:
                used = self.busy_seconds and self.busy_seconds / seconds
                speed = Speed(seconds, self.recipe.batch_size / seconds, wait, used)
                metrics.write(step, "speed", speed.numbers())
            self.progress.line(step, values, seconds, speed, self.history.skipped)
            metrics.write(step, "train", {**values, "skipped": self.history.skipped})
            remark = self.task.remark(step, values)
            if remark is not None and remark not in self.remarks:
                self.remarks.add(remark)
                self.log(f"{self.name} {step}/{self.recipe.steps} | {remark}")

    def _on_devices(self, batch: HostBatch) -> dict[str, jax.Array]:
        return put_batch_on_devices(batch, batch_sharding(self.mesh))

    def _busy_seconds(self, *arguments: Any) -> float | None:
        """What a step would take at the devices' peak; None where that is not known. `arguments`: the step's."""
        peak = PEAKS.get(self.mesh.devices.flat[0].device_kind)
        if peak is None:
            return None
        return model_flops(self.task, self.programs.step, *arguments) / (peak * self.mesh.devices.size)

    def _is_stopping(self, step: int) -> bool:
        if step == self.options.stop_after_steps:
            return True
        stopping = self.signals.received is not None
        if jax.process_count() == 1:
            return stopping
        # A signal may reach one process a step before another; all must stop at the same one.
        if step % STEPS_BETWEEN_AGREEMENTS:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(stopping)).any())

    def _check_diverged(self, step: int) -> None:
        if self.history.skipped_in_a_row >= MOST_SKIPPED:
            raise InputError(
                f"{self.name} has diverged: the last {self.history.skipped_in_a_row} steps before step {step} gave a "
                f"loss or gradient that is not finite and were skipped; try a lower {self.name}.optimizer.learning_rate"
            )

    def _write_record(self, record: StageRecord, step: int, seconds: float, finished: bool) -> None:
        if jax.process_index() == 0:
            ending = {"finished": finished, "step": step, "seconds": round(seconds, 3)}
            write_record(self.directory, dataclasses.replace(record, **ending))

    def _end(self, record: StageRecord, step: int) -> Result:
        finished, steps = step >= self.recipe.steps, self.recipe.steps
        seconds = self.clock.seconds()
        self._write_record(record, step, seconds, finished)
        processes.wait_for_all()  # before another one reads what the first one wrote
        number = self.signals.received
        if finished:
            self.log(f"{self.name} is trained: {step} steps in {duration(seconds)}")
        else:
            number = number or signal.SIGTERM
            self.log(f"{self.name} stopped and saved at step {step} of {steps}: the same command goes on from there")
        return Result(step, seconds, finished, number)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
