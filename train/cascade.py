"""A system's stages in order: each one is given its data, the run's tokenizer and the earlier stages, and trained."""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.checkpoint import LoadedStage, StageFolder, StageRecord, checkpoint_steps, load_stage, processes
from dalle2_jax.data import all_captions, evaluation_batches, open_source, train_iterator
from dalle2_jax.errors import InputError
from dalle2_jax.sharding import batch_parts, batch_sharding, check_batch, own_rows, partition
from dalle2_jax.tokenizer import AnyTokenizer, Tokenizer, tokenizer_from_json
from train import hosts
from train.finetune import check_start, inherited_tokenizer, initial_parameters
from train.given import check_given, given_stages, given_tokenizer, is_given, place_given, planned_given
from train.loop import LoopOptions, Result, run
from train.metrics import duration
from train.resume import finished_record, stage_record
from train.state import abstract_state, make_step
from train.system import Recipe, System, Task

Log = Callable[[str], None]
ANY_SIZE = 64  # pixels


def train_stages(
    system: System,
    names: Sequence[str],
    run_dir: Path,
    mesh: Mesh,
    *,
    command: str,
    config: Mapping[str, Any] | None = None,
    options: LoopOptions | None = None,
    log: Log = print,
) -> Result:
    """Trains the named stages in order; stops early if one is stopped by a signal.

    Before that, the stages that the system is given are put into the run's folder (see `train.given`).

    Args:
        run_dir: the run's folder, one folder a stage below it.
        command: how training is called, for sentences that say what to run first.
        config: what `stage.json` says of the config (name, text, overrides).
        options: how each is trained; sharding rules are the system's.

    Raises:
        InputError: if a stage that one needs is not trained, or for anything that `train.loop.run` refuses.
    """
    options = dataclasses.replace(options or LoopOptions(), rules=system.sharding, smallest_split=system.smallest_split)
    log = hosts.only_first(log)
    hosts.check_shared(run_dir)
    check_stages(system, names, mesh)
    check_given(system, run_dir)
    kinds = _kinds(system)
    feed = _Feed(system, run_dir, log)
    for number, name in enumerate(names):
        recipe = system.stages[name]
        for kind in recipe.needs:
            needed = _needed(kinds, name, kind)
            to_be_given = needed in system.given and not (run_dir / needed).exists()
            if needed not in names[:number] and not to_be_given:
                _check_trained(name, needed, run_dir, command)
        if recipe.init_from is not None and not _begun(system, name, run_dir):
            check_start(name, recipe)
    for name in names:  # after all that needs no data
        if _done(system, name, run_dir) is None:
            feed.check(name, system.stages[name])
    processes.wait_for_all()  # until now all have read what was there before
    place_given(system, names, run_dir, log)
    result = Result(0, 0.0, True)
    own = {type(recipe.module).__module__ for recipe in system.stages.values()}  # the config's own networks
    for name in names:
        recipe = system.stages[name]
        needed = {kind: load_stage(run_dir / _needed(kinds, name, kind), allow=own) for kind in recipe.needs}
        task = recipe.build(needed)
        info = {
            "config": dict(config or {}),
            "data": system.data,
            "tokenizer": feed.tokenizer.to_json() if recipe.reads_captions else None,
            "init_from": recipe.init_from,
            **_source(recipe, run_dir / name),
            "built_on": {kind: stage.version for kind, stage in needed.items()},
            "versions": versions(),
        }
        finished = finished_record(run_dir / name, recipe.steps) is not None
        initial = None
        if recipe.init_from is not None and not checkpoint_steps(run_dir / name):
            initial = initial_parameters(name, task, feed.tokenizer if recipe.reads_captions else None, log)
        result = run(
            task,
            stage_name=name,
            stage_dir=run_dir / name,
            batches=lambda task=task: feed.training(task, mesh),
            validation=[] if finished else feed.validation(task, mesh),
            mesh=mesh,
            info=info,
            initial=initial,
            options=options,
            log=log,
        )
        if result.signal is not None:
            break
    return result


def check_stages(system: System, names: Sequence[str], mesh: Mesh) -> None:
    """Builds the named stages and those before them from shapes alone, and the losses of the named ones.

    Raises:
        InputError: for what does not fit together, before anything is trained or written.
    """
    waiting = set(names)
    for planned in plan(system):
        name, task = planned.name, planned.task
        if name in waiting:
            check_batch(task.recipe.batch_size, mesh, task.recipe.optimizer.accumulation)
            check_image_size(name, task.recipe, system.data.image_size)
            batch = abstract_batch(system, task, None)
            extra = jax.eval_shape(task.init_extra)
            jax.eval_shape(task.loss, planned.params, batch, jax.random.key(0), task.frozen, extra)
            waiting.remove(name)
        if not waiting:
            return


