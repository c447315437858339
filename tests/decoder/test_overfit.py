"""Eight captioned pictures learned by heart: the whole path of the decoder, from its loss to its samples, works."""

import dataclasses
import os
import time
from types import SimpleNamespace

import jax
import numpy as np

from configs import shapes
from dalle2_jax.data.captioned_shapes import configured, example
from dalle2_jax.data.scene import draw
from dalle2_jax.data.transforms import resize
from dalle2_jax.decoder import sample_decoder
from dalle2_jax.diffusion import Sampling
from dalle2_jax.evaluation.suite import psnr
from dalle2_jax.layers.pictures import to_uint8
from dalle2_jax.sharding import make_mesh
from dalle2_jax.tokenizer import Tokenizer
from train.state import abstract_state, create_state, make_step
from train.system import Optimizer

SIZE, PICTURES, COPIES, STEPS = 16, 8, 4, 400
# The tests' compiler settings trade speed for quick compilation, which does not pay here.
OPTIMISED = {"xla_backend_optimization_level": 3}


def test_overfitting_eight_captioned_pictures():
    scenes, captions = zip(*(example(configured("one_object"), "train", i) for i in range(PICTURES)), strict=True)
    pictures = resize(np.stack([draw(scene) for scene in scenes]), SIZE)
    tokenizer = Tokenizer.train([caption for group in captions for caption in group], 400, shapes.CONTEXT)
    tokens, mask = tokenizer.encode([group[0] for group in captions])

    full = shapes.system(False)
    clip = full.stages["clip"]
    vision = clip.module.vision.clone(image_size=SIZE, patch_size=8, width=32, depth=1, heads=2)
    text = clip.module.text.clone(width=32, depth=1, heads=2)
    clip = dataclasses.replace(clip, module=clip.module.clone(vision=vision, text=text, embedding_size=16))
    clip = SimpleNamespace(module=clip.module, params=jax.jit(clip.init)(jax.random.key(0)))
    decoder = full.stages["decoder"]
    unet = decoder.module.unet.clone(
        image_size=SIZE, channels=32, channel_multipliers=(1, 2), depth=1, patch=2, groups=8, attention_resolutions=()
    ).clone(head_channels=32)
    caption = decoder.module.text.clone(width=32, depth=1, heads=2)
    optimizer = Optimizer(learning_rate=2e-3, warmup_steps=20, schedule="cosine", ema_decay=0.98)
    recipe = dataclasses.replace(
        decoder,
        module=decoder.module.clone(unet=unet, text=caption),
        optimizer=optimizer,
        steps=STEPS,
        image_drop=0.1,
        text_drop=0.5,
        embedding_noise=0.0,
    )
    recipe, frozen = recipe.attach({"clip": clip})

    batch = {"image": pictures, "tokens": tokens, "mask": mask}
    batch = jax.tree.map(lambda x: np.repeat(x, COPIES, axis=0), batch)
    mesh = make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(recipe, mesh)
    state = create_state(recipe, abstract)
    t = time.time()
    options = OPTIMISED if os.environ.get("OPT") else {}
    step = make_step(recipe, mesh, abstract).lower(state, batch, frozen).compile(options)
    print("compile", time.time() - t)
    t = time.time()
    batch, frozen = jax.device_put((batch, frozen), jax.devices()[0])
    sampler = jax.jit(
        lambda params, keys, condition: sample_decoder(
            keys,
            recipe.module,
            params,
            recipe.process,
            Sampling(sampler="ddim", steps="20"),
            **condition,
            keep_text=np.ones(PICTURES, bool),
        )
    )
    condition = recipe._condition({"image": pictures, "tokens": tokens, "mask": mask}, frozen)
    for n in range(STEPS):
        state, report = step(state, batch, frozen)
        if n % 100 == 99:
            jax.block_until_ready(state)
            print(n, float(report["loss"]), "train", time.time() - t)
            for part in ("ema", "params"):
                drawn = to_uint8(sampler(state[part], jax.random.split(jax.random.key(1), PICTURES), condition))
                print(part, psnr(np.asarray(drawn), pictures))
            t = time.time()
    assert psnr(np.asarray(drawn), pictures) >= 25
