"""Where parameters and batches lie: on this process's devices, shared out among them."""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.layers.precision import cast, with_dtype
from dalle2_jax.sharding import batch_parts, batch_sharding, make_mesh, partition

Tree = TypeVar("Tree")


def put_stage_on_devices(stage: LoadedStage, dtype: str | None = None, shard: bool | None = None) -> LoadedStage:
    """The stage with its parameters on one device, or shared out among all of this process's, in `dtype`.

    dtype: None: as it is. shard: None: on accelerators.
    """
    module, params = stage.module, stage.params
    if dtype is not None:
        module, params = with_dtype(module, dtype), cast(params, dtype)
    devices = jax.local_devices()
    if shard is None:  # CPU devices share one memory, in which there is nothing to be saved
        shard = devices[0].platform != "cpu"
    where = partition(params, make_mesh(data=1, fsdp=len(devices), devices=devices)) if shard else None
    return dataclasses.replace(stage, module=module, params=jax.device_put(params, where))


def shard_batch(batch: Tree) -> Tree:
    """Arrays `[b, ...]` shared out among this process's devices if b divides by their number, else as they are."""
    mesh = make_mesh(devices=jax.local_devices())
    leaves = jax.tree.leaves(batch)
    if not leaves or leaves[0].shape[0] % batch_parts(mesh):
        return batch
    return jax.device_put(batch, batch_sharding(mesh))


def device_batches(count: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The rows 0..count-1 in batches of one size, and how many of each are new: the last one is filled up again.

    So one compiled program serves all, also the last few and an odd number of them, and every device has its part.
    """
    devices = jax.local_device_count()
    size = min(batch_size, count)
    size = size if size < devices else -(-size // devices) * devices
    for start in range(0, count, size):
        kept = min(size, count - start)
        yield np.resize(np.arange(start, start + kept), size), kept
