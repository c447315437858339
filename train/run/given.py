"""Stages that a run is given: they are taken over from another run as they are (`given` of a system), not trained.

A given stage lies in the run's folder like a trained one, so that the run is whole: its files are hard links to the
other run's where the file system allows it, and copies where it does not. Nothing ever writes into a checkpoint, and
`stage.json` is only ever replaced, so neither run can change the other.

A stage may be given and also be one that the system trains. It is then the given one until it is trained, and the
trained one afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from dalle2_jax.checkpoint import CheckpointError, LoadedStage, Run, StageFolder, checkpoint_steps, load_shapes
from dalle2_jax.checkpoint.record import STAGE_FILE
from dalle2_jax.checkpoint.store import checkpoint_path
from dalle2_jax.errors import InputError
from dalle2_jax.sharding import processes
from dalle2_jax.tokenizer import AnyTokenizer, tokenizer_from_json
from train.config.system import System
from train.run.status import is_given


def given_stages(system: System) -> dict[str, LoadedStage]:
    """The stages that a system is given, by name, without their parameters.

    Raises:
        InputError: if one of them is missing, damaged or not trained to its end.
    """
    return {name: _given_stage(name, Path(folder)) for name, folder in system.given.items()}


def _given_stage(name: str, folder: Path) -> LoadedStage:
    try:
        stage = StageFolder(folder)
        module = stage.record.rebuilt("module")
        if not stage.is_finished():
            raise CheckpointError(f"{folder} is not trained to its end")
        return LoadedStage(module, None, stage.record, stage.version)
    except CheckpointError as error:
        raise InputError(f"{name} is to be given and {error}; set given.{name} to a finished stage's folder") from error


def planned_given(system: System) -> dict[str, LoadedStage]:
    """The given stages by kind, with the shapes of their averaged parameters, for stages that are built on them.

    Those that the system trains itself are left out.

    Raises:
        InputError: as `given_stages`.
    """
    stages = {name: stage for name, stage in given_stages(system).items() if name not in system.stages}
    shapes = {name: load_shapes(system.given[name]) for name in stages}
    return {stage.kind: dataclasses.replace(stage, params=shapes[name]) for name, stage in stages.items()}


def given_tokenizer(system: System) -> AnyTokenizer | None:
    """The tokenizer of the first given stage that records one, which all the run's stages must read captions by.

    Raises:
        InputError: if the system has no room for it.
    """
    for name, folder in system.given.items():
        text = _given_stage(name, Path(folder)).record.tokenizer
        if text is None:
            continue
        tokenizer = tokenizer_from_json(text)
        if tokenizer.context_length != system.context_length or tokenizer.vocabulary_size > system.vocabulary_size:
            raise InputError(
                f"the given {name} of {folder} reads captions of {tokenizer.context_length} tokens out of "
                f"{tokenizer.vocabulary_size}, and this system has {system.context_length} out of "
                f"{system.vocabulary_size}; set context_length={tokenizer.context_length} "
                f"vocabulary_size={tokenizer.vocabulary_size}"
            )
        return tokenizer
    return None


def check_given(system: System, run: Run) -> None:
    """Whether the given stages can be put into the run's folder; reads no arrays and writes nothing.

    Raises:
        InputError: if one is missing, has a tokenizer that does not fit, comes from this very run, or the run has
            another one in its place.
    """
    given_tokenizer(system)
    for name, stage in given_stages(system).items():
        target, folder = run.path / name, Path(system.given[name])
        if target.resolve() == folder.resolve():
            raise InputError(f"{run.path} is the run that {name} is taken from; choose another --run")
        if name not in system.stages and target.exists() and run.stage(name).version != stage.version:
            raise InputError(
                f"{target} is another {name} than that of {folder}, which this system is given; choose another --run"
            )


def place_given(system: System, names: Sequence[str], run_dir: Path, log: Callable[[str], None]) -> None:
    """Puts the given stages that are not there yet into the run's folder, but for those of `names`.

    These are about to be trained, and a given one in their place is taken away. What was trained there stays.

    Raises:
        InputError: if files can be neither linked nor copied; nothing half-written is left.
    """
    if jax.process_index() == 0:
        run = Run(run_dir)
        for name, folder in system.given.items():
            target = run_dir / name
            shutil.rmtree(_partial(target), ignore_errors=True)  # what a kill has left
            if name in names and is_given(system, name, run):
                target.rename(_partial(target))
                shutil.rmtree(_partial(target))
            elif name not in names and not target.exists():
                _place(Path(folder), target)
                log(f"{name} is that of {folder}")
    processes.wait_for_all()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _place(folder: Path, target: Path) -> None:
    """Makes `target` the stage in `folder`, with its newest checkpoint alone; it appears when it is whole."""
    partial, step = _partial(target), checkpoint_steps(folder)[-1]
    try:
        source = checkpoint_path(folder, step)
        shutil.copytree(source, checkpoint_path(partial, step), copy_function=_link_or_copy)
        _link_or_copy(folder / STAGE_FILE, partial / STAGE_FILE)  # last: what has none is no stage
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder} could not be put into {target.parent}: {error}") from error
        raise


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
