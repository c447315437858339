"""Karlo, fine-tuned on your own images: its prior and its decoder go on from the public weights.

    dalle2 convert karlo SRC runs/karlo --clip openai/clip-vit-large-patch14            # once
    dalle2 data check IMAGES
    python -m train describe configs/karlo.py runs/karlo IMAGES                       # what it takes
    python -m train configs/karlo.py runs/karlo IMAGES decoder --run tuned            # how images look
    python -m train configs/karlo.py runs/karlo IMAGES prior --run tuned              # what captions mean; or: all
    dalle2 generate runs/tuned "..."

IMAGES is a folder as configs/folder.py reads it. Networks, processes and sampling are those that RUN records, so that
they always fit its weights. What is not trained is taken over from RUN: CLIP, which must have its image encoder, the
upsampler, and the prior or the decoder until it is trained too. Training keeps float32 parameters, also of a run that
was converted to bfloat16; configs/karlo_large.py, for accelerators, computes in bfloat16. What lasts through a step is
about 20 GiB for either stage (--mesh fsdp=N shares it among N devices), activations come on top, and a checkpoint is
about 15 GB.

Karlo's own settings: the prior's caption is dropped in 20% of the examples, the decoder's in 30% and its image
embedding in 10%. The prior takes 25 steps at guidance 4 and clamps its x_0 to 10 in Kakao Brain's code and to 5 in
diffusers' (`prior.process.clip=10` where the prior is trained); the decoder takes 25 steps (the fast setting) or 50 at
guidance 8; the upsampler takes 7, the last of them by a network of its own.

The upsampler is not fine-tuned: it is two networks, of which the last was trained by an adversarial loss, and there is
no recipe for that here. The steps are for some hundred to some thousand images. Watch the held-out loss: it rises
when they are being learned by heart (`decoder.steps=500`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from dalle2_jax.checkpoint import CheckpointError, StageRecord, read_record
from dalle2_jax.data.dataset import Data
from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer import tokenizer_from_json
from train.config.optimizer import Optimizer
from train.config.system import System
from train.recipes.decoder import DecoderRecipe
from train.recipes.prior import PriorRecipe

STAGES = ("clip", "prior", "decoder", "upsampler")


@dataclass(frozen=True)
class Size:
    """How long and on what a machine trains the two stages.

    dtype: of the computation. remat: whether what a layer computes is computed again in the backward pass. steps,
    batch: of the prior and of the decoder. often: the decoder's previews, and both stages' logs, validations and
    checkpoints, in steps. average: the moving average's decay, over the last tenth of the steps or so.
    """

    dtype: str
    remat: bool
    prior_steps: int
    prior_batch: int
    decoder_steps: int
    decoder_batch: int
    warmup_steps: int
    average: float
    log_every: int
    validate_every: int
    checkpoint_every: int
    preview_every: int


CPU = Size("float32", False, 100, 8, 100, 4, 10, 0.95, 5, 25, 50, 50)


def system(run: str, images: str) -> System:
    """Prior and decoder of the converted `run`, trained on the folder `images`, after which the new run is named."""
    return tuned(run, images, CPU)


def tuned(run: str, images: str, size: Size) -> System:
    """The system of `system`, at a size.

    Raises:
        InputError: if `run` lacks a stage, or its CLIP the image encoder.
    """
    records = {name: _read(run, name) for name in STAGES}
    clip, prior, decoder = (records[name].rebuilt("module") for name in STAGES[:3])
    if clip.vision is None:
        raise InputError(
            f"the CLIP of {run} has no image encoder, without which nothing can be trained on images; convert "
            "again with --clip openai/clip-vit-large-patch14"
        )
    optimizer = Optimizer(learning_rate=1e-5, warmup_steps=size.warmup_steps, schedule="cosine", ema_decay=size.average)
    common = {
        "optimizer": optimizer,
        "log_every": size.log_every,
        "validate_every": size.validate_every,
        "checkpoint_every": size.checkpoint_every,
    }
    stages = {
        "prior": PriorRecipe(
            module=_trained(prior, size),
            **_settings(records["prior"]),
            text_drop=0.2,
            init_from=str(Path(run) / "prior"),
            steps=size.prior_steps,
            batch_size=size.prior_batch,
            preview_every=0,
            **common,
        ),
        "decoder": DecoderRecipe(
            module=_trained(decoder, size),
            **_settings(records["decoder"]),
            text_drop=0.3,
            image_drop=0.1,
            init_from=str(Path(run) / "decoder"),
            steps=size.decoder_steps,
            batch_size=size.decoder_batch,
            preview_every=size.preview_every,
            **common,
        ),
    }
    place = Path(images).expanduser().resolve()
    tokenizer = tokenizer_from_json(records["clip"].tokenizer)
    return System(
        name=place.name or "karlo",
        data=Data(name="folder", folder=str(place), image_size=max(clip.vision.image_size, decoder.unet.image_size)),
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
        stages=stages,
        given={name: str(Path(run) / name) for name in STAGES},
    )


def _read(run: str, name: str) -> StageRecord:
    """What the run records of a stage."""
    try:
        return read_record(Path(run) / name)
    except CheckpointError as error:
        raise InputError(f"{run} is no whole run of Karlo: {error}; make one with: dalle2 convert karlo") from error


def _settings(record: StageRecord) -> dict[str, Any]:
    """The process and the sampling of a stage."""
    return {name: record.rebuilt(name) for name in ("process", "sampling")}


def _trained(module: nn.Module, size: Size) -> nn.Module:
    """The network with float32 parameters, computing as the size says."""
    computing = {"param_dtype": "float32", "dtype": size.dtype}
    if hasattr(module, "unet"):
        return module.clone(unet=module.unet.clone(remat=size.remat, **computing), **computing)
    return module.clone(remat=size.remat, **computing)
