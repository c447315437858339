"""A mesh of TPU chips that are not there, and what a program compiled for them needs of their memory.

libtpu compiles on any machine for any topology, so the proof that a stage fits needs no TPU.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from dalle2_jax.sharding import make_mesh

NAME = re.compile(r"[a-z0-9]+:\d+(x\d+)+")
# libtpu asks the cloud for the machine it is on unless it is told, and locks itself against a second process.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# GiB that a program may use of a device's memory, by its kind: v5e as its compiler says, the others as they are sold.
MEMORY = {
    "TPU v2": 8.0,
    "TPU v3": 16.0,
    "TPU v4": 32.0,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.0,
    "TPU v6 lite": 32.0,
    "TPU7x": 96.0,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def prepare_environment() -> None:
    """Keeps libtpu from looking for chips; best called before jax starts a backend, what the user has set stays."""
    for setting, value in SETTINGS.items():
        os.environ.setdefault(setting, value)


def topology_mesh(name: str, mesh: Mapping[str, int] | None = None) -> Mesh:
    """The mesh over the chips of `name`, as v5e:4x4, with axes of these sizes; by default all share the parameters.

    Raises:
        ValueError: if it is no name of a topology, libtpu is missing or does not know it, or the mesh does not fit it.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"the topology {name!r} is not of the form generation:shape; write it as v5e:4x4 or v5p:2x2x1")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f'compiling for {name} needs libtpu, which is not installed; run: pip install "jax[tpu]"')
    prepare_environment()
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"libtpu knows no topology {name!r}; some it knows are v5e:4x4 and v5p:2x2x1 ({reason})"
        ) from error
    return make_mesh(**(mesh or {"fsdp": len(devices)}), devices=devices)


def device_memory(device: jax.Device) -> int | None:
    """Bytes of a device's own memory that programs may use; None: unknown, or a CPU's."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, AttributeError, NotImplementedError):  # a chip that is not there
        limit = None
    known = MEMORY.get(device.device_kind)
    return limit or (None if known is None else int(known * 2**30))


@dataclass(frozen=True)
class Needs:
    """What a compiled step takes of one device.

    memory: bytes of its arguments, of the outputs beside the donated state's, of the temporaries. flops,
    bytes_accessed: the compiler's count, which takes a loop's body once. collectives: operations between devices in the
    program, by kind.
    """

    memory: Mapping[str, int]
    flops: float
    bytes_accessed: float
    collectives: Mapping[str, int]

    @property
    def needed(self) -> int:
        return sum(self.memory.values())


def compile_step(lowered: jax.stages.Lowered) -> Needs | str:
    """Compiles; returns what a device needs, or what is too much, if it does not fit."""
    try:
        with _quick_compilation():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return what_is_too_much(str(error))
    analysis, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    found = {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return Needs(
        memory=memory,
        flops=float(cost.get("flops", math.nan)),
        bytes_accessed=float(cost.get("bytes accessed", math.nan)),
        collectives={name: count for name, count in found.items() if count},
    )


def what_is_too_much(message: str) -> str:
    """`needs 55.5 GiB of 15.8 GiB` of the compiler's words, or their first line where they say it otherwise."""
    sizes = re.search(r"([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
    if sizes is not None:
        return f"its temporaries alone need {float(sizes[1]):.1f} GiB of {float(sizes[2]):.1f} GiB"
    sizes = re.search(r"[Uu]sed ([\d.]+)G of ([\d.]+)G hbm", message)
    if sizes is not None:
        return f"needs {float(sizes[1]):.1f} GiB of {float(sizes[2]):.1f} GiB"
    return message.strip().splitlines()[0]


@contextmanager
def _quick_compilation() -> Iterator[None]:
    """Optimisation level O1, which compiles for a TPU three to four times faster; the memory hardly differs."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)
