"""Partition rules on 8 simulated devices, checked against shapes worked out by hand."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dalle2_jax.layers.stacking import unstack_layers
from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.prior import DiffusionPrior
from dalle2_jax.sharding import (
    batch_parts,
    batch_sharding,
    check_batch,
    cpu_devices,
    keep_batch_split,
    make_mesh,
    mesh_sizes,
    partition,
    replicate,
)

TREE = {
    "dense": {"kernel": jax.ShapeDtypeStruct((48, 64), jnp.float32), "bias": jax.ShapeDtypeStruct((64,), jnp.float32)},
    "odd": jax.ShapeDtypeStruct((3, 5), jnp.float32),
    "blocks": {"kernel": jax.ShapeDtypeStruct((3, 128, 16), jnp.float32)},
    "step": jax.ShapeDtypeStruct((), jnp.int32),
}


def test_mesh_takes_all_devices_as_auto_axes():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 4}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"tensor": 16}])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(**sizes)


def test_fsdp_splits_the_largest_axis_that_divides():
    found = partition(TREE, make_mesh(data=2, fsdp=4), smallest=1)
    specs = jax.tree.map(lambda s: s.spec, found)
    assert specs["dense"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["dense"]["bias"] == PartitionSpec("fsdp")
    assert specs["blocks"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["odd"] == PartitionSpec() and specs["step"] == PartitionSpec()


def test_small_parameters_and_meshes_without_fsdp_are_replicated():
    assert partition(TREE, make_mesh(fsdp=4), smallest=64 * 48)["dense"]["bias"].spec == PartitionSpec()
    assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(partition(TREE, make_mesh(), smallest=1)))


def test_the_first_rule_that_matches_wins():
    mesh = make_mesh(fsdp=2, tensor=2)
    rules = (("dense/kernel$", PartitionSpec(None, "tensor")), ("blocks", "replicated"), ("kernel|bias", "fsdp"))
    specs = jax.tree.map(lambda s: s.spec, partition(TREE, mesh, rules, smallest=1))
    assert specs["dense"] == {"kernel": PartitionSpec(None, "tensor"), "bias": PartitionSpec("fsdp")}
    assert specs["blocks"]["kernel"] == PartitionSpec() and specs["odd"] == PartitionSpec()


def test_a_transformer_is_split_by_heads_and_hidden_units():
    module = Transformer(width=64, depth=3, heads=4)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 2, 64))))["params"]
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = partition(tree, mesh, smallest=64)
    parts = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), tree, placed)["blocks"]
    assert parts["attention"]["qkv"]["kernel"] == (3, 32, 2, 3, 16) and parts["attention"]["qkv"]["bias"][1] == 2
    assert parts["attention"]["out"]["kernel"] == (3, 32, 32) and parts["attention"]["out"]["bias"] == (3, 32)
    assert parts["mlp_in"]["kernel"] == (3, 32, 128) and parts["mlp_in"]["bias"] == (3, 128)
    assert parts["mlp_out"]["kernel"] == (3, 128, 32)
    # Layers that lie by themselves are split in the same way.
    apart = jax.eval_shape(unstack_layers, tree)
    of_layer = jax.tree.map(
        lambda leaf, sharding: sharding.shard_shape(leaf.shape), apart, partition(apart, mesh, smallest=64)
    )
    assert sorted(of_layer) == ["block_0", "block_1", "block_2"]
    for layer in of_layer.values():
        assert layer == jax.tree.map(lambda shape: shape[1:], parts, is_leaf=lambda shape: isinstance(shape, tuple))
    # Without a tensor axis these rules are those of any other parameter.
    alone = make_mesh(data=4, fsdp=2)
    assert partition(tree, alone) == partition(tree, alone, ((".*", "fsdp"),))


def test_heads_that_do_not_divide_over_tensor():
    tree = {"blocks": {"attention": {"qkv": {"kernel": jax.ShapeDtypeStruct((2, 12, 3, 3, 4), jnp.float32)}}}}
    with pytest.raises(ValueError, match=r"blocks/attention/qkv/kernel .*an axis of 3.*tensor=2"):
        partition(tree, make_mesh(tensor=2))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("fsdp=8", {"fsdp": 8}), ("data=2, fsdp=2,tensor=2", {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_a_mesh_in_words(text, sizes):
    assert mesh_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "8", "fsdp", "fsdp=0", "fsdp=-1", "model=2", "fsdp=2,fsdp=4", "fsdp=2x4"])
def test_a_wrong_mesh_in_words(text):
    with pytest.raises(ValueError, match="is not a list of sizes: write it as data=2,fsdp=4"):
        mesh_sizes(text)


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (PartitionSpec("model"), "model"),
        (PartitionSpec(None, None, None, "fsdp"), "more axes"),
        (PartitionSpec("fsdp"), "3"),
        ("fdsp", "fdsp"),
    ],
)
def test_rules_that_do_not_fit(rule, named):
    with pytest.raises(ValueError, match=named):
        partition({"odd": TREE["odd"]}, make_mesh(fsdp=4), (("odd", rule),))


def test_arrays_really_lie_where_the_rules_say():
    mesh = make_mesh(fsdp=8)
    tree = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), TREE)
    placed = jax.device_put(tree, partition(tree, mesh, smallest=1))
    assert placed["dense"]["kernel"].addressable_shards[0].data.shape == (48, 8)
    whole = jax.device_put(tree, replicate(mesh))
    assert whole["dense"]["kernel"].addressable_shards[0].data.shape == (48, 64)
    batch = jax.device_put(np.zeros((16, 4)), batch_sharding(make_mesh(data=2, fsdp=2, tensor=2)))
    assert batch.addressable_shards[0].data.shape == (4, 4) and isinstance(batch.sharding, NamedSharding)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_activations_stay_split_by_examples(sizes):
    """No array of a device's program, forwards and backwards, has all 64 examples' 12 tokens, as without it many do."""
    module = DiffusionPrior(
        embedding_size=64, width=64, depth=3, heads=2, context_length=8, text_embedding_size=64, remat=True
    )
    mesh = make_mesh(**sizes)
    split = batch_sharding(mesh)
    shapes = {"image": (64, 64), "timesteps": (64,), "embedding": (64, 64), "text": (64, 8, 64), "mask": (64, 8)}
    types = {"timesteps": jnp.int32, "mask": bool}
    inputs = [jax.ShapeDtypeStruct(shape, types.get(name, jnp.float32)) for name, shape in shapes.items()]
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *(jnp.zeros(x.shape, x.dtype) for x in inputs)))
    placed = partition(tree, mesh, smallest=1)

    def program(keep: contextlib.AbstractContextManager) -> tuple[str, int]:
        def loss(params, inputs):
            with keep:
                return jnp.mean(module.apply(params, *inputs) ** 2)

        step = jax.jit(jax.grad(loss), in_shardings=(placed, split), out_shardings=placed)
        compiled = step.lower(tree, inputs).compile()
        return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes

    (kept, memory), (plain, more) = program(keep_batch_split(mesh, 64)), program(contextlib.nullcontext())
    assert "[64,12," not in kept and "[64,12," in plain and memory < 0.7 * more
    alone = make_mesh(devices=jax.devices()[:1])
    assert isinstance(keep_batch_split(alone, 64), contextlib.nullcontext), "nothing to keep on one device"


def test_batch_that_does_not_divide_names_both_numbers():
    mesh = make_mesh(fsdp=2)
    assert batch_parts(mesh) == 8
    check_batch(16, mesh)
    check_batch(32, mesh, accumulation=4)
    with pytest.raises(ValueError, match="12.*8"):
        check_batch(12, mesh)
    with pytest.raises(ValueError, match="16.*3"):
        check_batch(16, mesh, accumulation=3)
    with pytest.raises(ValueError, match="4.*8"):
        check_batch(16, mesh, accumulation=4)


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (2, 2), (3, 2), (4, 4), (12, 4)])
def test_cpu_cores_become_devices_that_batches_divide_by(cores, devices):
    assert cpu_devices(cores) == devices
