"""One stage in its folder: whether it may go on there, what is recorded of it, and its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax.checkpoint import StageFolder, write_record
from dalle2_jax.sharding import check_batch, make_mesh
from dalle2_jax.sharding.processes import only_first
from train.config.recipe import Task
from train.loop.clock import duration
from train.loop.loop import BatchIterator, HostBatch, LoopOptions, Result, train_stage
from train.run.record import stage_record
from train.run.resume import check_resumable


def run(
    task: Task,
    *,
    stage_name: str,
    stage_dir: str | Path,
    batches: Callable[[], BatchIterator],
    validation: Sequence[HostBatch] = (),
    mesh: Mesh | None = None,
    info: Mapping[str, Any] | None = None,
    initial: Any = None,
    options: LoopOptions | None = None,
    log: Callable[[str], None] = print,
) -> Result:
    """Trains one stage in its folder, or says that it is finished; see `train.loop.loop.train_stage`.

    Args:
        mesh: all devices with data parallelism by default.
        info: what else is recorded of the stage (config, data, tokenizer, ...).

    Raises:
        InputError: for a folder of another stage, a batch that does not divide, or a run that has diverged.
        CheckpointError: if every checkpoint is damaged.
    """
    stage_dir, recipe = Path(stage_dir), task.recipe
    log, options = only_first(log), options or LoopOptions()
    mesh = make_mesh() if mesh is None else mesh
    check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
    record = stage_record(recipe, stage_name, info)
    check_resumable(stage_dir, record, log)
    stage = StageFolder(stage_dir)
    if stage.is_finished(recipe.steps):
        done = stage.record
        if record.sampling != done.sampling and jax.process_index() == 0:
            write_record(stage_dir, dataclasses.replace(done, sampling=record.sampling))
        log(f"{stage_name} is finished: {done.step} steps in {duration(done.seconds)}")
        return Result(done.step, done.seconds, True)
    feed = {"batches": batches, "validation": validation}
    return train_stage(task, record, stage_dir, **feed, mesh=mesh, initial=initial, options=options, log=log)
