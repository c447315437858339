"""Batches on the mesh, of which every process reads its own rows; and arrays of the host."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import InputError
from dalle2_jax.sharding.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split on this mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_rows(sharding: NamedSharding, count: int, devices: Collection[jax.Device] | None = None) -> np.ndarray:
    """Which rows of a batch of `count` this process's devices hold under `sharding`: int [rows], ascending.

    Every process must read these and no others, so that the batch is, row by row, the one that a single process would
    have read: what is drawn at random for a row goes by its place. On a mesh whose other axes run across processes,
    several of them hold the same rows.

    Args:
        sharding: of the batch; see `batch_sharding`.
        devices: in place of this process's.
    """
    devices = sharding.addressable_devices if devices is None else devices
    parts = sharding.devices_indices_map((count,))
    held = {range(*parts[device][0].indices(count)) for device in devices}
    return np.array(sorted(row for part in held for row in part), np.int64)


def put_batch_on_devices(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The numpy arrays of numbers of a host batch, of which each process has its `own_rows`, as arrays on the mesh.

    What else is in the batch, such as the captions' text, stays on the host.
    """
    arrays = {
        name: value for name, value in batch.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    }
    if jax.process_count() == 1:
        return jax.device_put(arrays, sharding)
    return {name: assemble_rows(sharding, value) for name, value in arrays.items()}


def assemble_rows(sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
    """The whole batch as an array on the mesh, of which each process gives its `own_rows`, in their order."""
    devices = sharding.num_devices
    count = len(rows) * devices // len(own_rows(sharding, devices))
    own = own_rows(sharding, count)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(count)
        start = np.searchsorted(own, first)
        return rows[start : start + last - first]

    return jax.make_array_from_callback((count, *rows.shape[1:]), sharding, part)


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Arrays of the host, which every process has whole, as arrays on the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return jax.device_put(value, sharding)
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises InputError, naming both numbers, if a batch cannot be split evenly over the mesh and its micro-batches."""
    if accumulation < 1 or batch_size % accumulation:
        raise InputError(f"a batch of {batch_size} does not divide into {accumulation} accumulated micro-batches")
    micro, parts = batch_size // accumulation, batch_parts(mesh)
    if micro % parts:
        name = f"a batch of {batch_size}" if accumulation == 1 else f"a micro-batch of {micro}"
        raise InputError(
            f"{name} does not divide over the {parts} devices of the mesh's data axes: use a multiple of {parts}"
        )


def keep_batch_split(mesh: Mesh, batch: int) -> contextlib.AbstractContextManager[None]:
    """While networks are traced, keeps what their modules give split by examples, as the batch is.

    A parameter and a batch that are split over the same axis cannot both stay so in a product. Left to itself, XLA's
    partitioner gathers the batch in places, whose activations are much the larger; with this it gathers the parameter,
    one layer of a scan at a time. Only arrays whose first axis is `batch` are meant, and their other axes stay free.

    with keep_batch_split(mesh, 64):
        loss = module.apply(params, batch)
    """
    if batch_parts(mesh) == 1 or batch % batch_parts(mesh):
        return contextlib.nullcontext()

    def constrain(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim < 2 or x.shape[0] != batch:
            return x
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *free)))

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        return jax.tree.map(constrain, call(*args, **kwargs))

    return nn.intercept_methods(interceptor)
