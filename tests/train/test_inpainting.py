"""Training networks that see what is known: the masks, weights that start at zero, and starting from one without."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import load_params, load_stage, read_record
from dalle2_jax.layers import UNet
from tests import cascade
from train.recipes.masks import random_masks, with_known_channels, without_known
from train.run.init_from import check_start, initial_parameters

COUNT, SIZE = 400, 12


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    found = jax.jit(random_masks, static_argnums=(1, 2))(jax.random.key(0), COUNT, SIZE)
    assert found.shape == (COUNT, SIZE, SIZE, 1) and found.dtype == bool
    return np.asarray(found)[..., 0]


def is_rectangle(mask: np.ndarray) -> bool:
    rows, columns = mask.any(1), mask.any(0)
    runs = [np.flatnonzero(np.diff(np.pad(line.astype(int), 1))) for line in (rows, columns)]
    return all(len(run) == 2 for run in runs) and bool((mask == rows[:, None] & columns[None]).all())


def is_half(mask: np.ndarray) -> bool:
    """Whether a line separates it: in no row or column it changes twice, and always the same way."""
    for lines in (mask, mask.T):
        changes = np.diff(lines.astype(int), axis=1)
        if (np.abs(changes).sum(1) > 1).any() or (changes.max() == 1 and changes.min() == -1):
            return False
    return True


def test_masks_are_holes_windows_and_halves(masks):
    """A quarter has nothing known, and a third of the others is of each kind."""
    empty = ~masks.any((1, 2))
    assert 0.18 < empty.mean() < 0.33
    kinds = np.array([(is_rectangle(~mask), is_rectangle(mask), is_half(mask)) for mask in masks[~empty]])
    assert kinds.any(1).all()
    alone = kinds[kinds.sum(1) == 1]
    assert (alone.mean(0) > 0.2).all()
    assert len(np.unique(masks[~empty], axis=0)) > 200
    # Every place is known as often as not, roughly.
    assert 0.3 < masks.mean(0).min() and masks.mean(0).max() < 0.7


@pytest.mark.parametrize(("full", "known"), [(1.0, 0.0), (0.0, 1.0)])
def test_the_share_with_nothing_known(full, known):
    masks = jax.jit(random_masks, static_argnums=(1, 2))(jax.random.key(1), COUNT, SIZE, full)
    assert np.asarray(masks).any((1, 2, 3)).mean() == pytest.approx(known, abs=0.05)


# more: the small image's channels, behind those of what is known.
@pytest.mark.parametrize(("patch", "more"), [(1, 0), (2, 3)])
def test_weights_of_the_new_channels(patch, more):
    """Zero, in whatever order patches lay them out; the others are the network's without them."""
    fields = {"channels": 8, "channel_multipliers": (1,), "depth": 1, "head_channels": 8, "groups": 4}
    unet = UNet(image_size=8, attention_resolutions=(), middle_attention=False, patch=patch, **fields)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 7 + more))
    seen = jnp.concatenate([x[..., :3], x[..., 7:]], axis=-1)
    t = jnp.zeros(2, jnp.int32)

    def random(inputs):
        shapes = jax.eval_shape(unet.init, jax.random.key(1), inputs, t)["params"]
        return jax.tree.map(lambda leaf: 0.1 * jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), shapes)

    whole, apply = random(x), jax.jit(unet.apply)
    zeroed = without_known({"unet": whole}, unet)["unet"]
    other = x.at[..., 3:7].set(5.0)
    before, after = (apply({"params": zeroed}, inputs, t) for inputs in (x, other))
    np.testing.assert_array_equal(before, after)
    assert np.abs(before - apply({"params": zeroed}, x.at[..., :3].add(1.0), t)).max() > 1e-3
    assert np.abs(before - apply({"params": whole}, x, t)).max() > 1e-3

    small = random(seen)
    kernel = with_known_channels(np.asarray(small["conv_in"]["kernel"]), patch)
    fitted = {**small, "conv_in": {**small["conv_in"], "kernel": kernel}}
    expected = apply({"params": small}, seen, t)
    np.testing.assert_allclose(apply({"params": fitted}, x, t), expected, atol=1e-6 * np.abs(expected).max())


def painting(tiny, name, **changes):
    recipe = tiny.system.stages[name]
    return dataclasses.replace(recipe, module=recipe.module.clone(inpainting=True), **changes)


