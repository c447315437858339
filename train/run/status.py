"""How far the stages of a run are."""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.checkpoint import StageFolder, StageRecord, checkpoint_steps
from dalle2_jax.errors import InputError
from train.config.system import System


def has_begun(system: System, name: str, run_dir: Path) -> bool:
    """Whether the run's folder holds checkpoints of the stage's own training."""
    return bool(checkpoint_steps(run_dir / name)) and not is_given(system, name, run_dir)


def finished_stage(system: System, name: str, run_dir: Path) -> StageRecord | None:
    """The record of a stage that is trained to its end."""
    return finished_record(run_dir / name, system.stages[name].steps) if has_begun(system, name, run_dir) else None


def check_trained(name: str, needed: str, run_dir: Path, command: str) -> None:
    """Raises InputError, naming the command, unless the stage that `name` is built on is trained to its end."""
    first = command.replace("{stage}", needed)
    stage = StageFolder(run_dir / needed)
    if stage.step is None:
        raise InputError(f"{name} needs {needed}, which is not trained yet; run first: {first}")
    if not stage.is_finished():
        raise InputError(
            f"{name} needs {needed}, which has stopped at step {stage.step} of {stage.record.steps}; run first: {first}"
        )


def is_given(system: System, name: str, run_dir: Path) -> bool:
    """Whether the stage in the run's folder is the given one, and none that was trained there."""
    version = StageFolder(run_dir / name).version if name in system.given else None
    return version is not None and version == StageFolder(system.given[name]).version


def finished_record(stage_dir: Path, steps: int) -> StageRecord | None:
    """The stage's record if it is trained to `steps` or further and its checkpoint is there."""
    stage = StageFolder(stage_dir)
    return stage.record if stage.is_finished(steps) else None
