"""Bytes that a step takes of a device, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from train.config.recipe import Task
from train.config.system import System
from train.step.lower import abstract_batch


def kept_bytes(system: System, task: Task, params: Any, frozen: Any, extra: Any) -> int:
    """Bytes an image that the forward pass keeps for the backward pass: by how much a batch twice as large keeps more.

    What does not grow with the batch, such as the parameters themselves, is not among them.
    """

    recipe = task.recipe

    def kept(batch_size: int) -> int:
        larger = dataclasses.replace(task, recipe=dataclasses.replace(recipe, batch_size=batch_size))
        batch = abstract_batch(system, larger, None)

        def backward(params: Any, batch: Any, frozen: Any, extra: Any) -> Any:
            return jax.vjp(lambda p: task.loss(p, batch, jax.random.key(0), frozen, extra)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, params, batch, frozen, extra))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf.dtype, "itemsize"))

    return max(1, (kept(2 * recipe.batch_size) - kept(recipe.batch_size)) // recipe.batch_size)


def device_bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes that one device holds of a tree of shapes, by its shardings or those given beside it."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(parts))
