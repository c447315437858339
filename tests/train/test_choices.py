"""What docs/choices.md says: `jax.pmap` is the mesh with data alone, and the networks work as NNX modules."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dalle2_jax.layers.transformer import Transformer
from dalle2_jax.sharding import make_mesh
from tests.train.toy import ToyBatches, toy_task
from train.step.state import abstract_state, create_state
from train.step.step import make_step

DEVICES, STEPS = 8, 5
TASK = toy_task(noise=0.0)


def test_pmap_is_a_mesh_of_data_alone():
    """The same losses and parameters, with gradients averaged by hand over the devices that pmap maps to."""
    optimizer = TASK.gradient_transformation()

    def update(params, optimizer_state, batch):
        loss, gradient = jax.value_and_grad(lambda params: TASK.loss(params, batch, jax.random.key(0), {})[0])(params)
        loss, gradient = jax.lax.pmean((loss, gradient), "devices")
        changes, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return jax.tree.map(jnp.add, params, changes), optimizer_state, loss

    mesh = make_mesh(data=DEVICES)
    abstract = abstract_state(TASK, mesh)
    state, step = create_state(TASK, abstract), make_step(TASK, mesh, abstract)
    parallel = jax.pmap(update, axis_name="devices")
    copies = jax.tree.map(lambda x: np.stack([x] * DEVICES), (state["params"], state["optimizer"]))
    batches = ToyBatches(TASK.recipe.batch_size)
    for _ in range(STEPS):
        batch = {name: value for name, value in next(batches).items() if isinstance(value, np.ndarray)}
        state, report = step(state, batch, {})
        parts = {name: value.reshape(DEVICES, -1, *value.shape[1:]) for name, value in batch.items()}
        *copies, losses = parallel(*copies, parts)
        np.testing.assert_allclose(losses, np.full(DEVICES, report["loss"]), rtol=1e-5)
    for one, many in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(copies[0]), strict=True):
        np.testing.assert_allclose(one, many[3], rtol=1e-4, atol=1e-6)


def test_a_network_as_an_nnx_module():
    module = Transformer(width=16, depth=2, heads=2, is_causal=True)
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    wrapped = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
    graph, state = nnx.split(wrapped)
    params = nnx.to_pure_dict(state)
    expected = module.apply({"params": {"blocks": params["blocks"]}}, x)
    np.testing.assert_allclose(wrapped(x), expected, rtol=1e-6)
    gradient = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(wrapped)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert nnx.merge(graph, state)(x).shape == x.shape
