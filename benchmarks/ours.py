"""One case of ours, measured in its own process: `python -m benchmarks.ours --case prior-2`.

The networks, losses, timesteps, dropped captions and the sharding over devices are training's own recipes; only the
frozen CLIP is left out, whose embeddings stand in the batch. `train_step` is loss, gradients and AdamW, which is what
the peers are asked for; `full_step` is the loop's own step, with clipping, the moving average and the check for
numbers that are not finite. Weights are drawn on the host: a program that draws all of a large network's takes minutes
to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.worker import Report, ordered_case, peak_memory, start
from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage, StageRecord
from dalle2_jax.clip import CLIP, TextTransformer, VisionTransformer
from dalle2_jax.decoder import Decoder, Upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.layers.kernels.layout import row_major
from dalle2_jax.layers.pixels import to_uint8
from dalle2_jax.layers.precision import with_dtype
from dalle2_jax.layers.unet import UNet
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.sharding import batch_parts, batch_sharding, make_mesh, replicate
from dalle2_jax.unclip.sample import decode, sample_image_embeddings, upsample
from train.config.optimizer import decay_mask
from train.config.recipe import Task
from train.machine.backend import setup
from train.machine.compiler import compiler_options
from train.recipes.clip import ClipRecipe
from train.recipes.decoder import DecoderRecipe, DecoderTask
from train.recipes.embeddings import FrozenClip
from train.recipes.prior import PriorRecipe, PriorTask
from train.recipes.upsampler import UpsamplerRecipe
from train.step.state import abstract_state, create_state
from train.step.step import make_step

Case = dict[str, Any]
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2


class EmbeddingsInBatch(FrozenClip):
    """CLIP's embeddings stand in the batch; nobody reads the tokens."""

    def embed_images(self, params, batch):
        return batch["image_embedding"]

    def encode_captions(self, params, batch):
        return EncodedCaptions(batch["mask"], batch["mask"], batch["text_embedding"], batch["states"])


def clip_sizes(case: Case) -> CLIP:
    """A CLIP of the embeddings' sizes, which is never run: recipes read the sizes off it."""
    size, length = case["embedding"], case["text_length"]
    text = TextTransformer(vocabulary_size=1, context_length=length, width=size, depth=1, heads=1)
    return CLIP(VisionTransformer(image_size=1, patch_size=1, width=1, depth=1, heads=1), text, embedding_size=size)


def clip_module(case: Case, dtype: str) -> CLIP:
    common = {"activation": case["activation"], "scan_layers": case["scan_layers"], "dtype": dtype}
    vision = VisionTransformer(
        image_size=case["size"],
        patch_size=case["patch"],
        width=case["width"],
        depth=case["depth"],
        heads=case["heads"],
        **common,
    )
    text = TextTransformer(
        vocabulary_size=case["vocabulary"],
        context_length=case["text_length"],
        width=case["text_width"],
        depth=case["text_depth"],
        heads=case["text_heads"],
        **common,
    )
    return CLIP(vision, text, embedding_size=case["embedding"], dtype=dtype)


def prior_module(case: Case, dtype: str) -> DiffusionPrior:
    return DiffusionPrior(
        embedding_size=case["embedding"],
        width=case["width"],
        depth=case["depth"],
        heads=case["heads"],
        context_length=case["text_length"],
        scan_layers=case["scan_layers"],
        dtype=dtype,
    )


def unet(case: Case, dtype: str, **fields: Any) -> UNet:
    return UNet(
        image_size=case["size"],
        channels=case["channels"],
        channel_multipliers=case["multipliers"],
        depth=case["depth"],
        dtype=dtype,
        **fields,
    )


def decoder_module(case: Case, dtype: str) -> Decoder:
    network = unet(
        case, dtype, out_channels=6, attention_resolutions=case["attends"], head_channels=case["head_channels"]
    )
    return Decoder(network, text_width=case["text_width"], pools_embedding=True, dtype=dtype)


def upsampler_module(case: Case, dtype: str) -> Upsampler:
    plain = {"out_channels": 3, "attention_resolutions": (), "middle_attention": False, "scale_shift": False}
    return Upsampler(unet(case, dtype, **plain))


