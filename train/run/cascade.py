"""A system's stages in order: each one is given its data, the run's tokenizer and the earlier stages, and trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dalle2_jax.checkpoint import Run, StageFolder, load_stage
from dalle2_jax.checkpoint.rebuild import public_path
from dalle2_jax.sharding import processes
from train.config.system import System
from train.loop.loop import LoopOptions, Result
from train.run import shared_folder
from train.run.feed import Feed
from train.run.given import check_given, place_given
from train.run.init_from import check_start, initial_parameters
from train.run.plan import check_stages, kinds_of, needed_stage
from train.run.record import Log, source_of, versions
from train.run.stage import run
from train.run.status import check_trained, finished_stage, has_begun


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

    Before that, the stages that the system is given are put into the run's folder (see `train.run.given`).

    Args:
        run_dir: the run's folder, one folder a stage below it.
        command: how training is called, for sentences that say what to run first.
        config: what `stage.json` says of the config (name, text, overrides).
        options: how each is trained; sharding rules are the system's.

    Raises:
        InputError: if a stage that one needs is not trained, or for anything that `train.run.stage.run` refuses.
    """
    options = dataclasses.replace(options or LoopOptions(), rules=system.sharding, smallest_split=system.smallest_split)
    log = processes.only_first(log)
    shared_folder.check_shared(run_dir)
    check_stages(system, names, mesh)
    before, kinds = Run(run_dir), kinds_of(system)
    check_given(system, before)
    feed = Feed(system, run_dir, log)
    for number, name in enumerate(names):
        recipe = system.stages[name]
        for kind in recipe.needs:
            needed = needed_stage(kinds, name, kind)
            to_be_given = needed in system.given and not (run_dir / needed).exists()
            if needed not in names[:number] and not to_be_given:
                check_trained(name, needed, before, command)
        if recipe.init_from is not None and not has_begun(system, name, before):
            check_start(name, recipe)
    for name in names:  # after all that needs no data
        if finished_stage(system, name, before) is None:
            feed.check(name, system.stages[name])
    processes.wait_for_all()  # until now all have read what was there before
    place_given(system, names, run_dir, log)
    for name in names:
        network = public_path(type(system.stages[name].module))
        if not network.startswith("dalle2_jax."):
            loading = f'load_stage(..., allow=("{network.partition(".")[0]}",))'
            log(f"{name}: its network {network} is not part of dalle2_jax; {loading} loads it")
    result = Result(0, 0.0, True)
    own = {type(recipe.module).__module__ for recipe in system.stages.values()}  # the config's own networks
    for name in names:
        recipe = system.stages[name]
        needed = {kind: load_stage(run_dir / needed_stage(kinds, name, kind), allow=own) for kind in recipe.needs}
        task = recipe.build(needed)
        info = {
            "config": dict(config or {}),
            "data": system.data,
            "tokenizer": feed.tokenizer.to_json() if recipe.reads_captions else None,
            "init_from": recipe.init_from,
            **source_of(recipe, run_dir / name),
            "built_on": {kind: stage.version for kind, stage in needed.items()},
            "versions": versions(),
        }
        here, initial = StageFolder(run_dir / name), None
        if recipe.init_from is not None and here.step is None:
            initial = initial_parameters(name, task, feed.tokenizer if recipe.reads_captions else None, log)
        result = run(
            task,
            stage_name=name,
            stage_dir=run_dir / name,
            batches=lambda task=task: feed.training(task, mesh),
            validation=[] if here.is_finished(recipe.steps) else feed.validation(task, mesh),
            mesh=mesh,
            info=info,
            initial=initial,
            options=options,
            log=log,
        )
        if result.signal is not None:
            break
    return result
