"""The system of configs/shapes.py with everything shrunk, and its training: a whole cascade in a few seconds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from configs import shapes
from dalle2_jax.sharding import make_mesh
from train.config.optimizer import Optimizer
from train.config.recipe import Recipe, Task
from train.config.system import System
from train.loop.loop import LoopOptions
from train.run import cascade
from train.step.programs import Programs, make_programs

STEPS = 4
COMMAND = "python -m train configs/shapes.py {stage}"
COUNTS = (96, 24, 24, 3)
CLIP_SIZE, DECODER_SIZE, FINAL_SIZE, EMBEDDING = 16, 8, 16, 8

UNET = {
    "channels": 8,
    "channel_multipliers": (1,),
    "depth": 1,
    "head_channels": 8,
    "groups": 4,
    "patch": 1,
}
TRANSFORMER = {"width": 16, "depth": 1, "heads": 2, "scan_layers": True}


def tiny_system(data_dir: Path | str) -> System:
    """The shapes cascade at its smallest: a 16 px CLIP, an 8 px decoder, an upsampler to 16 px, four steps a stage."""
    full = shapes.system()
    clip, prior, decoder, upsampler = (full.stages[name] for name in ("clip", "prior", "decoder", "upsampler"))
    module = clip.module
    vision = module.vision.clone(image_size=CLIP_SIZE, patch_size=8, **TRANSFORMER)
    clip = _short(clip, module=module.clone(vision=vision, text=module.text.clone(**TRANSFORMER), embedding_size=8))
    prior = _short(
        prior,
        module=prior.module.clone(embedding_size=EMBEDDING, **TRANSFORMER),
        sampling=dataclasses.replace(prior.sampling, steps="3"),
    )
    autoregressive = full.stages["autoregressive_prior"]
    transformer = autoregressive.module.transformer.clone(**TRANSFORMER)
    autoregressive = _short(
        autoregressive,
        module=autoregressive.module.clone(
            transformer=transformer, embedding_size=EMBEDDING, components=4, buckets=8, similarity_buckets=4
        ),
        codec_examples=64,
    )
    unet = decoder.module.unet.clone(image_size=DECODER_SIZE, attention_resolutions=(), **UNET)
    decoder = _short(
        decoder,
        module=decoder.module.clone(unet=unet, text_width=16),
        sampling=dataclasses.replace(decoder.sampling, steps="3"),
    )
    upsampler = _short(
        upsampler,
        module=upsampler.module.clone(unet=upsampler.module.unet.clone(image_size=FINAL_SIZE, **UNET)),
        low_size=DECODER_SIZE,
        sampling=dataclasses.replace(upsampler.sampling, steps="2"),
    )
    return dataclasses.replace(
        full,
        name="tiny",
        data=dataclasses.replace(full.data, data_dir=str(data_dir), counts=COUNTS),
        stages={
            "clip": clip,
            "prior": prior,
            "decoder": decoder,
            "upsampler": upsampler,
            "autoregressive_prior": autoregressive,
        },
    )


def _short(recipe: Recipe, **changes) -> Recipe:
    return dataclasses.replace(
        recipe,
        steps=STEPS,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2, schedule="cosine", ema_decay=0.9),
        log_every=1,
        validate_every=STEPS,
        validation_batches=1,
        preview_every=STEPS,
        preview_count=2,
        checkpoint_every=2,
        **changes,
    )


def train(system: System, run_dir: Path, names: Sequence[str] | None = None, **settings) -> tuple[object, list[str]]:
    """Trains stages (all by default) on one device; `settings` are the loop's options. Returns the result and the log.

    What a stage compiles is kept for others that are the same, which would else be traced anew each time.
    """
    lines: list[str] = []
    mesh, options = make_mesh(devices=jax.devices()[:1]), LoopOptions(programs=_made_once, **settings)
    result = cascade.train_stages(
        system, names or system.usual_stages, run_dir, mesh, command=COMMAND, options=options, log=lines.append
    )
    return result, lines


def _made_once(task: Task, mesh: Mesh, abstract: Any) -> Programs:
    key = repr((type(task), dataclasses.replace(task, frozen={}), mesh, abstract))
    if key not in _programs:
        _programs[key] = make_programs(task, mesh, abstract)
    return _programs[key]


_programs: dict[str, Programs] = {}