def make_task(case: Case, dtype: str) -> Task:
    """The task of a case, as training would build it."""
    common = {"steps": 1000, "batch_size": case["batch"]}
    if case["kind"] == "clip":
        return ClipRecipe(module=clip_module(case, dtype), **common).build({})
    if case["kind"] == "upsampler":
        # The peers see whole images, so ours does too; the paper trains on crops.
        sizes = {"low_size": case["low_size"], "crop_fraction": 1.0}
        return UpsamplerRecipe(module=upsampler_module(case, dtype), **sizes, **common).build({})
    embedded = {"clip": EmbeddingsInBatch(clip_sizes(case)), "frozen": {"clip": {}}}
    if case["kind"] == "prior":
        return PriorTask(recipe=PriorRecipe(module=prior_module(case, dtype), **common), **embedded)
    return DecoderTask(recipe=DecoderRecipe(module=decoder_module(case, dtype), **common), **embedded)


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """A batch of noise, as the data would give it."""
    rng, count = np.random.default_rng(0), case["batch"]
    batch = {}
    if "size" in case:
        batch["image"] = rng.integers(0, 256, (count, case["size"], case["size"], 3), dtype=np.uint8)
    if case["kind"] == "clip":
        batch["tokens"] = rng.integers(0, case["vocabulary"], (count, case["text_length"]), dtype=np.int32)
        batch["mask"] = np.ones((count, case["text_length"]), bool)
    elif "text_length" in case:
        length = case["text_length"]
        shapes = {"image_embedding": (), "text_embedding": (), "states": (length,)}
        for name, shape in shapes.items():
            batch[name] = rng.standard_normal((count, *shape, case["embedding"]), dtype=np.float32)
        batch |= {"mask": np.ones((count, length), bool), "tokens": np.zeros((count, length), np.int32)}
    return batch


def make_inputs(case: Case, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arguments of one evaluation of the network, all arrays, so that nothing is computed while compiling."""
    rng, count = np.random.default_rng(1), case["batch"]

    def images(size: int) -> np.ndarray:
        return rng.standard_normal((count, size, size, 3), dtype=np.float32)

    if case["kind"] == "clip":
        return {"images": images(case["size"]), "tokens": batch["tokens"], "mask": batch["mask"]}
    timesteps = np.full(count, 500, np.int32)
    conditioning = {name: batch[name] for name in ("text_embedding",) if name in batch}
    if case["kind"] != "upsampler":
        conditioning |= {"text": batch["states"], "text_mask": batch["mask"]}
    if case["kind"] == "prior":
        return {"noised_image_embedding": batch["image_embedding"], "timesteps": timesteps, **conditioning}
    if case["kind"] == "upsampler":
        conditioning["low_resolution"] = images(case["low_size"])
    else:
        conditioning["image_embedding"] = batch["image_embedding"]
    return {"x_t": images(case["size"]), "timesteps": timesteps, **conditioning}


def plain_step(task: Task, mesh: jax.sharding.Mesh) -> tuple[Callable, Callable]:
    """(init, step): AdamW on the task's loss and nothing else; `step(state, batch)` gives the state and the loss."""
    adam = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decay_mask)

    def init(params: Any) -> dict[str, Any]:
        return {"params": params, "optimizer": adam.init(params), "step": jnp.zeros((), jnp.int32)}

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], jax.Array]:
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        key = jax.random.fold_in(jax.random.key(1), state["step"])

        def loss(params: Any) -> jax.Array:
            return task.loss(params, batch, key, task.frozen, None)[0]

        value, gradient = jax.value_and_grad(loss)(state["params"])
        gradient = jax.tree.map(lambda g: row_major(g) if g.ndim == 4 else g, gradient)
        changes, optimizer = adam.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], changes)
        return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, value

    options = compiler_options(task.module, mesh.devices.flat[0].platform)
    return init, jax.jit(step, donate_argnums=0, out_shardings=replicate(mesh), compiler_options=options)


class Stepper:
    """Calls a step on its own state, again and again, and waits for it."""

    def __init__(self, step: Callable, state: Any, *arguments: Any) -> None:
        self.step, self.state, self.arguments = step, state, arguments

    def __call__(self) -> None:
        self.state, found = self.step(self.state, *self.arguments)
        jax.block_until_ready((self.state, found))


def device_memory() -> int | None:
    """The most bytes held on the accelerator; None on a CPU, where the host's memory counts."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def draw(shapes: Any, put: Callable[[np.ndarray], Any] = jax.device_put, dtype: str | None = None) -> Any:
    """Random parameters of these shapes, from the host; those too that a training starts at zero.

    put: what is done with each array. dtype: in place of the shapes' own.
    """
    leaves, tree = jax.tree.flatten(shapes)

    def one(number: int) -> Any:
        leaf = leaves[number]
        values = np.random.default_rng((0, number)).standard_normal(leaf.shape, dtype=np.float32)
        values *= np.float32(0.02)
        return put(values.astype(jnp.dtype(dtype or leaf.dtype), copy=False))

    with ThreadPoolExecutor() as threads:  # numpy and jax let go of Python's lock
        return jax.tree.unflatten(tree, threads.map(one, range(len(leaves))))


def measure_training(case: Case, report: Report) -> None:
    """forward, train_step and full_step of one network, in this order, so that each one's peak of memory is its own."""
    orders = report.orders
    task = make_task(case, orders.dtype)
    mesh = make_mesh()
    if case["batch"] % batch_parts(mesh):
        mesh = make_mesh(devices=jax.devices()[:1])
    batch = make_batch(case)
    batch, inputs = jax.device_put((batch, make_inputs(case, batch)), batch_sharding(mesh))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = draw(shapes, functools.partial(jax.device_put, device=replicate(mesh)))
    jax.block_until_ready((params, batch))
    report.add(parameters=count_parameters(params), devices=mesh.devices.size)
    if "forward" in orders.measure:
        call = jax.jit(lambda params, inputs: task.module.apply({"params": params}, **inputs))
        report.measure("forward", lambda: jax.block_until_ready(call(params, inputs)))
        report.add("forward", flops=count_flops(call.trace(params, inputs).jaxpr))
    if "train_step" in orders.measure:
        init, step = plain_step(task, mesh)
        state = jax.jit(init, donate_argnums=0, out_shardings=replicate(mesh))(params)
        abstract = jax.eval_shape(lambda state: state, state)
        stepper = Stepper(step, state, batch)
        del state, params
        report.measure("train_step", stepper)
        del stepper
        report.add("train_step", flops=count_flops(step.trace(abstract, batch).jaxpr))
    if "full_step" in orders.measure:
        abstract = abstract_state(task, mesh)
        state = create_state(task, abstract, initial=draw(shapes, np.asarray))
        stepper = Stepper(make_step(task, mesh, abstract), state, batch, task.frozen)
        del state
        report.measure("full_step", stepper)


