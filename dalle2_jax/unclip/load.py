"""The stages of a run, loaded and checked against each other."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from dalle2_jax.checkpoint import CheckpointError, LoadedStage, Run, StageFolder
from dalle2_jax.checkpoint.run import CASCADE, KINDS, first_of_kind, of_kind
from dalle2_jax.errors import InputError, StageMismatch
from dalle2_jax.tokenizer import AnyTokenizer, tokenizer_from_json
from dalle2_jax.unclip.placement import put_stage_on_devices


@dataclass(frozen=True)
class Stages:
    """The stages of a run by what they do, None where there is none, and the tokenizer they were trained with."""

    clip: LoadedStage | None
    prior: LoadedStage | None
    decoder: LoadedStage | None
    upsamplers: tuple[LoadedStage, ...]
    tokenizer: AnyTokenizer


def load_run(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: str | None = None,
    shard: bool | None = None,
    prior: str | None = None,
) -> Stages:
    """Reads the finished or latest checkpoints of a run; see `DALLE2.load`."""
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no run at {path}; train one with `python -m train configs/shapes.py all`")
    run = Run(path)
    # On the devices at once, so that the host holds one stage at a time.
    folders = _with_one_prior(run, prior)
    stages = [put_stage_on_devices(folder.load(ema), dtype, shard) for folder in folders]
    for name in CASCADE:
        found = of_kind(stages, name)
        if KINDS[name].only and len(found) > 1:
            names = ", ".join(stage.name for stage in found)
            raise CheckpointError(f"{path} has more than one {name} stage: {names}; a run has one of them")
    clip, chosen, decoder = (first_of_kind(stages, kind) for kind in ("clip", "prior", "decoder"))
    upsamplers = of_kind(stages, "upsampler")
    _check_sizes(path, decoder, upsamplers)
    if clip is not None:
        _warn_of_another_clip(path, clip, chosen, decoder)
    return Stages(clip, chosen, decoder, upsamplers, tokenizer_from_json(run.caption_reader.record.tokenizer))


def _with_one_prior(run: Run, name: str | None) -> list[StageFolder]:
    """The stages that work in a run, of its priors the named one alone: by default the one named prior, or the only."""
    folders = [folder for folder in run if folder.kind in CASCADE]
    priors = {folder.name: folder for folder in of_kind(folders, "prior")}
    if name is None and len(priors) > 1:
        name = "prior" if "prior" in priors else None
        if name is None:
            raise InputError(
                f"{run.path} has the priors {', '.join(priors)}; say which by prior={next(iter(priors))!r}"
            )
    if name is not None and name not in priors:
        there = f"its priors are: {', '.join(priors)}" if priors else "it has none"
        raise InputError(f"{run.path} has no prior {name!r}; {there}")
    return [folder for folder in folders if folder.kind != "prior" or name in (None, folder.name)]


def _check_sizes(path: Path, decoder: LoadedStage | None, upsamplers: tuple[LoadedStage, ...]) -> None:
    size = None if decoder is None else decoder.record.image_size
    for upsampler in upsamplers:
        low_size = upsampler.record.low_size
        if size is not None and low_size != size:
            raise CheckpointError(
                f"the stage {upsampler.name} of {path} upsamples {low_size} px images but the stage before it makes "
                f"{size} px; train them with matching sizes"
            )
        size = upsampler.record.image_size


def _warn_of_another_clip(path: Path, clip: LoadedStage, *stages: LoadedStage | None) -> None:
    for stage in filter(None, stages):
        if stage.record.built_on.get("clip", clip.version) != clip.version:
            warnings.warn(
                f"the stage {stage.name} of {path} was trained on another clip than the one that is there now: its "
                f"images will not fit their captions; delete {path / stage.name} and train it anew",
                StageMismatch,
                stacklevel=4,
            )
