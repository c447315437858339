"""Eight captioned images learned by heart: the whole path of the decoder, from its loss to its samples, works."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from configs import shapes
from dalle2_jax.data.sources.captioned_shapes import configured, example
from dalle2_jax.data.sources.scene import draw
from dalle2_jax.decoder import Caption, CaptionEncoder, sample_decoder
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.images.resize import resize
from dalle2_jax.layers.pixels import to_uint8
from dalle2_jax.sharding import make_mesh
from dalle2_jax.tokenizer import Tokenizer
from tests.optimised import OPTIMISED
from train.config.optimizer import Optimizer
from train.recipes.decoder import DecoderRecipe
from train.step.state import abstract_state, create_state
from train.step.step import make_step

SIZE, IMAGES, STEPS = 16, 8, 320


class Projection:
    """In CLIP's place, eight unit embeddings that can be told apart: a random projection of the pixels."""

    embedding_size = 16
    vision = SimpleNamespace(image_size=SIZE)
    text = SimpleNamespace(context_length=shapes.CONTEXT)

    def apply(self, variables, images, method):
        assert method == "encode_image"
        embedding = images.reshape(images.shape[0], -1) @ variables["params"]["projection"]
        return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)


def projected_task() -> tuple[DecoderRecipe, dict]:
    """The decoder of configs/shapes.py made small, with the paper's dropped conditions."""
    decoder = shapes.system().stages["decoder"]
    unet = decoder.module.unet.clone(
        image_size=SIZE,
        out_channels=3,
        channels=64,
        channel_multipliers=(1,),
        depth=1,
        patch=4,
        groups=8,
        attention_resolutions=(),
        middle_attention=False,
    )
    text = CaptionEncoder(shapes.VOCABULARY, shapes.CONTEXT, width=32, depth=1, heads=2)
    recipe = dataclasses.replace(
        decoder,
        module=decoder.module.clone(unet=unet, text=text, text_width=None),
        process=Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=1.0),
        loss_kind="simple",
        weighting="uniform",
        image_drop=0.1,
        text_drop=0.5,
        embedding_noise=0.0,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20, schedule="cosine", ema_decay=0.98),
        steps=STEPS,
        batch_size=IMAGES,
        seed=0,
    )
    projection = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, Projection.embedding_size))
    params = {"projection": projection.astype(np.float32)}
    return recipe.build(
        {"clip": SimpleNamespace(module=Projection(), params=params, record=SimpleNamespace(tokenizer=None))}
    )


def test_overfitting_eight_captioned_images():
    examples = [example(configured("one_object"), "train", index) for index in range(IMAGES)]
    images = resize(np.stack([draw(scene) for scene, _ in examples]), SIZE)
    captions = [group[0] for _, group in examples]
    tokens, mask = Tokenizer.train(captions, 400, shapes.CONTEXT).encode(captions)
    batch = {"image": images, "tokens": tokens, "mask": mask}
    task = projected_task()
    recipe = task.recipe

    device = jax.devices()[0]
    mesh = make_mesh(devices=[device])
    abstract = abstract_state(task, mesh)
    state = create_state(task, abstract)
    batch = jax.device_put(batch, device)
    frozen = jax.device_put(task.frozen, device)
    step = make_step(task, mesh, abstract).lower(state, batch, frozen).compile(OPTIMISED)
    for _ in range(STEPS):
        state, report = step(state, batch, frozen)
        jax.block_until_ready(report)
    assert int(state["skipped"]) == 0

    embedding = task.clip.embed_images(frozen["clip"], batch)
    sampling = Sampling(sampler="ddim", steps="20")

    @jax.jit
    def sample(params, embedding, keep_text):
        keys = jax.random.split(jax.random.key(1), IMAGES)
        caption = Caption({"text": jnp.asarray(tokens), "text_mask": jnp.asarray(mask)}, keep_text)
        drawn = sample_decoder(keys, recipe.module, params, recipe.process, sampling, embedding, caption)
        return to_uint8(drawn)

    kept = jnp.ones(IMAGES, bool)
    drawn = np.asarray(sample(state["ema"], embedding, kept))
    assert drawn.shape == images.shape and drawn.dtype == np.uint8
    assert psnr(drawn, images) >= 25
    # Each image by itself, and from its embedding alone.
    assert min(psnr(one, other) for one, other in zip(drawn, images, strict=True)) >= 20
    assert psnr(np.asarray(sample(state["ema"], embedding, ~kept)), images) >= 22
    # What is learned hangs on the embedding: another's gives another image.
    assert psnr(np.asarray(sample(state["ema"], jnp.roll(embedding, 1, axis=0), ~kept)), images) < 15
