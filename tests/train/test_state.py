"""One training step: what it changes, what a bad batch leaves alone, and that the devices make no difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.sharding import batch_sharding, make_mesh
from tests.train.toy import ToyBatches, ToyTask, toy_task
from train.step.state import abstract_state, create_state
from train.step.step import make_step


def on_host(tree):
    """A copy that outlives the donation of the original."""
    keys = jax.dtypes.prng_key
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x), tree)


def device_batch(mesh, poisoned=False, batch_size=16):
    batch = next(ToyBatches(batch_size, (0,) if poisoned else ()))
    return {name: jax.device_put(batch[name], batch_sharding(mesh)) for name in ("image", "tokens", "mask")}


def take_steps(task, mesh, count=3, smallest=1):
    abstract = abstract_state(task, mesh, smallest=smallest)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    reports = []
    for _ in range(count):
        state, report = step(state, device_batch(mesh), {})
        reports.append(jax.device_get(report))
    return state, reports


def test_a_step_changes_everything_it_should():
    mesh = make_mesh(devices=jax.devices()[:1])
    task = toy_task()
    abstract = abstract_state(task, mesh)
    state = create_state(task, abstract)
    before = on_host(state)
    after, report = make_step(task, mesh, abstract)(state, device_batch(mesh), {})
    after = on_host(after)
    for part in ("params", "ema"):
        assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before[part], after[part])), strict=True))
    assert (int(after["step"]), int(after["skipped"]), int(report["skipped"])) == (1, 0, 0)
    np.testing.assert_array_equal(before["key"], after["key"])
    assert {"loss", "gradient_norm", "learning_rate", "brightness"} <= set(report)


def test_a_batch_whose_loss_is_not_a_number_changes_nothing_but_the_count():
    mesh = make_mesh(devices=jax.devices()[:1])
    task = toy_task()
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    state, _ = step(state, device_batch(mesh), {})
    before = on_host(state)
    state, report = step(state, device_batch(mesh, poisoned=True), {})
    after = on_host(state)
    for part in ("params", "ema", "optimizer", "key"):
        jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
    assert (int(after["step"]), int(after["skipped"]), int(report["skipped"])) == (2, 1, 1)
    state, report = step(state, device_batch(mesh), {})
    assert np.isfinite(report["loss"]) and int(state["skipped"]) == 1
    # The rate is that of the second update, not of the third step.
    np.testing.assert_allclose(report["learning_rate"], 1e-2, rtol=1e-6)


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(on_host(a)), jax.tree.leaves(on_host(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_do_what_one_does(sizes):
    one, reports = take_steps(toy_task(), make_mesh(devices=jax.devices()[:1]))
    eight, others = take_steps(toy_task(), make_mesh(**sizes))
    assert_close(one["params"], eight["params"], 1e-5)
    assert_close(one["ema"], eight["ema"], 1e-5)
    for a, b in zip(reports, others, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_fsdp_splits_parameters_average_and_moments():
    state, _ = take_steps(toy_task(), make_mesh(data=2, fsdp=4), count=2)
    leaves = jax.tree_util.tree_leaves_with_path({name: state[name] for name in ("params", "ema", "optimizer")})
    kernels = [leaf for path, leaf in leaves if "'out'" in jax.tree_util.keystr(path) and leaf.ndim == 2]
    assert len(kernels) == 4  # params, ema, both moments
    for kernel in kernels:
        assert kernel.shape == (16, 48) and kernel.addressable_shards[0].data.shape == (16, 12)


def test_accumulation_is_one_big_batch():
    task = toy_task(noise=0.0)
    whole, reports = take_steps(task, make_mesh(devices=jax.devices()[:1]))
    split, others = take_steps(toy_task(noise=0.0, optimizer={"accumulation": 4}), make_mesh(devices=jax.devices()[:1]))
    assert_close(whole["params"], split["params"], 1e-5)
    np.testing.assert_allclose([r["loss"] for r in reports], [r["loss"] for r in others], rtol=1e-5)
    np.testing.assert_allclose([r["brightness"] for r in reports], [r["brightness"] for r in others], rtol=1e-4)
    spread, _ = take_steps(toy_task(noise=0.0, batch_size=32, optimizer={"accumulation": 2}), make_mesh(), count=1)
    assert int(spread["skipped"]) == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_dtype_drifts(accumulation):
    task = toy_task(optimizer={"accumulation": accumulation})
    mesh = make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(task, mesh)
    state, reports = take_steps(task, mesh, count=2)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, abstract)
    floats = jax.tree.leaves((state["params"], state["ema"], state["optimizer"]))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert all(
        report[name].dtype == np.float32 for report in reports for name in ("loss", "gradient_norm", "learning_rate")
    )


def test_the_average_of_bfloat16_parameters_is_float32():
    class Half(ToyTask):
        def init(self, key):
            return jax.tree.map(lambda p: p.astype(jnp.bfloat16), super().init(key))

    task = Half(recipe=toy_task().recipe)
    state, _ = take_steps(task, make_mesh(devices=jax.devices()[:1]), count=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["ema"])} == {jnp.dtype(jnp.float32)}
