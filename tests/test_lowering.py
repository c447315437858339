"""Every config's training steps and samplers as a GPU's and a TPU's compiler gets them, without either.

The lowered program says which attention is asked for, which products are in float32, and whether an array of all
queries by all keys is left.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.layers import attention
from dalle2_jax.unclip.memory import call_for_one_image, caption_shapes
from tests.lowering import DEVICES, Program, analyse, pretended, traced_for
from tests.test_configs import system
from train.run.plan import Planned, plan
from train.run.record import stage_record
from train.step.lower import trace_step
from train.step.state import abstract_state

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"

# cuDNN's attention in a training step, forward and backward; a scanned stack counts as one layer. Prior and decoder
# also run CLIP's two halves forward. The prior's last layer has one query and needs none. A U-Net attends after each
# residual block, of which there are `depth` a level down and one more up, and once in the middle. Under `remat`, as in
# the paper's config, the backward pass runs the forward one again.
TRAINING = {
    ("shapes_large", "clip"): (6 + 4, 6 + 4),
    ("shapes_large", "prior"): (6 + 4 + 5, 5),
    ("shapes_large", "decoder"): (6 + 4 + 2 * 5 + 1, 2 * 5 + 1),
    ("shapes_large", "upsampler"): (0, 0),
    ("emoji_large", "clip"): (8 + 4, 8 + 4),
    ("emoji_large", "prior"): (8 + 4 + 7, 7),
    ("emoji_large", "decoder"): (8 + 4 + 2 * 5 + 1, 2 * 5 + 1),
    ("emoji_large", "upsampler"): (0, 0),
    ("paper", "clip"): (2 * 2, 2),
    ("paper", "prior"): (2 + 2 * 1, 1),
    ("paper", "decoder"): (1 + 2 * (3 * 7 + 1 + 1), 3 * 7 + 1 + 1),  # CLIP's image half, and the caption encoder
    ("paper", "upsampler"): (0, 0),
    ("paper", "upsampler_1024"): (0, 0),
    ("paper", "autoregressive_prior"): (2 + 2 * 2, 2),  # CLIP's halves, the caption encoder and the codes' transformer
}
# In the program that samples: a guided network sees both captions in one batch.
SAMPLING = {
    ("shapes_large", "clip"): 4,
    ("shapes_large", "prior"): 5,
    ("shapes_large", "decoder"): 2 * 5 + 1,
    ("shapes_large", "upsampler"): 0,
    ("emoji_large", "clip"): 4,
    ("emoji_large", "prior"): 7,
    ("emoji_large", "decoder"): 2 * 5 + 1,
    ("emoji_large", "upsampler"): 0,
    ("paper", "clip"): 1,
    ("paper", "prior"): 1,
    ("paper", "decoder"): 3 * 7 + 1 + 1,
    ("paper", "upsampler"): 0,
    ("paper", "upsampler_1024"): 0,
    ("paper", "autoregressive_prior"): 1,  # the caption encoder: from a cache there is a query at a time
}
# Products of two float32 arrays that are meant to be: small ones, or bound by their weights, where digits count.
FLOAT32 = "|".join(
    (
        r"time(_\d)?/dot_general",  # the time embedding and what conditions are added to it
        r"conv_out/",  # a U-Net's last layer, of few channels
        r"(Diffusion|Autoregressive)Prior[^/]*\)*/out/",  # the prior's answer
        r"AutoregressivePrior\.(encode|decode)",  # embeddings to codes and back
        r"(image|text)_projection/dot_general",  # into CLIP's space
        # the similarities of CLIP's loss, whole and in chunks
        r"jvp\(\)\)?/dot_general|^checkpoint/(rematted_computation/)?dot_general",
        r"bmz,bz->bm",  # how near the prior's candidates are to the caption
        r"^dot_general$|resize",  # images to another size, in which the program's own interpolation weights are
    )
)
# The paper's, since they are the largest (its upsamplers are U-Nets as its decoder); shapes' for lengths that are odd.
QUICK = [
    ("shapes_large", "clip"),
    *(("paper", stage) for stage in ("clip", "prior", "decoder", "autoregressive_prior")),
]


def cases(quick: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in TRAINING]


@cache
def planned(name: str) -> dict[str, Planned]:
    return {planned.name: planned for planned in plan(system(name))}


def training(name: str, stage: str, platform: str) -> Program:
    task = planned(name)[stage].task
    with pretended(DEVICES[platform]) as mesh:  # trace_step itself traces for the mesh
        abstract = abstract_state(task, mesh)
        lowered = trace_step(system(name), task, abstract, mesh).lower(lowering_platforms=(platform,))
        check_step(lowered, task.recipe, abstract)
        return analyse(lowered)


def check_step(lowered: jax.stages.Lowered, recipe: Any, abstract: Any) -> None:
    """A step takes a whole batch and float32 parameters, and gives these and a float32 loss."""
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract["params"])} == {"float32"}
    state, batch, _ = lowered.args_info[0]
    assert batch["image"].shape[0] == recipe.batch_size
    _, metrics = lowered.out_info
    assert metrics["loss"].shape == () and str(metrics["loss"].dtype) == "float32"
    assert jax.tree.structure(state["params"]) == jax.tree.structure(abstract["params"])


def sampling(name: str, stage: str, platform: str) -> Program:
    def loaded(stage: str) -> LoadedStage:
        recipe, params = planned(name)[stage].task.recipe, planned(name)[stage].params
        record = stage_record(recipe, stage)
        if stage == "prior":  # what the paper's sampler wants to be measured
            record = dataclasses.replace(record, measured={"x0_error": [0.1] * recipe.process.timesteps})
        return LoadedStage(recipe.module, params, record)

    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    with traced_for(DEVICES[platform]):
        captions = caption_shapes(loaded("clip"), system(name).context_length)
        call = call_for_one_image(loaded(stage), key, captions)
        return analyse(call.trace().lower(lowering_platforms=(platform,)))


# Logits that are written when sampling: the prior's prefix over all places of its cache, once an embedding.
LOGITS = {("paper", "autoregressive_prior"): {(1, 1, 26, 258, 576)}}


def check(program: Program, logits: set[tuple[int, ...]] = frozenset()) -> None:
    """No logits of full size but those, and no float32 where it is not meant."""
    assert program.softmax == logits
    assert program.float32_products(FLOAT32) == []


@pytest.mark.parametrize(("name", "stage"), cases(QUICK))
def test_a_training_step_for_a_gpu(name, stage):
    program = training(name, stage, "cuda")
    assert (program.kernels[FORWARD], program.kernels[BACKWARD]) == TRAINING[name, stage]
    assert set(program.kernels) <= {FORWARD, BACKWARD}, "a mask was given to cuDNN as a bias"
    check(program)


@pytest.mark.parametrize(("name", "stage"), cases([("shapes_large", "decoder")]))
def test_sampling_for_a_gpu(name, stage):
    program = sampling(name, stage, "cuda")
    assert dict(program.kernels) == ({FORWARD: SAMPLING[name, stage]} if SAMPLING[name, stage] else {})
    check(program, LOGITS.get((name, stage), set()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), TRAINING)
@pytest.mark.parametrize("lower", [training, sampling])
def test_for_a_tpu(name, stage, lower):
    """The plain forms: TPUs have no cuDNN, and nobody has measured the others there."""
    program = lower(name, stage, "tpu")
    assert not program.kernels
    assert program.float32_products(FLOAT32) == []


def test_what_the_checks_find():
    """A network in float32, and attention that leaves its logits, are both noticed."""
    x = jax.ShapeDtypeStruct((2, 48, 4, 16), jnp.bfloat16)

    def plain(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x) + attention.dot_product_attention(x, x, x)

    with traced_for(DEVICES["cuda"]):
        program = analyse(jax.jit(plain).trace(x).lower(lowering_platforms=("cuda",)))
    assert {shape[-2:] for shape in program.softmax} == {(48, 48)} and program.kernels == {FORWARD: 1}
    wide = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    program = analyse(jax.jit(lambda x: x @ x.T).trace(wide).lower(lowering_platforms=("cuda",)))
    assert program.float32_products("time") == ["jit(<lambda>)/dot_general"]
