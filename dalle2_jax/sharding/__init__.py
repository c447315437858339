"""Where arrays live: the device mesh, partition rules by parameter path, batches, and several processes.

Models are written for one device and know nothing of this. A training step is one `jax.jit` over a mesh with three
axes: `data` (copies of the model), `fsdp` (each parameter split over the axis, gathered when it is used) and `tensor`
(the transformers' heads and hidden units split, so that no device computes a whole layer). The batch is split over
`data` and `fsdp` together. With `fsdp = tensor = 1` this is plain data parallelism, what `jax.pmap` was for.

    mesh = make_mesh(fsdp=4)                        # or make_mesh(**mesh_sizes("fsdp=4"))
    shardings = partition(jax.eval_shape(init, key), mesh)
    params = jax.jit(init, out_shardings=shardings)(key)
"""

from dalle2_jax.sharding.batch import (
    assemble_rows,
    batch_parts,
    batch_sharding,
    check_batch,
    keep_batch_split,
    own_rows,
    put_batch_on_devices,
    put_on_devices,
)
from dalle2_jax.sharding.mesh import available_cores, cpu_devices, make_mesh, mesh_sizes, replicate, use_cpu_cores
from dalle2_jax.sharding.partition import DEFAULT_RULES, SMALLEST_SPLIT, Rules, Tensor, partition, path_name

__all__ = [
    "DEFAULT_RULES",
    "SMALLEST_SPLIT",
    "Rules",
    "Tensor",
    "assemble_rows",
    "available_cores",
    "batch_parts",
    "batch_sharding",
    "check_batch",
    "cpu_devices",
    "keep_batch_split",
    "make_mesh",
    "mesh_sizes",
    "own_rows",
    "partition",
    "path_name",
    "put_batch_on_devices",
    "put_on_devices",
    "replicate",
    "use_cpu_cores",
]
