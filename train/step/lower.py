"""A training step lowered from shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.sharding import batch_sharding, partition
from train.config.recipe import Task
from train.config.system import System
from train.step.step import make_step

ANY_SIZE = 64  # pixels


def trace_step(system: System, task: Task, abstract: Any, mesh: Mesh) -> jax.stages.Traced:
    """One training step, traced from shapes alone; no data is read and nothing is allocated."""
    shardings = partition(task.frozen, mesh, system.sharding, system.smallest_split)
    frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), task.frozen, shardings)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which says for what devices this is traced
        return make_step(task, mesh, abstract).trace(abstract, abstract_batch(system, task, mesh), frozen)


def abstract_batch(system: System, task: Task, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, split over `mesh` where one is given.

    Where neither the data nor the task say how large images are, they are as large as the task makes them, or of
    `ANY_SIZE`.
    """
    spec, count = task.batch_spec, task.recipe.batch_size
    sizes = [size for size in (system.data.image_size, spec.image_size) if size is not None]
    size = min(sizes, default=task.recipe.output_size or ANY_SIZE)
    split = None if mesh is None else batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    images = {"image": np.zeros((size, size, 3), np.uint8)}
    if spec.transform is not None:
        images = spec.transform(images["image"], np.random.default_rng(0))
    batch = {name: array(value.shape, value.dtype) for name, value in images.items()}
    if spec.captions:
        length = system.context_length
        batch |= {"tokens": array((length,), jnp.int32), "mask": array((length,), jnp.bool_)}
    if spec.labels:
        batch["label"] = array((), jnp.int32)
    return {**batch, "index": array((), jnp.int32)}
