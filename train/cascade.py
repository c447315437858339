"""A system's stages in order: each one is given its data, the run's tokenizer and the earlier stages, and trained."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dalle2_jax.sharding import DEFAULT_RULES, batch_parts, batch_sharding, check_batch, own_rows, partition
from dalle2_jax.tokenizer import AnyTokenizer, Tokenizer, tokenizer_from_json
from train import hosts
from train.finetune import check_start, inherited_tokenizer, initial_parameters
from train.given import check_given, given_stages, given_tokenizer, is_given, place_given, planned_given
from train.loop import Result, run
from train.metrics import duration
from train.resume import finished_record, stage_record
from train.state import abstract_state, make_step, with_carry
from train.system import Recipe, System

Log = Callable[[str], None]


def train_stages(
    system: System,
    names: Sequence[str],
    run_dir: Path,
    mesh: Mesh,
    *,
    command: str,
    config: Mapping[str, Any] | None = None,
    profile: tuple[int, int] | None = None,
    log: Log = print,
) -> Result:
    """Trains the named stages in order; stops early if one is stopped by a signal.

    Before that, the stages that the system is given are put into the run's folder (see `train.given`).

    Args:
        run_dir: the run's folder, one folder a stage below it.
        command: how training is called, for sentences that say what to run first.
        config: what `stage.json` says of the config (name, text, overrides).
        profile: the steps of each stage to record (see `train.profile`).

    Raises:
        InputError: if a stage that one needs is not trained, or for anything that `train.loop.run` refuses.
    """
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
        recipe, frozen = recipe.attach(needed)
        info = {
            "config": dict(config or {}),
            "data": system.data,
            "tokenizer": feed.tokenizer.to_json(),
            "init_from": recipe.init_from,
            **_source(recipe, run_dir / name),
            "built_on": {kind: stage.version for kind, stage in needed.items()},
            "versions": versions(),
        }
        finished = finished_record(run_dir / name, recipe.steps) is not None
        initial = None
        if recipe.init_from is not None and not checkpoint_steps(run_dir / name):
            initial = initial_parameters(name, recipe, feed.tokenizer, log)
        result = run(
            recipe,
            stage_name=name,
            stage_dir=run_dir / name,
            batches=lambda recipe=recipe: feed.training(recipe, mesh),
            validation=[] if finished else feed.validation(recipe, mesh),
            frozen=frozen,
            mesh=mesh,
            info=info,
            initial=initial,
            profile=profile,
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
    for name, recipe, frozen, params in planned_stages(system):
        if name in waiting:
            check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
            check_pictures(name, recipe, system.data.image_size)
            carry = jax.eval_shape(recipe.init_carry)
            known = with_carry(frozen, carry)
            jax.eval_shape(recipe.loss, params, abstract_batch(system, recipe, None), jax.random.key(0), known)
            waiting.remove(name)
        if not waiting:
            return


def check_pictures(name: str, recipe: Recipe, size: int | None) -> None:
    """Raises InputError for pictures of a side below what the stage is to draw; None: not known yet."""
    if size is not None and recipe.drawn_size is not None and size < recipe.drawn_size:
        raise InputError(
            f"{name} is to learn pictures of {recipe.drawn_size} pixels and the data's have {size}: set "
            f"data.image_size={recipe.drawn_size} or more, or train the other stages alone"
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
        if recipe.drawn_size is not None and self.system.data.image_size is None:
            check_pictures(name, recipe, source.pictures([0]).shape[1])

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
            if stage.step is None:
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

    def training(self, recipe: Recipe, mesh: Mesh) -> Any:
        return train_iterator(
            self.system.data,
            self.system.data.train_split,
            self.tokenizer,
            recipe.batch_size,
            recipe.seed,
            image_size=recipe.picture_size,
            transform=recipe.prepare(),
            rows=own_rows(batch_sharding(mesh), recipe.batch_size),
            source=self.source(self.system.data.train_split),
        )

    def validation(self, recipe: Recipe, mesh: Mesh) -> list[dict[str, Any]]:
        """The recipe's whole batches, or as many examples as the split has, in batches that divide over the mesh."""
        source, parts = self.source(self.system.data.validation_split), batch_parts(mesh)
        size = min(recipe.batch_size, len(source) // parts * parts)
        count = min(recipe.validation_batches, len(source) // size) if size else 0
        if not count:
            return []
        return evaluation_batches(
            self.system.data,
            self.system.data.validation_split,
            self.tokenizer,
            size,
            count * size,
            image_size=recipe.picture_size,
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
    for name, recipe, frozen, _ in planned_stages(system):
        if name not in names:
            continue
        check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
        check_pictures(name, recipe, system.data.image_size)
        if recipe.init_from is not None:
            check_start(name, recipe)
        abstract = abstract_state(recipe, mesh)
        lower_step(system, recipe, abstract, frozen, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
        devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        log(
            f"{name}: {count:,} parameters, {recipe.steps} steps of {recipe.batch_size} pictures on {devices}, "
            f"in {run_dir / name}{_found(system, name, run_dir)}"
        )
    for name, folder in system.given.items():
        if name not in names and not _begun(system, name, run_dir):
            log(f"{name}: that of {folder}")
    log("dry run: nothing was written")


def planned_stages(system: System) -> Iterator[tuple[str, Recipe, Any, Any]]:
    """(name, attached recipe, frozen parameters, own parameters) of every trained stage, as shapes and in order.

    Raises:
        InputError: if a network cannot be built, or a stage needs one that is not before it.
    """
    planned = planned_given(system)
    for name, recipe in system.stages.items():
        yield name, *plan_stage(name, recipe, planned)


def plan_stage(name: str, recipe: Recipe, planned: dict[str, LoadedStage]) -> tuple[Recipe, Any, Any]:
    """(attached recipe, frozen parameters, own parameters) as shapes; adds the stage to those `planned`, by kind.

    Raises:
        InputError: if the network cannot be built, or needs a stage that is not planned.
    """
    for kind in recipe.needs:
        if kind not in planned:
            raise InputError(f"the stage {name!r} needs a stage of the kind {kind!r} before it, and there is none")
    recipe, frozen = recipe.attach({kind: planned[kind] for kind in recipe.needs})
    params = jax.eval_shape(recipe.init, jax.random.key(0))
    ema = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)  # what later stages are given
    planned.setdefault(recipe.kind, LoadedStage(recipe.module, ema, stage_record(recipe, name)))
    return recipe, frozen, params


def _found(system: System, name: str, run_dir: Path) -> str:
    done = _done(system, name, run_dir)
    if done is not None:
        return f" (finished, {duration(done.seconds)})"
    if _begun(system, name, run_dir):
        return f" (goes on from step {checkpoint_steps(run_dir / name)[-1]})"
    return " (in place of the given one)" if is_given(system, name, run_dir) else ""


def trace_step(system: System, recipe: Recipe, abstract: Any, frozen: Any, mesh: Mesh) -> jax.stages.Traced:
    """One training step of an attached recipe, traced from shapes alone; no data is read and nothing is allocated."""
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), frozen, partition(frozen, mesh, DEFAULT_RULES)
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which says for what devices this is traced
        return make_step(recipe, mesh, abstract).trace(abstract, abstract_batch(system, recipe, mesh), placed)


def lower_step(system: System, recipe: Recipe, abstract: Any, frozen: Any, mesh: Mesh) -> jax.stages.Lowered:
    """The same step, lowered."""
    return trace_step(system, recipe, abstract, frozen, mesh).lower()


def abstract_batch(system: System, recipe: Recipe, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, split over `mesh` where one is given."""
    sizes = [size for size in (system.data.image_size, recipe.picture_size) if size is not None]
    size, length = min(sizes, default=0), system.context_length
    split = None if mesh is None else batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=split)

    prepare = recipe.prepare()
    pictures = {"image": np.zeros((size, size, 3), np.uint8)}
    if prepare is not None:
        pictures = prepare(pictures["image"], np.random.default_rng(0))
    return {
        **{name: array(value.shape, value.dtype) for name, value in pictures.items()},
        "tokens": array((length,), jnp.int32),
        "mask": array((length,), jnp.bool_),
        "index": array((), jnp.int32),
    }
