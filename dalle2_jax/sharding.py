"""Where arrays live: the device mesh, and partition rules by parameter path.

Models are written for one device and know nothing of this file. A training step is one `jax.jit` over a mesh with
three axes: `data` (copies of the model), `fsdp` (each parameter split over the axis, gathered when it is used) and
`tensor` (the transformers' heads and hidden units split, so that no device computes a whole layer). The batch is split
over `data` and `fsdp` together. With `fsdp = tensor = 1` this is plain data parallelism, what `jax.pmap` was for.

    mesh = make_mesh(fsdp=4)                        # or make_mesh(**mesh_sizes("fsdp=4"))
    shardings = partition(jax.eval_shape(init, key), mesh)
    params = jax.jit(init, out_shardings=shardings)(key)
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class Tensor:
    """The rule that splits `axis` over the mesh's `tensor`, and the largest other axis over `fsdp`."""

    axis: int


Rules = tuple[tuple[str, str | Tensor | PartitionSpec], ...]

# Of a transformer's block (arXiv 1909.08053, Sec. 3): heads and hidden units are split, and what they give is summed.
DEFAULT_RULES: Rules = (
    (r"block(s|_\d+)?/attention/qkv/(kernel|bias)$", Tensor(-3)),
    (r"block(s|_\d+)?/attention/out/kernel$", Tensor(-2)),
    (r"block(s|_\d+)?/mlp_in/(kernel|bias)$", Tensor(-1)),
    (r"block(s|_\d+)?/mlp_out/kernel$", Tensor(-2)),
    (r".*", "fsdp"),
)

# Below this many elements a split parameter costs more in communication than it saves in memory.
SMALLEST_SPLIT = 2**16


# Beyond this many parts small batches get very small, and nobody has measured it.
MOST_CPU_DEVICES = 4


def use_cpu_cores() -> None:
    """Lets jax see the CPU's cores as devices, so that batches are split among them; before a backend starts.

    XLA shares out one small operation between two cores with little gain, and two halves of a batch with much. What the
    user has set (JAX_NUM_CPU_DEVICES, or --xla_force_host_platform_device_count in XLA_FLAGS) stays.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told and "JAX_NUM_CPU_DEVICES" not in os.environ and jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # a backend has started: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", cpu_devices(available_cores()))


def available_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices(cores: int) -> int:
    """The largest power of two that is neither above `cores` nor above `MOST_CPU_DEVICES`: batches divide by it."""
    devices = 1
    while 2 * devices <= min(cores, MOST_CPU_DEVICES):
        devices *= 2
    return devices


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all by default); one of the sizes may be -1, which takes the devices that are left.

    The axes are Auto axes: `jax.make_mesh` makes Explicit ones by default, under which the reshapes of a U-Net's
    attention are type errors.

    Raises:
        InputError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or len(free) > 1:
        raise InputError(f"mesh sizes are positive, with at most one -1, but are {sizes}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"a mesh of {asked} does not fit {len(devices)} devices: its sizes must multiply to that number"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(text: str) -> dict[str, int]:
    """`{"data": 2, "fsdp": 4}` of "data=2,fsdp=4", for `make_mesh`.

    Raises:
        InputError: if it is not a list of AXIS=SIZE with the mesh's axes, each once.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not re.fullmatch(r"[1-9]\d*", size):
            raise InputError(
                f"the mesh {text!r} is not a list of sizes: write it as data=2,fsdp=4, with {', '.join(AXES[:-1])} or "
                f"{AXES[-1]}, each once"
            )
        sizes[name] = int(size)
    return sizes


def replicate(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


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


def path_name(path: tuple[Any, ...]) -> str:
    """`decoder/blocks/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES, smallest: int = SMALLEST_SPLIT) -> Any:
    """One NamedSharding for each leaf of `tree` (arrays or their shapes), by the first rule whose pattern its path
    holds.

    A rule is (regular expression, what to do): `"replicated"`, `"fsdp"` (split the largest axis that the mesh's fsdp
    size divides; leaves with fewer than `smallest` elements, or without such an axis, are replicated), `Tensor(axis)`,
    or a PartitionSpec. A leaf that no rule matches is replicated. Optimizer moments carry their parameter's path and so
    follow its rule.

    Raises:
        InputError: if a rule is unknown, an axis does not divide over `tensor`, or a PartitionSpec names an axis that
            the mesh lacks or does not fit the shape.
    """
    compiled = [(re.compile(pattern), rule) for pattern, rule in rules]

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((rule for pattern, rule in compiled if pattern.search(name)), "replicated")
        if isinstance(rule, PartitionSpec):
            _check_spec(name, leaf.shape, rule, mesh)
            return NamedSharding(mesh, rule)
        if isinstance(rule, Tensor):
            return NamedSharding(mesh, _tensor_spec(name, leaf.shape, rule.axis, mesh, smallest))
        if rule == "fsdp":
            return NamedSharding(mesh, PartitionSpec(*_trimmed(_fsdp_axes(leaf.shape, mesh, smallest))))
        if rule == "replicated":
            return replicate(mesh)
        raise InputError(f"the partition rule {rule!r} is neither 'replicated', 'fsdp', a Tensor nor a PartitionSpec")

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def _fsdp_axes(shape: tuple[int, ...], mesh: Mesh, smallest: int, taken: int | None = None) -> list[str | None]:
    """The mesh axis of each axis: "fsdp" for the largest one that divides and is not `taken`."""
    parts = mesh.shape["fsdp"]
    axes: list[str | None] = [None] * len(shape)
    candidates = [axis for axis, size in enumerate(shape) if size and size % parts == 0 and axis != taken]
    if parts > 1 and math.prod(shape) >= smallest and candidates:
        axes[max(candidates, key=lambda axis: shape[axis])] = "fsdp"
    return axes


def _tensor_spec(name: str, shape: tuple[int, ...], axis: int, mesh: Mesh, smallest: int) -> PartitionSpec:
    parts, axis = mesh.shape["tensor"], axis % len(shape)
    if shape[axis] % parts:
        raise InputError(
            f"{name} {list(shape)} has an axis of {shape[axis]}, which does not divide over tensor={parts}: choose a "
            "smaller tensor axis, or heads and widths that divide"
        )
    axes = _fsdp_axes(shape, mesh, smallest, axis)
    if parts > 1:
        axes[axis] = "tensor"
    return PartitionSpec(*_trimmed(axes))


def _trimmed(axes: list[str | None]) -> list[str | None]:
    """Without the Nones at the end."""
    return axes[: max((place + 1 for place, axis in enumerate(axes) if axis), default=0)]


def _check_spec(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InputError(f"the partition {spec} has more axes than {name}, whose shape is {shape}")
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise InputError(
                f"the partition {spec} of {name} names the axis {unknown[0]!r}; the mesh has {tuple(mesh.shape)}"
            )
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise InputError(f"{name} has an axis of {size}, which does not divide over {parts} devices by {spec}")
