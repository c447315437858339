"""The system in a run's folder, by the kinds of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dalle2_jax.checkpoint import CheckpointError, LoadedStage, Run, StageFolder
from dalle2_jax.checkpoint.record import has_record
from dalle2_jax.checkpoint.run import CASCADE, first_of_kind
from dalle2_jax.errors import InputError
from dalle2_jax.systems.lineage import SYSTEMS
from dalle2_jax.systems.model import ImageModel
from dalle2_jax.tokenizer import tokenizer_from_json
from dalle2_jax.unclip import DALLE2
from dalle2_jax.unclip.placement import put_stage_on_devices

SAMPLES = ("prior", "decoder", "upsampler")  # kinds that make a run one of DALL-E 2


def load(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shard: bool | None = None,
    prior: str | None = None,
) -> DALLE2 | ImageModel:
    """The system of a run (runs/demo), or of one stage of a run that has several (runs/lineage/vae).

    A stage of DALL-E 2 stands for the whole cascade of its run. Other arguments: those of `DALLE2.load`.

    Raises:
        CheckpointError: if there is no run, or a stage is damaged.
        InputError: if the run has several systems, naming them, or the stage is of no known kind.
    """
    path = Path(path)
    settings = {"ema": ema, "dtype": dtype, "shard": shard}
    if has_record(path):
        stage = StageFolder(path)
        if stage.kind not in CASCADE:
            return _load_stage(stage, Run(path.parent), **settings)
        path = path.parent
    elif path.is_dir():
        run = Run(path)
        alone = [stage for stage in run if stage.kind in SYSTEMS and not _is_a_part(stage, run)]
        cascade = [stage for stage in run if stage.kind in SAMPLES][:1]
        systems = [*cascade, *alone]
        if len(systems) > 1:
            names = ", ".join(stage.name for stage in systems)
            raise InputError(f"{path} has several systems: {names}; name one, such as {systems[-1].path}")
        if alone:
            return _load_stage(alone[0], run, **settings)
    return DALLE2.load(path, **settings, prior=prior)


def _is_a_part(stage: StageFolder, run: Run) -> bool:
    """Whether another stage of the run works by this one."""
    return any(stage.kind in SYSTEMS[other.kind].needs for other in run if other.kind in SYSTEMS)


def _load_stage(folder: StageFolder, run: Run, ema: bool, dtype: str | None, shard: bool | None) -> ImageModel:
    if folder.kind not in SYSTEMS:
        raise InputError(
            f"{folder.path} is a stage of the kind {folder.kind!r}, which is no system here; load it by "
            "dalle2_jax.checkpoint.load_stage"
        )
    system = SYSTEMS[folder.kind]

    def read(one: StageFolder) -> LoadedStage:
        return put_stage_on_devices(one.load(ema), dtype, shard)

    others = {}
    for kind in (*system.needs, *system.takes):
        found = first_of_kind(run, kind)
        if found is not None:
            others[kind] = read(found)
        elif kind in system.needs:
            raise CheckpointError(f"{folder.path} works with a stage of the kind {kind!r}, and {run.path} has none")
    tokenizer = folder.record.tokenizer
    return system(read(folder), others, None if tokenizer is None else tokenizer_from_json(tokenizer))
