"""Karlo, fine-tuned on your own pictures: its prior and its decoder go on from the public weights.

    dalle2 convert karlo SRC runs/karlo --clip openai/clip-vit-large-patch14            # once
    dalle2 data check PICTURES
    python -m train describe configs/karlo.py runs/karlo PICTURES                       # what it takes
    python -m train configs/karlo.py runs/karlo PICTURES decoder --run tuned            # how pictures look
    python -m train configs/karlo.py runs/karlo PICTURES prior --run tuned              # what captions mean; or: all
    dalle2 generate runs/tuned "..."

PICTURES is a folder as configs/folder.py reads it. Networks, processes and sampling are those that RUN records, so that
they always fit its weights. What is not trained is taken over from RUN: CLIP, which must have its picture encoder, the
upsampler, and the prior or the decoder until it is trained too. Training keeps float32 parameters, also of a run that
was converted to bfloat16, and computes in bfloat16 on an accelerator. What lasts through a step is about 20 GiB for
either stage (--mesh fsdp=N shares it among N devices), activations come on top, and a checkpoint is about 15 GB.

Karlo's own settings: the prior's caption is dropped in 20% of the examples, the decoder's in 30% and its image
embedding in 10%. The prior takes 25 steps at guidance 4 and clamps its x_0 to 10 in Kakao Brain's code and to 5 in
diffusers' (`prior.process.clip=10` where the prior is trained); the decoder takes 25 steps (the fast setting) or 50 at
guidance 8; the upsampler takes 7, the last of them by a network of its own.

The upsampler is not fine-tuned: it is two networks, of which the last was trained by an adversarial loss, and there is
no recipe for that here. The steps are for some hundred to some thousand pictures. Watch the held-out loss: it rises
when they are being learned by heart (`decoder.steps=500`).
"""

from pathlib import Path
from typing import Any

import flax.linen as nn

from dalle2_jax.checkpoint import CheckpointError, StageRecord, read_record
from dalle2_jax.data.pipeline import Data
from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer import tokenizer_from_json
from train.decoder import DecoderRecipe
from train.optimizer import Optimizer
from train.prior import PriorRecipe
from train.system import System

STAGES = ("clip", "prior", "decoder", "upsampler")


def system(accelerator: bool, run: str, pictures: str) -> System:
    """Prior and decoder of the converted `run`, trained on the folder `pictures`, after which the new run is named.

    Raises:
        InputError: if `run` lacks a stage, or its CLIP the picture encoder.
    """
    records = {name: _read(run, name) for name in STAGES}
    clip, prior, decoder = (records[name].rebuilt("module") for name in STAGES[:3])
    if clip.vision is None:
        raise InputError(
            f"the CLIP of {run} has no picture encoder, without which nothing can be trained on pictures; convert "
            "again with --clip openai/clip-vit-large-patch14"
        )
    common = {"optimizer": _optimizer(accelerator), "validate_every": 200, "checkpoint_every": 500}
    if not accelerator:
        common |= {"log_every": 5, "validate_every": 25, "checkpoint_every": 50}
    stages = {
        "prior": PriorRecipe(
            module=_trained(prior, accelerator),
            **_settings(records["prior"]),
            text_drop=0.2,
            init_from=str(Path(run) / "prior"),
            steps=1000 if accelerator else 100,
            batch_size=64 if accelerator else 8,
            preview_every=0,
            **common,
        ),
        "decoder": DecoderRecipe(
            module=_trained(decoder, accelerator),
            **_settings(records["decoder"]),
            text_drop=0.3,
            image_drop=0.1,
            init_from=str(Path(run) / "decoder"),
            steps=2000 if accelerator else 100,
            batch_size=32 if accelerator else 4,
            preview_every=500 if accelerator else 50,
            **common,
        ),
    }
    place = Path(pictures).expanduser().resolve()
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


def _optimizer(accelerator: bool) -> Optimizer:
    """A small rate, and an average over the last tenth of the steps or so."""
    return Optimizer(
        learning_rate=1e-5,
        warmup_steps=100 if accelerator else 10,
        schedule="cosine",
        ema_decay=0.995 if accelerator else 0.95,
    )


def _trained(module: nn.Module, accelerator: bool) -> nn.Module:
    """The network with float32 parameters; on an accelerator computing in bfloat16, and again in the backward pass."""
    computing = {"param_dtype": "float32", "dtype": "bfloat16" if accelerator else "float32"}
    if hasattr(module, "unet"):
        return module.clone(unet=module.unet.clone(remat=accelerator, **computing), **computing)
    return module.clone(remat=accelerator, **computing)
