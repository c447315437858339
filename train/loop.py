"""One loop for every stage: steps, logs, validation, previews, checkpoints, resume.

    result = run(recipe, stage_name="prior", stage_dir="runs/demo/prior", batches=make_iterator, validation=held_out)

A stage that was stopped, killed or whose newest checkpoint is damaged goes on from the newest whole checkpoint by
itself, bit-equal to a run left alone: parameters, optimizer, average, key, step and the data iterator's position all
come back.
"""

import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.checkpoint import CheckpointWriter, StageRecord, processes, restore_latest, write_record
from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.grid import caption_grid, save_png
from dalle2_jax.sharding import (
    DEFAULT_RULES,
    SMALLEST_SPLIT,
    Rules,
    batch_parts,
    batch_sharding,
    check_batch,
    make_mesh,
    own_rows,
    partition,
    place,
    place_rows,
    replicate,
)
from train.flops import model_flops
from train.hosts import only_first
from train.metrics import Clock, History, MetricsWriter, Progress, Speed, duration, is_recorded, mean_of
from train.peaks import PEAKS
from train.profile import FOLDER, Profile
from train.resume import check_resumable, finished_record, stage_record
from train.signals import StopSignals
from train.state import abstract_state, create_state, make_step
from train.system import Recipe

HostBatch = Mapping[str, Any]

# In a row; one bad batch is skipped, a run that only skips has diverged.
MOST_SKIPPED = 50
# Steps the host may be ahead of the devices.
MOST_AHEAD = 2
# Steps between two looks, with several processes, at whether any of them was told to stop.
STEPS_BETWEEN_AGREEMENTS = 10
VALIDATION_SEED, PREVIEW_SEED, MEASURE_SEED = 1, 2, 3
# What of a batch has one entry a row.
ROWS = (np.ndarray, jax.Array, list, tuple)
PREVIEW_COLUMNS = {"average": "ema", "raw": "params"}


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


def run(
    recipe: Recipe,
    *,
    stage_name: str,
    stage_dir: str | Path,
    batches: Callable[[], BatchIterator],
    validation: Sequence[HostBatch] = (),
    frozen: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    smallest_split: int = SMALLEST_SPLIT,
    info: Mapping[str, Any] | None = None,
    initial: Any = None,
    profile: tuple[int, int] | None = None,
    log: Callable[[str], None] = print,
    stop_at: int | None = None,
) -> Result:
    """Trains one stage to `recipe.steps`, from its newest checkpoint if there is one.

    Args:
        recipe: attached (see `Recipe.attach`).
        batches: makes the endless iterator of this process's part of the training batches; numpy arrays of numbers in
            them go to the devices, the rest (captions) stays on the host.
        validation: a fixed list of held-out batches; the first one's pictures are also the preview's.
        frozen: the earlier stages' parameters.
        mesh: all devices with data parallelism by default.
        rules, smallest_split: see `sharding.partition`; for parameters, optimizer state and `frozen`.
        info: what else `stage.json` shall say (config, data, tokenizer, ...).
        initial: parameters to start from instead of random ones, where there is no checkpoint yet.
        profile: the first and the last step, counted from 1 at this start, of which a trace goes to `profile/` in the
            stage's folder; None: no trace.
        stop_at: stops as if by SIGTERM after this step; for tests.

    Raises:
        InputError: for a folder of another stage, a batch that does not divide, or a run that has diverged.
        CheckpointError: if every checkpoint is damaged.
    """
    stage_dir = Path(stage_dir)
    log = only_first(log)
    mesh = make_mesh() if mesh is None else mesh
    check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
    record = stage_record(recipe, stage_name, info)
    check_resumable(stage_dir, record, log)
    done = finished_record(stage_dir, recipe.steps)
    if done is not None:
        if record.sampling != done.sampling and jax.process_index() == 0:
            write_record(stage_dir, dataclasses.replace(done, sampling=record.sampling))
        log(f"{stage_name} is finished: {done.step} steps in {duration(done.seconds)}")
        return Result(done.step, done.seconds, True)
    with CheckpointWriter(stage_dir) as writer, StopSignals() as signals:
        stage = _Stage(
            recipe, stage_name, stage_dir, mesh, rules, smallest_split, frozen, validation, writer, signals, log
        )
        parameters = sum(leaf.size for leaf in jax.tree.leaves(stage.abstract["params"]))
        record = dataclasses.replace(record, parameters=parameters)
        recorder = Profile(stage_name, profile if jax.process_index() == 0 else None, stage_dir / FOLDER, log)
        result = stage.train(batches, record, initial, recorder, stop_at)
    return result


def jitted(recipe: Recipe, mesh: Mesh, abstract: Any) -> tuple[Callable, Callable, Callable, Callable]:
    """What a stage compiles: its step, and the recipe's `validate`, `preview` and `measure`."""
    others = (recipe.validate, recipe.preview, recipe.measure)
    return make_step(recipe, mesh, abstract), *(jax.jit(f, out_shardings=replicate(mesh)) for f in others)