def network(name, module):
    """The network at random inputs, as a function of its parameters and of what is known, if it sees that."""
    keys, size, t = jax.random.split(jax.random.key(3), 3), module.unet.image_size, jnp.array([3, 700])
    x_t = jax.random.normal(keys[0], (2, size, size, 3))
    inputs = {"low_resolution": jax.random.uniform(keys[1], (2, size // 2, size // 2, 3), minval=-1.0)}
    if name == "decoder":
        embedding = jax.random.normal(keys[1], (2, cascade.EMBEDDING))
        inputs = {"image_embedding": embedding, "text": jax.random.normal(keys[2], (2, 12, 16))}
    return jax.jit(lambda params, known=None: module.apply({"params": params}, x_t, t, **inputs, known=known))


@pytest.mark.parametrize("name", ["decoder", pytest.param("upsampler", marks=pytest.mark.slow)])
def test_a_start_from_a_network_without_gives_what_that_one_gives(tiny, name):
    recipe = painting(tiny, name, init_from=str(tiny.run_dir / name))
    clip, other = load_stage(tiny.run_dir / "clip"), load_stage(tiny.run_dir / name)
    task = recipe.build({"clip": clip})
    params = initial_parameters(name, task, None if name == "upsampler" else clip_tokenizer(tiny), lambda line: None)
    fresh = jax.jit(task.init)(jax.random.key(0))
    chex.assert_trees_all_equal_shapes(params, fresh)
    assert not np.asarray(fresh["unet"]["conv_in"]["kernel"])[:, :, 3:7].any()
    assert np.asarray(fresh["unet"]["conv_in"]["kernel"])[:, :, :3].any()
    size = recipe.module.unet.image_size
    values = [jnp.zeros((2, size, size, 4)), jax.random.normal(jax.random.key(9), (2, size, size, 4))]
    expected = network(name, other.module)(other.params)
    assert np.abs(expected).max() > 1e-3
    apply = network(name, task.module)
    found = [np.asarray(apply(params, known)) for known in values]
    np.testing.assert_array_equal(found[0], found[1])
    # Sums over more channels may run in another order: the last bit.
    np.testing.assert_allclose(found[0], expected, atol=2e-7 * max(1.0, np.abs(expected).max()))


def clip_tokenizer(tiny):
    from dalle2_jax.tokenizer import Tokenizer

    return Tokenizer.from_json(read_record(tiny.run_dir / "clip").tokenizer)


@pytest.mark.slow
def test_training_one_and_not_back(tiny, tmp_path):
    """It learns to look at what is known; and a network that does not look cannot start from it."""
    recipe = painting(tiny, "upsampler", init_from=str(tiny.run_dir / "upsampler"), mask_full=0.5)
    for name in ("clip", "prior", "decoder"):
        shutil.copytree(tiny.run_dir / name, tmp_path / "run" / name)
    result, _ = cascade.train(tiny.system.with_stage("upsampler", recipe), tmp_path / "run", ["upsampler"])
    assert result.finished
    folder = tmp_path / "run" / "upsampler"
    record = read_record(folder)
    assert record.training["mask_full"] == 0.5 and record.rebuilt("module").inpainting
    kernel = np.asarray(load_params(folder)["unet"]["conv_in"]["kernel"])
    assert np.abs(kernel[:, :, 3:7]).max() > 1e-4
    back = dataclasses.replace(tiny.system.stages["upsampler"], init_from=str(folder))
    with pytest.raises(ValueError, match="sees what is known of an image and this one would not; set") as error:
        check_start("upsampler", back)
    assert "set upsampler.module.inpainting=true" in str(error.value) and "\n" not in str(error.value)
    again = dataclasses.replace(recipe, init_from=str(folder))
    assert check_start("upsampler", again).step == cascade.STEPS


def test_the_decoder_learns_from_what_is_known(tiny):
    """The loss has a gradient in the weights of its channels."""
    clip, size = load_stage(tiny.run_dir / "clip"), cascade.CLIP_SIZE
    image = np.random.default_rng(0).integers(0, 255, (4, size, size, 3), np.uint8)
    batch = {"image": image, "tokens": np.ones((4, 12), np.int32), "mask": np.ones((4, 12), bool)}
    params = load_stage(tiny.run_dir / "decoder").params
    task = painting(tiny, "decoder", mask_full=0.0).build({"clip": clip})

    def with_kernel(kernel):
        conv = {**params["unet"]["conv_in"], "kernel": kernel}
        return {**params, "unet": {**params["unet"], "conv_in": conv}}

    def loss(kernel):
        return task.loss(with_kernel(kernel), batch, jax.random.key(0), task.frozen, None)[0]

    kernel = with_known_channels(np.asarray(params["unet"]["conv_in"]["kernel"]), 1)
    value, gradient = jax.jit(jax.value_and_grad(loss))(kernel)
    assert np.isfinite(value) and np.abs(gradient[:, :, :3]).max() > 0 and np.abs(gradient[:, :, 3:7]).max() > 1e-6
    params = with_kernel(kernel)
    preview = jax.eval_shape(task.preview, params, batch, jax.random.key(0), task.frozen)
    assert preview.shape == (4, cascade.DECODER_SIZE, cascade.DECODER_SIZE, 3) and preview.dtype == np.uint8


@pytest.mark.parametrize("name", ["decoder", "upsampler"])
def test_a_share_lies_within_0_and_1(tiny, name):
    with pytest.raises(ValueError, match=f"{name}.mask_full is 1.5; it must lie in 0 to 1"):
        painting(tiny, name, mask_full=1.5)


def test_other_differences_are_named_as_before(tiny):
    recipe = painting(tiny, "decoder", init_from=str(tiny.run_dir / "decoder"))
    wider = recipe.module.clone(unet=recipe.module.unet.clone(channels=16))
    with pytest.raises(ValueError, match="module.unet.channels is 8 there and 16 here"):
        check_start("decoder", dataclasses.replace(recipe, module=wider))
