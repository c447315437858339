"""The stages of a system from shapes alone: whether they fit each other, and a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle2_jax.checkpoint import LoadedStage, Run
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.sharding import check_batch, processes
from train.config.recipe import Recipe, Task
from train.config.system import System
from train.loop.clock import duration
from train.run.given import given_stages, given_tokenizer, planned_given
from train.run.init_from import check_start
from train.run.record import Log, stage_record
from train.run.status import finished_stage, has_begun, is_given
from train.step.lower import abstract_batch, trace_step
from train.step.state import abstract_state


def check_stages(system: System, names: Sequence[str], mesh: Mesh) -> None:
    """Builds the named stages and those before them from shapes alone, and the losses of the named ones.

    Raises:
        InputError: for what does not fit together, before anything is trained or written.
    """
    remaining = set(names)
    for planned in plan(system):
        name, task = planned.name, planned.task
        if name in remaining:
            check_batch(task.recipe.batch_size, mesh, task.recipe.optimizer.accumulation)
            check_image_size(name, task.recipe, system.data.image_size)
            batch = abstract_batch(system, task, None)
            extra = jax.eval_shape(task.init_extra)
            jax.eval_shape(task.loss, planned.params, batch, jax.random.key(0), task.frozen, extra)
            remaining.remove(name)
        if not remaining:
            return


def check_image_size(name: str, recipe: Recipe, size: int | None) -> None:
    """Raises InputError for images of a side below what the stage is to make; None: not known yet."""
    if size is not None and recipe.output_size is not None and size < recipe.output_size:
        raise InputError(
            f"{name} is to learn images of {recipe.output_size} pixels and the data's have {size}: set "
            f"data.image_size={recipe.output_size} or more, or train the other stages alone"
        )


def kinds_of(system: System) -> dict[str, str]:
    """The kind of every stage, trained or given."""
    trained = {name: recipe.kind for name, recipe in system.stages.items()}
    return trained | {name: stage.kind for name, stage in given_stages(system).items() if name not in trained}


def needed_stage(kinds: Mapping[str, str], name: str, kind: str) -> str:
    """The stage of that kind, which `name` is built on; `kinds` are those of the system's stages."""
    needed = next((other for other, its_kind in kinds.items() if its_kind == kind), None)
    if needed is None:
        raise InputError(f"the stage {name!r} needs a stage of the kind {kind!r}, and the config has none")
    return needed


def plan_stages(system: System, names: Sequence[str], run_dir: Path, mesh: Mesh, log: Log = print) -> None:
    """A dry run: builds every named stage and those it needs, lowers one training step of each, and writes nothing.

    What is in the run's folder is mentioned and not compared.

    Raises:
        InputError: for what is wrong with the config or the mesh.
    """
    log, run = processes.only_first(log), Run(run_dir)
    given_tokenizer(system)
    for planned in plan(system):
        name, task, recipe = planned.name, planned.task, planned.task.recipe
        if name not in names:
            continue
        check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
        check_image_size(name, recipe, system.data.image_size)
        if recipe.init_from is not None:
            check_start(name, recipe)
        trace_step(system, task, abstract_state(task, mesh, system.sharding, system.smallest_split), mesh).lower()
        count = count_parameters(planned.params)
        devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        log(
            f"{name}: {count:,} parameters, {recipe.steps} steps of {recipe.batch_size} images on {devices}, "
            f"in {run_dir / name}{found_so_far(system, name, run)}"
        )
    for name, folder in system.given.items():
        if name not in names and not has_begun(system, name, run):
            log(f"{name}: that of {folder}")
    log("dry run: nothing was written")


@dataclass(frozen=True)
class Planned:
    """A stage from shapes alone: its task, whose frozen parameters are shapes, and the shapes of its own parameters."""

    name: str
    task: Task
    params: Any


def plan(system: System) -> Iterator[Planned]:
    """Every trained stage from shapes alone, in order.

    Raises:
        InputError: if a network cannot be built, or a stage needs one that is not before it.
    """
    known = planned_given(system)
    for name, recipe in system.stages.items():
        yield plan_stage(name, recipe, known)


def plan_stage(name: str, recipe: Recipe, known: dict[str, LoadedStage]) -> Planned:
    """One stage from shapes; adds it to those that are `known`, by kind.

    Raises:
        InputError: if the network cannot be built, or needs a stage that is not known.
    """
    for kind in recipe.needs:
        if kind not in known:
            raise InputError(f"the stage {name!r} needs a stage of the kind {kind!r} before it, and there is none")
    task = recipe.build({kind: known[kind] for kind in recipe.needs})
    params = jax.eval_shape(task.init, jax.random.key(0))
    ema = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)  # what later stages are given
    known.setdefault(recipe.kind, LoadedStage(recipe.module, ema, stage_record(recipe, name)))
    return Planned(name, task, params)


def found_so_far(system: System, name: str, run: Run) -> str:
    """What a dry run says of a stage that is in the run's folder already."""
    done = finished_stage(system, name, run)
    if done is not None:
        return f" (finished, {duration(done.seconds)})"
    if has_begun(system, name, run):
        return f" (goes on from step {run.stage(name).step})"
    return " (in place of the given one)" if is_given(system, name, run) else ""