def measure_generate(case: Case, report: Report) -> None:
    """The caption's states to an image, as `DALLE2.generate` does it, each stage compiled once.

    Parameters are in the dtype of the computation, as in a run that is loaded with one.
    """
    orders = report.orders
    count, embedding = case["batch"], case["prior"]["embedding"]
    modules = {
        "prior": prior_module(case["prior"], orders.dtype),
        "decoder": decoder_module(case["decoder"], orders.dtype),
        "upsampler": upsampler_module(case["upsampler"], orders.dtype),
    }
    if case["upsampler"]["size"] >= 256:  # Karlo's last step has a network of its own
        modules["upsampler"] = modules["upsampler"].clone(last=modules["upsampler"].unet.clone())
    modules = {name: with_dtype(module, orders.dtype) for name, module in modules.items()}
    params = {name: _random(module, case[name], orders.dtype) for name, module in modules.items()}
    prior = Process(schedule="cosine", prediction="x0", variance="fixed_small", clip=None)
    decoder = Process(schedule="cosine", prediction="epsilon", variance="learned_range", clip=1.0)
    upsampler = Process(schedule="cosine", prediction="epsilon", variance="fixed_small", clip=1.0)
    samplings = [
        Sampling(sampler="ddpm", steps=str(steps), guidance_scale=scale)
        for steps, scale in zip(case["steps"], (*case["guidance"], 1.0), strict=True)
    ]
    length = case["prior"]["text_length"]
    rng = np.random.default_rng(0)
    text_embedding = jnp.asarray(rng.standard_normal((count, embedding), dtype=np.float32))
    states = jnp.asarray(rng.standard_normal((count, length, embedding), dtype=np.float32))
    mask, keys = jnp.ones((count, length), bool), jax.random.split(jax.random.key(1), count)
    captions = EncodedCaptions(mask, mask, text_embedding, states)
    processes = {"prior": prior, "decoder": decoder, "upsampler": upsampler}
    size = case["upsampler"]["size"]
    loaded = {}
    for (name, module), sampling in zip(modules.items(), samplings, strict=True):
        settings = {"process": processes[name], "sampling": sampling, "image_size": size}
        record = StageRecord(stage=name, kind=name, module=module, **settings)
        loaded[name] = LoadedStage(module, params[name], record)

    def generate() -> None:
        image_embedding = sample_image_embeddings(loaded["prior"], captions, keys)()
        images = decode(loaded["decoder"], captions, keys, image_embedding)()
        images = upsample(loaded["upsampler"], keys, images)()
        np.asarray(to_uint8(images))

    report.add(parameters=count_parameters(params), devices=1)
    report.measure("generate", generate)


def _random(module: Any, case: Case, dtype: str) -> Any:
    """Random parameters of a stage, in `dtype`; the last layers too, which start at zero."""
    task = make_task({**case, "batch": 1}, "float32").with_module(module)
    return draw(jax.eval_shape(task.init, jax.random.key(0)), dtype=dtype)


class CacheHits:
    """Counts the compiled programs that jax found in its cache on the disk, from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


def main() -> None:
    """Measures what the orders say and prints it."""
    orders = start()
    if orders.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if orders.one_device:
        jax.config.update("jax_num_cpu_devices", 1)
    setup()
    case = ordered_case(orders)
    hits = CacheHits()
    known = {
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
        "device_kind": jax.devices()[0].device_kind,
    }
    report = Report("ours", orders, lambda: device_memory() or peak_memory(), lambda: hits.count, **known)
    (measure_generate if case["kind"] == "generate" else measure_training)(case, report)
    report.print()


if __name__ == "__main__":
    main()
