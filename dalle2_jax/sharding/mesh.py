"""The device mesh: `data` (copies of the model), `fsdp` (parameters split) and `tensor` (layers split)."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


BATCH_AXES = ("data", "fsdp")


# Beyond this many parts small batches get very small, and nobody has measured it.
MOST_CPU_DEVICES = 4


def use_cpu_cores() -> None:
    """Lets jax see the CPU's cores as devices, so that batches are split among them; before a backend starts.

    XLA shares out one small operation between two cores with little gain, and two halves of a batch with much. What the
    user has set (JAX_NUM_CPU_DEVICES, or --xla_force_host_platform_device_count in XLA_FLAGS) stays.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ and jax.config.jax_num_cpu_devices < 1:
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
