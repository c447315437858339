"""Initial parameters leaf by leaf: those of one program, bit for bit, in fewer programs than leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.layers.fields import without_remat
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.layers.unet import UNet
from dalle2_jax.sharding import make_mesh, partition
from tests.train.toy import toy_task
from train.machine.compiler import initial_options
from train.step import initial
from train.step.initial import by_leaf
from train.step.state import abstract_state, create_state, init_state, shardings_of

KEY = jax.random.key(3)
# Those of the tests round otherwise.
OPTIONS = initial_options("cpu")
UNET = UNet(
    image_size=8, channels=8, channel_multipliers=(1, 1), depth=2, attention_resolutions=(), head_channels=8, groups=4
)


class Constants(nn.Module):
    """Parameters that depend on no key, on a number, and on an array."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", lambda key: jnp.asarray(np.arange(4.0, dtype=np.float32)))
        number = self.param("number", nn.initializers.constant(2.5), ())
        both = self.param("both", lambda key: jax.random.normal(key, (2, 4)) * np.arange(4.0, dtype=np.float32)[None])
        return x * number + table[None] + both


def transformer(scan_layers: bool) -> Transformer:
    return Transformer(width=8, depth=3, heads=2, scan_layers=scan_layers, last_only=True)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (transformer(True), [np.zeros((1, 4, 8), np.float32)]),
        (transformer(False), [np.zeros((1, 4, 8), np.float32)]),
        (UNET, [np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)]),
        (Constants(), [np.zeros((2, 4), np.float32)]),
    ],
)
def test_the_parameters_are_those_of_one_program(module, inputs, monkeypatch):
    def init(key):
        return module.init(key, *inputs)["params"]

    mesh = make_mesh(fsdp=8)
    shardings = partition(jax.eval_shape(init, KEY), mesh, smallest=8)
    expected = jax.jit(init, out_shardings=shardings, compiler_options=OPTIONS)(KEY)
    compiled, compile_part = [], initial._compiled
    monkeypatch.setattr(initial, "_compiled", lambda *call: compiled.append(call) or compile_part(*call))
    found = by_leaf(init, KEY, shardings)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, whole)
        assert ours.sharding == whole.sharding and ours.dtype == whole.dtype
    if module is UNET:
        assert len(compiled) < len(jax.tree.leaves(found)) / 4


def test_remat_changes_no_initial_parameter():
    inputs = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)
    module = UNET.clone(remat=True, channel_multipliers=(1,), depth=1)
    expected = jax.jit(lambda: module.init(KEY, *inputs))()
    found = jax.jit(lambda: without_remat(module).init(KEY, *inputs))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_state_is_that_of_one_program():
    task = toy_task(seed=5)
    abstract = abstract_state(task, make_mesh())
    expected = jax.jit(
        lambda key: init_state(task, key), out_shardings=shardings_of(abstract), compiler_options=OPTIONS
    )(jax.random.key(5))
    found = create_state(task, abstract)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert bool((ours == whole).all()) and ours.sharding == whole.sharding
