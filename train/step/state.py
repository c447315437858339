"""The training state, and one training step.

The state is a plain dict, so that any tool can read it from a checkpoint:

    params      the parameters
    ema         their moving average, float32
    optimizer   optax's state
    step        int32, steps taken, skipped ones included
    skipped     int32, steps whose loss or gradient was not finite
    key         the stage's PRNG key; a step's is fold_in(key, step)
    extra       what the task keeps from step to step (`Task.init_extra`), where it keeps anything
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dalle2_jax.layers.fields import without_remat
from dalle2_jax.sharding import (
    DEFAULT_RULES,
    SMALLEST_SPLIT,
    Rules,
    partition,
    put_on_devices,
)
from train.config.recipe import Task
from train.machine.compiler import initial_options
from train.step.initial import by_leaf

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def init_state(task: Task, key: jax.Array) -> State:
    """The state at step 0 (pure, jit-able)."""
    init_key, step_key = jax.random.split(key)
    return fresh_state(task, task.init(init_key), step_key)


def fresh_state(task: Task, params: Any, step_key: jax.Array) -> State:
    """The state at step 0 of these parameters (pure, jit-able)."""
    extra = task.init_extra()
    return {
        "params": params,
        "ema": jax.tree.map(lambda p: p.astype(jnp.float32), params),
        "optimizer": task.gradient_transformation().init(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "key": step_key,
        **({} if extra is None else {"extra": extra}),
    }


def abstract_state(task: Task, mesh: Mesh, rules: Rules = DEFAULT_RULES, smallest: int = SMALLEST_SPLIT) -> State:
    """The state as ShapeDtypeStructs that carry their shardings; allocates nothing."""
    shapes = jax.eval_shape(lambda: init_state(task, jax.random.key(task.recipe.seed)))
    shardings = partition(shapes, mesh, rules, smallest)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def create_state(task: Task, abstract: State, initial: Any = None, fitted: dict[str, Any] | None = None) -> State:
    """The state at step 0, made where it belongs: no device ever holds more than its part.

    initial: parameters (a tree of arrays) that stand in place of the random ones, in their average too. fitted: those
    that were computed from the data (`Task.fit`), a part of the tree.
    """
    init_key, step_key = jax.random.split(jax.random.key(task.recipe.seed))
    shardings = shardings_of(abstract)
    if initial is None:
        plain = task.with_module(without_remat(task.module))
        params = by_leaf(plain.init, init_key, shardings["params"])
    else:
        params = _like(initial, abstract["params"])
    if fitted:
        specs, found = flatten_dict(abstract["params"]), flatten_dict(fitted)
        found = _like(found, {path: specs[path] for path in found})
        params = unflatten_dict({**flatten_dict(params), **found})
    complete = jax.jit(
        lambda params, key: fresh_state(task, params, key),
        out_shardings=shardings,
        donate_argnums=0,
        compiler_options=initial_options(shardings["step"].mesh.abstract_mesh.abstract_device.platform),
    )
    return complete(params, step_key)


def _like(values: Any, specs: Any) -> Any:
    """Arrays in the dtype and on the devices of a tree of ShapeDtypeStructs."""
    return put_on_devices(
        jax.tree.map(lambda value, spec: np.asarray(value, spec.dtype), values, specs), shardings_of(specs)
    )
