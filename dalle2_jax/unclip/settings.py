"""How a loaded stage is sampled: the process it was trained with, and its own settings with some changed."""

import dataclasses
from typing import Any

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.diffusion import Process
from dalle2_jax.errors import InputError, nearest

_NOT_GUIDED = "an upsampler, which is not guided"
# Fields of Sampling that a kind of stage does not read, and why.
UNUSED = {
    "decoder": {"candidates": "the decoder; the prior samples them"},
    "ddpm": {"candidates": "a DDPM, which samples one image a key"},
    "upsampler": {
        "candidates": "the upsampler; the prior samples them",
        "guidance_scale": _NOT_GUIDED,
        "guidance_interval": _NOT_GUIDED,
    },
}


def process_of(stage: LoadedStage) -> Process | None:
    """The process a stage was trained with, and what was measured of the network then; None where it has none."""
    if stage.record.process is None:
        return None
    error = stage.record.measured.get("x0_error")
    return dataclasses.replace(stage.record.rebuilt("process"), x0_error=None if error is None else tuple(error))


def sampling_of(stage: LoadedStage, changes: dict[str, Any]) -> Any:
    """The stage's own sampling settings with some changed: a `Sampling`, or what another prior is sampled by.

    Raises:
        InputError: for a field that there is not, or a change that would have no effect.
    """
    own = stage.record.rebuilt("sampling")
    check_names(own, changes, "sampling has no field")
    sampling = dataclasses.replace(own, **changes)
    for name, reason in {**sampling.without_effect(), **UNUSED.get(stage.kind, {})}.items():
        if getattr(sampling, name) != getattr(own, name):
            raise InputError(f"{name} has no effect with {reason}")
    return sampling


def check_names(own: Any, changes: dict[str, Any], refusal: str) -> None:
    """Raises InputError, which begins with `refusal`, for a name that is no field of the settings."""
    known = [field.name for field in dataclasses.fields(own)]
    for name in changes:
        if name not in known:
            raise InputError(f"{refusal} {name!r}; the nearest of {', '.join(known)} is {nearest(name, known)}")


def check_sampling(stage: LoadedStage, changes: dict[str, Any]) -> None:
    """Raises InputError for changes that the stage's settings or its process cannot have."""
    sampling, process = sampling_of(stage, changes), process_of(stage)
    if process is not None:
        sampling.process(process)


def evaluations_of(stage: LoadedStage, changes: dict[str, Any]) -> int:
    """How many times the stage's network is asked for one image, under these changed settings.

    Of a prior without a process once a code, of which `components` says the number.
    """
    sampling, process = sampling_of(stage, changes), process_of(stage)
    guided = 2 if sampling.is_guided and "guidance_scale" not in UNUSED.get(stage.kind, {}) else 1
    samples = 1 if "candidates" in UNUSED.get(stage.kind, {}) else sampling.candidates
    steps = stage.module.components if process is None else sampling.process(process).steps
    return steps * guided * samples


def check_tile(stage: LoadedStage, tile: int | None) -> None:
    """Raises InputError for tiles in which an upsampler cannot work."""
    unet = stage.module.unet
    divisor = unet.patch * 2 ** (len(unet.channel_multipliers) - 1)
    if tile is not None and (tile < 1 or tile % divisor):
        raise InputError(f"tile is {tile}; tiles of the stage {stage.name} must be multiples of {divisor}")