class _Stage:
    """The parts of one run that its steps share."""

    def __init__(self, recipe, name, directory, mesh, rules, smallest, frozen, validation, writer, signals, log):
        self.recipe, self.name, self.directory, self.mesh = recipe, name, directory, mesh
        self.writer, self.signals, self.log = writer, signals, log
        self.abstract = abstract_state(recipe, mesh, rules, smallest)
        frozen = {} if frozen is None else frozen
        self.frozen = place(frozen, partition(frozen, mesh, rules, smallest))
        self.step, self.validate, self.preview, self.measure = jitted(recipe, mesh, self.abstract)
        self.validation = [self._to_devices(batch) for batch in validation]
        self.preview_batch = dict(validation[0]) if validation else None
        self.clock, self.history = Clock(), History()
        self.progress = Progress(name, recipe.steps, log)
        self.busy_seconds: float | None = None

    def _to_devices(self, batch: HostBatch, sharding: Any = None) -> dict[str, jax.Array]:
        sharding = batch_sharding(self.mesh) if sharding is None else sharding
        arrays = {
            name: value for name, value in batch.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
        }
        if jax.process_count() == 1:
            return jax.device_put(arrays, sharding)
        return {name: place_rows(sharding, value) for name, value in arrays.items()}

    def train(
        self,
        batches: Callable[[], BatchIterator],
        record: StageRecord,
        initial: Any,
        profile: Profile,
        stop_at: int | None,
    ) -> Result:
        recipe = self.recipe
        restored = restore_latest(self.directory, self.abstract)
        if restored is not None:
            for sentence in restored.damaged:
                self.log(f"{sentence}; going on from step {restored.step} instead")
            self.clock.before = float(restored.metadata.get("seconds", 0.0))
            if restored.step < recipe.steps:
                self.log(f"{self.name} goes on from step {restored.step}")
        first = restored.step if restored else 0
        validated, shown = processes.of_first(
            lambda: [is_recorded(self.directory, first, "validation"), self._sheet(first).is_file()]
        )
        step, iterator = first, None
        try:
            if first < recipe.steps:
                iterator = batches()
                if restored:
                    iterator.set_state(restored.iterator)
            self._write_record(record, first, self.clock.before, False)  # not before all that can be refused
            state = restored.state if restored else create_state(recipe, self.abstract, initial)
            with MetricsWriter(self.directory, first, enabled=jax.process_index() == 0) as metrics:
                if restored:
                    # What was due at this step, and the stop or the kill came before it.
                    self._look(first, state, metrics, validated, shown)
                if first < recipe.steps:
                    with profile:
                        step, state = self._steps(state, first, iterator, metrics, profile, stop_at)
            if step >= recipe.steps:
                record = dataclasses.replace(record, measured=self._measure(state["ema"]))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        self.writer.wait()
        return self._end(record, step)

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

    def _write_record(self, record: StageRecord, step: int, seconds: float, finished: bool) -> None:
        if jax.process_index() == 0:
            ending = {"finished": finished, "step": step, "seconds": round(seconds, 3)}
            write_record(self.directory, dataclasses.replace(record, **ending))

    def _steps(
        self,
        state: Any,
        first: int,
        iterator: BatchIterator,
        metrics: MetricsWriter,
        profile: Profile,
        stop_at: int | None,
    ) -> tuple[int, Any]:
        """Trains on from step `first`. What the devices have to do next is given to them before they are done.

        Numbers are read from them while they take the step after; only what looks at the state itself (checkpoint,
        validation, preview) lets them come to rest.
        """
        recipe, step, waiting, owed = self.recipe, first, [], False
        self.history.skipped = int(state["skipped"])
        batch = self._to_devices(next(iterator))
        while True:
            with profile.step(step + 1 - first, waiting):
                state, report = self.step(state, batch, self.frozen)
            step += 1
            if owed:
                waiting, owed = self._read(step - 1, waiting, metrics), False
            waiting.append(report)
            stopping = self._told_to_stop(step) or step == stop_at
            last = step >= recipe.steps or stopping
            if last or _due(step, recipe.checkpoint_every):
                # Before the next batch is fetched, so that the position is the one after this step.
                self.writer.save(step, state, iterator=iterator.get_state(), metadata={"seconds": self.clock.seconds()})
            if not last:
                with self.clock.fetch(report["loss"].is_ready), jax.profiler.TraceAnnotation("next batch"):
                    batch = self._to_devices(next(iterator))
            if step == first + 1:
                self.busy_seconds = self._busy_seconds(state, batch, self.frozen)  # while the devices take it
                jax.block_until_ready(report)
                self.clock.compiled()
            if len(waiting) > MOST_AHEAD:
                jax.block_until_ready(waiting[-1 - MOST_AHEAD])
            if profile.ends(step - first):
                jax.block_until_ready(report)
                with self.clock.pause():
                    profile.stop()
            owed = last or _due(step, recipe.log_every) or len(waiting) >= MOST_SKIPPED
            looks = (recipe.checkpoint_every, recipe.validate_every, recipe.preview_every)
            if owed and (last or any(_due(step, every) for every in looks)):
                waiting, owed = self._read(step, waiting, metrics, last), False
            if not stopping or step >= recipe.steps:
                self._look(step, state, metrics)
            if last:
                return step, state

    def _read(self, step: int, reports: list[Any], metrics: MetricsWriter, last: bool = False) -> list[Any]:
        """Takes the reports up to `step` from the devices and writes the line that is due there; returns no reports."""
        self.history.add(jax.device_get(reports))
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
        return []

    def _busy_seconds(self, *arguments: Any) -> float | None:
        """What a step would take at the devices' peak; None where that is not known. `arguments`: the step's."""
        peak = PEAKS.get(self.mesh.devices.flat[0].device_kind)
        if peak is None:
            return None
        return model_flops(self.recipe, self.step, *arguments) / (peak * self.mesh.devices.size)

    def _look(self, step: int, state: Any, metrics: MetricsWriter, validated: bool = False, shown: bool = False):
        """The validation and the preview that are due after `step`, but for those made already."""
        recipe, ended = self.recipe, step >= self.recipe.steps
        with self.clock.pause():
            if recipe.validate_every and (ended or _due(step, recipe.validate_every)) and not validated:
                self._run_validation(step, state["ema"], metrics)
            if recipe.preview_every and (ended or _due(step, recipe.preview_every)) and not shown:
                self._run_preview(step, state, metrics)

    def _sheet(self, step: int) -> Path:
        return self.directory / "samples" / f"step_{step}.png"

    def _shared_rows(self) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The preview's rows on the host, of which every process holds some, and on the devices."""
        parts, first = batch_parts(self.mesh), self.validation[0]
        count = min(-(-self.recipe.preview_count // parts) * parts, len(first["image"]))
        cut = functools.partial(_first_rows, count=count)
        batch = jax.jit(cut, out_shardings=batch_sharding(self.mesh))(first)
        whole = jax.jit(lambda image: image, out_shardings=replicate(self.mesh))(batch["image"])
        own = own_rows(batch_sharding(self.mesh), len(first["image"]))[:count].tolist()
        told = processes.gather(list(zip(own, self.preview_batch.get("captions", ()), strict=False)))
        captions = {row: caption for pairs in told for row, caption in pairs}
        return {"image": np.asarray(whole), "captions": [captions.get(row, "") for row in range(count)]}, batch

    def _told_to_stop(self, step: int) -> bool:
        told = self.signals.received is not None
        if jax.process_count() == 1:
            return told
        # A signal may reach one process a step before another; all must stop at the same one.
        if step % STEPS_BETWEEN_AGREEMENTS:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(told)).any())

    def _check_diverged(self, step: int) -> None:
        if self.history.skipped_in_a_row >= MOST_SKIPPED:
            raise InputError(
                f"{self.name} has diverged: the last {self.history.skipped_in_a_row} steps before step {step} gave a "
                f"loss or gradient that is not finite and were skipped; try a lower {self.name}.optimizer.learning_rate"
            )

    def _run_validation(self, step: int, ema: Any, metrics: MetricsWriter) -> None:
        key = jax.random.key(VALIDATION_SEED)
        found = [
            self.validate(ema, batch, jax.random.fold_in(key, index), self.frozen)
            for index, batch in enumerate(self.validation)
        ]
        if not found:
            return
        values = mean_of(jax.device_get(found))
        self.log(
            f"{self.name} {step}/{self.recipe.steps} | validation | "
            + " | ".join(f"{k} {v:.4f}" for k, v in values.items())
        )
        metrics.write(step, "validation", values)

    def _measure(self, ema: Any) -> dict[str, Any]:
        """The means over the validation batches of what the recipe measures in the end."""
        key = jax.random.key(MEASURE_SEED)
        found = [
            jax.device_get(self.measure(ema, batch, jax.random.fold_in(key, index), self.frozen))
            for index, batch in enumerate(self.validation)
        ]
        means = jax.tree.map(lambda *values: np.mean(values, axis=0), *found) if found else {}
        return {name: value.tolist() for name, value in means.items()}

    def _run_preview(self, step: int, state: Any, metrics: MetricsWriter) -> None:
        if self.preview_batch is None:
            return
        if jax.process_count() == 1:
            rows = _first_rows(self.preview_batch, self.recipe.preview_count)
            split = len(rows["image"]) % batch_parts(self.mesh) == 0
            batch = self._to_devices(rows, None if split else replicate(self.mesh))
        else:
            rows, batch = self._shared_rows()
        count = min(len(rows["image"]), self.recipe.preview_count)
        key = jax.random.key(PREVIEW_SEED)
        drawn = {name: self.preview(state[part], batch, key, self.frozen) for name, part in PREVIEW_COLUMNS.items()}
        if any(pictures is None for pictures in drawn.values()) or jax.process_index() != 0:
            return
        pictures = [rows["image"][:count], *(np.asarray(made)[:count] for made in drawn.values())]
        sheet = caption_grid(pictures, list(rows.get("captions", [""] * count))[:count], labels=("real", *drawn))
        save_png(self._sheet(step), sheet)
        metrics.picture(step, "samples", np.asarray(sheet))


def _first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: value[:count] for name, value in batch.items() if isinstance(value, ROWS)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
