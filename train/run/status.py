"""How far the stages of a run are, as its folder says; a `Run` reads each of them once."""

from __future__ import annotations

from dalle2_jax.checkpoint import Run, StageFolder, StageRecord
from dalle2_jax.errors import InputError
from train.config.system import System


def has_begun(system: System, name: str, run: Run) -> bool:
    """Whether the run's folder holds checkpoints of the stage's own training."""
    return run.stage(name).step is not None and not is_given(system, name, run)


def finished_stage(system: System, name: str, run: Run) -> StageRecord | None:
    """The record of a stage that is trained to its end."""
    done = has_begun(system, name, run) and run.stage(name).is_finished(system.stages[name].steps)
    return run.stage(name).record if done else None


def check_trained(name: str, needed: str, run: Run, command: str) -> None:
    """Raises InputError, naming the command, unless the stage that `name` is built on is trained to its end."""
    first = command.replace("{stage}", needed)
    stage = run.stage(needed)
    if stage.step is None:
        raise InputError(f"{name} needs {needed}, which is not trained yet; run first: {first}")
    if not stage.is_finished():
        raise InputError(
            f"{name} needs {needed}, which has stopped at step {stage.step} of {stage.record.steps}; run first: {first}"
        )


def is_given(system: System, name: str, run: Run) -> bool:
    """Whether the stage in the run's folder is the given one, and none that was trained there."""
    version = run.stage(name).version if name in system.given else None
    return version is not None and version == StageFolder(system.given[name]).version
