"""Modules in other people's code: exported with a symbolic batch, on their meshes, under shard_map, type-checked."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from dalle2_jax.clip import TextTransformer, VisionTransformer, contrastive_loss
from dalle2_jax.layers import Transformer, UNet
from dalle2_jax.prior import DiffusionPrior

ROOT = Path(__file__).resolve().parents[1]
UNET = UNet(
    image_size=4, channels=8, channel_multipliers=(1, 2), depth=1, attention_resolutions=(2,), head_channels=8, groups=4
)
PRIOR = DiffusionPrior(embedding_size=8, width=16, depth=1, heads=2, context_length=4, vocabulary_size=10)
SMALL = {"width": 16, "depth": 1, "heads": 2}
TOKENS, MASK = jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4), bool)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_a_unet_is_exported_with_a_symbolic_batch():
    x, t = jax.random.normal(jax.random.key(1), (3, 4, 4, 3)), jnp.array([1, 5, 900])
    params = jax.jit(UNET.init)(jax.random.key(0), x, t)["params"]
    params["conv_out"]["kernel"] = jax.random.normal(jax.random.key(2), params["conv_out"]["kernel"].shape)

    @jax.jit
    def apply(params, x, t):
        return UNET.apply({"params": params}, x, t)

    (batch,) = export.symbolic_shape("batch")
    inputs = jax.ShapeDtypeStruct((batch, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = export.export(apply)(shapes_of(params), *inputs)
    for count in (1, 3):
        expected = apply(params, x[:count], t[:count])
        np.testing.assert_allclose(exported.call(params, x[:count], t[:count]), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (UNET, (jnp.zeros((8, 4, 4, 3)), jnp.zeros(8, jnp.int32))),
        (PRIOR, (jnp.zeros((8, 8)), jnp.zeros(8, jnp.int32), jnp.zeros((8, 8)), TOKENS, MASK)),
        (VisionTransformer(image_size=8, patch_size=4, **SMALL), (jnp.zeros((8, 8, 8, 3)),)),
        (TextTransformer(vocabulary_size=10, context_length=4, **SMALL), (TOKENS, MASK)),
        (Transformer(**SMALL), (jnp.zeros((8, 4, 16)),)),
    ],
    ids=["unet", "prior", "vision", "text", "transformer"],
)
def test_explicit_mesh_axes_are_refused_in_one_sentence(module, inputs):
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        explicit = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in inputs]
        with pytest.raises(ValueError, match="make the mesh with dalle2_jax.sharding.make_mesh, or with axis_types"):
            jax.jit(module.apply).trace(variables, *explicit)
    # The same mesh with Auto axes is what they are made for.
    auto = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(auto):
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(auto, split.spec)) for x in inputs]
        jax.jit(module.apply).trace(variables, *placed)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_contrastive_loss_under_shard_map(chunk):
    """Rows on eight devices, gathered by the loss: values and gradients of the whole batch."""
    random = np.random.default_rng(3)
    image, text = (random.normal(size=(16, 6)).astype(np.float32) for _ in range(2))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    scale = jnp.float32(7.0)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = PartitionSpec(("data", "fsdp"))

    def mapped(image, text, scale):
        def part(image, text, scale):
            return contrastive_loss(image, text, scale, chunk, axis_name=("data", "fsdp"))

        specs = {"in_specs": (rows, rows, PartitionSpec()), "out_specs": PartitionSpec()}
        return jax.shard_map(part, mesh=mesh, **specs)(image, text, scale)

    def both(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))(image, text, scale)

    found, expected = both(mapped), both(contrastive_loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_type_checkers_see_the_class():
    """What is imported lazily is imported for them, and `generate` has an overload for each thing it returns."""
    tree = ast.parse((ROOT / "dalle2_jax" / "__init__.py").read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    assert "from dalle2_jax.unclip import DALLE2" in ast.unparse(checked[0])
    system = ast.parse((ROOT / "dalle2_jax" / "unclip" / "system.py").read_text())
    overloads = [
        ast.unparse(node.returns)
        for node in ast.walk(system)
        if isinstance(node, ast.FunctionDef) and node.name == "generate" and node.decorator_list
    ]
    assert overloads == ["np.ndarray", "Generated"]