def check_image_size(name: str, recipe: Recipe, size: int | None) -> None:
    """Raises InputError for images of a side below what the stage is to make; None: not known yet."""
    if size is not None and recipe.output_size is not None and size < recipe.output_size:
        raise InputError(
            f"{name} is to learn images of {recipe.output_size} pixels and the data's have {size}: set "
            f"data.image_size={recipe.output_size} or more, or train the other stages alone"
        )


def versions() -> dict[str, str]:
    """The versions of what trained a stage."""
    names = ("dalle2-jax", "jax", "flax", "optax", "orbax-checkpoint")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _source(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Whose public weights a stage goes back to, and their licence, as it or the one it starts from records it."""
    for stage in (StageFolder(folder) for folder in (directory, recipe.init_from) if folder is not None):
        if stage.exists and stage.record.source:
            return {"source": stage.record.source}
    return {}


def _kinds(system: System) -> dict[str, str]:
    """The kind of every stage, trained or given."""
    trained = {name: recipe.kind for name, recipe in system.stages.items()}
    return trained | {name: stage.kind for name, stage in given_stages(system).items() if name not in trained}


def _needed(kinds: Mapping[str, str], name: str, kind: str) -> str:
    """The stage of that kind, which `name` is built on; `kinds` are those of the system's stages."""
    needed = next((other for other, its_kind in kinds.items() if its_kind == kind), None)
    if needed is None:
        raise InputError(f"the stage {name!r} needs a stage of the kind {kind!r}, and the config has none")
    return needed


def _begun(system: System, name: str, run_dir: Path) -> bool:
    """Whether the run's folder holds checkpoints of the stage's own training."""
    return bool(checkpoint_steps(run_dir / name)) and not is_given(system, name, run_dir)


def _done(system: System, name: str, run_dir: Path) -> StageRecord | None:
    """The record of a stage that is trained to its end."""
    return finished_record(run_dir / name, system.stages[name].steps) if _begun(system, name, run_dir) else None


def _check_trained(name: str, needed: str, run_dir: Path, command: str) -> None:
    """Raises InputError, naming the command, unless the stage that `name` is built on is trained to its end."""
    first = command.replace("{stage}", needed)
    stage = StageFolder(run_dir / needed)
    if stage.step is None:
        raise InputError(f"{name} needs {needed}, which is not trained yet; run first: {first}")
    if not stage.is_finished():
        raise InputError(
            f"{name} needs {needed}, which has stopped at step {stage.step} of {stage.record.steps}; run first: {first}"
        )


class _Feed:
    """The run's tokenizer and the system's data, opened when they are first asked for."""

    def __init__(self, system: System, run_dir: Path, log: Log = print):
        self.system, self.run_dir, self.log = system, run_dir, log
        self._sources: dict[str, Any] = {}
        self._told: set[str] = set()
        self._tokenizer: AnyTokenizer | None = None

    def source(self, split: str) -> Any:
        if split not in self._sources:
            source = self._sources[split] = hosts.first_then_others(lambda: open_source(self.system.data, split))
            hosts.check_same(f"the split {split!r} of {source.name}", len(source))
            if source.notice and source.notice not in self._told:
                self._told.add(source.notice)
                self.log(source.notice)
        return self._sources[split]

    def check(self, name: str, recipe: Recipe) -> None:
        """Raises InputError for a stage that asks for larger batches or pictures than the data have."""
        split = self.system.data.train_split
        source = self.source(split)
        if not len(source):
            raise InputError(f"the split {split!r} of {source.name} is empty; there is nothing to train on")
        if recipe.batch_size > len(source):
            raise InputError(
                f"{name}.batch_size is {recipe.batch_size} and the split {split!r} of {source.name} has "
                f"{len(source)} pictures; set {name}.batch_size={1 << len(source).bit_length() - 1} or less"
            )
        if recipe.output_size is not None and self.system.data.image_size is None:
            check_image_size(name, recipe, source.pictures([0]).shape[1])

    @property
    def tokenizer(self) -> AnyTokenizer:
        """That of the given stages, of the run's other ones, of one that is started from, or one of the captions."""
        if self._tokenizer is None:
            known = given_tokenizer(self.system) or self._recorded()
            self._tokenizer = known or inherited_tokenizer(self.system, self.log) or self._train()
            hosts.check_same("the tokenizer", self._tokenizer.to_json())
        return self._tokenizer

    def _recorded(self) -> AnyTokenizer | None:
        for name in self.system.stages:
            stage = StageFolder(self.run_dir / name)
            if stage.step is None or stage.record.tokenizer is None:
                continue
            tokenizer = tokenizer_from_json(stage.record.tokenizer)
            if tokenizer.context_length != self.system.context_length:
                raise InputError(
                    f"the tokenizer in {stage.path} cuts captions at {tokenizer.context_length} tokens and the config "
                    f"says {self.system.context_length}; choose another --run, or delete {self.run_dir}"
                )
            return tokenizer
        return None

    def _train(self) -> Tokenizer:
        split = self.system.data.train_split
        captions = all_captions(self.system.data, split, self.source(split))
        return Tokenizer.train(captions, self.system.vocabulary_size, self.system.context_length)

    def training(self, task: Task, mesh: Mesh) -> Any:
        """Endless batches of the training split."""
        recipe, spec, split = task.recipe, task.batch_spec, self.system.data.train_split
        return train_iterator(
            self.system.data,
            split,
            self.tokenizer if spec.captions else None,
            recipe.batch_size,
            recipe.seed,
            image_size=spec.image_size,
            transform=spec.transform,
            rows=own_rows(batch_sharding(mesh), recipe.batch_size),
            source=self.source(split),
        )

    def validation(self, task: Task, mesh: Mesh) -> list[dict[str, Any]]:
        """The recipe's whole batches, or as many examples as the split has, in batches that divide over the mesh."""
        recipe, spec, split = task.recipe, task.batch_spec, self.system.data.validation_split
        source, parts = self.source(split), batch_parts(mesh)
        size = min(recipe.batch_size, len(source) // parts * parts)
        count = min(recipe.validation_batches, len(source) // size) if size else 0
        if not count:
            return []
        return evaluation_batches(
            self.system.data,
            split,
            self.tokenizer if spec.captions else None,
            size,
            count * size,
            image_size=spec.image_size,
            with_captions=True,
            rows=own_rows(batch_sharding(mesh), size),
            source=source,
        )


def plan_stages(system: System, names: Sequence[str], run_dir: Path, mesh: Mesh, log: Log = print) -> None:
    """A dry run: builds every named stage and those it needs, lowers one training step of each, and writes nothing.

    What is in the run's folder is mentioned and not compared.

    Raises:
        InputError: for what is wrong with the config or the mesh.
    """
    log = hosts.only_first(log)
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
        count = sum(leaf.size for leaf in jax.tree.leaves(planned.params))
        devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        log(
            f"{name}: {count:,} parameters, {recipe.steps} steps of {recipe.batch_size} pictures on {devices}, "
            f"in {run_dir / name}{_found(system, name, run_dir)}"
        )
    for name, folder in system.given.items():
        if name not in names and not _begun(system, name, run_dir):
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


def _found(system: System, name: str, run_dir: Path) -> str:
    done = _done(system, name, run_dir)
    if done is not None:
        return f" (finished, {duration(done.seconds)})"
    if _begun(system, name, run_dir):
        return f" (goes on from step {checkpoint_steps(run_dir / name)[-1]})"
    return " (in place of the given one)" if is_given(system, name, run_dir) else ""


def trace_step(system: System, task: Task, abstract: Any, mesh: Mesh) -> jax.stages.Traced:
    """One training step, traced from shapes alone; no data is read and nothing is allocated."""
    shardings = partition(task.frozen, mesh, system.sharding, system.smallest_split)
    frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), task.frozen, shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which says for what devices this is traced
        return make_step(task, mesh, abstract).trace(abstract, abstract_batch(system, task, mesh), frozen)


def abstract_batch(system: System, task: Task, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, split over `mesh` where one is given.

    Where neither the data nor the task say how large images are, they are as large as the task makes them, or of
    `ANY_SIZE`.
    """
    spec, count = task.batch_spec, task.recipe.batch_size
    sizes = [size for size in (system.data.image_size, spec.image_size) if size is not None]
    size = min(sizes, default=task.recipe.output_size or ANY_SIZE)
    split = None if mesh is None else batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    images = {"image": np.zeros((size, size, 3), np.uint8)}
    if spec.transform is not None:
        images = spec.transform(images["image"], np.random.default_rng(0))
    batch = {name: array(value.shape, value.dtype) for name, value in images.items()}
    if spec.captions:
        length = system.context_length
        batch |= {"tokens": array((length,), jnp.int32), "mask": array((length,), jnp.bool_)}
    return {**batch, "index": array((), jnp.int32)}
