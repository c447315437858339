"""A mesh of chips that are not there, and what a program compiled for them needs of their memory.

libtpu compiles on any machine for any topology of TPUs, and jax's CUDA plugin for any number of GPUs
(`train.step.nvidia`), so the proof that a stage fits needs neither.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jaxlib
from jax.sharding import Mesh

from dalle2_jax.errors import InputError, nearest
from dalle2_jax.sharding import make_mesh
from train.machine import backend
from train.machine.compiler import jaxlib_knows
from train.step.nvidia import CHIPS

NAME = re.compile(r"[a-z0-9]+:\d+(x\d+)+")
# Of NVIDIA's chips, as theirs are named: h200:8, and h300 too; TPUs are called otherwise (v5e:4x4).
NVIDIA_NAME = re.compile(r"([a-z]{1,2}\d{2,3}[a-z]*)(?::(.*))?", re.IGNORECASE)
# libtpu asks the cloud for the machine it is on unless these are set, and locks itself against a second process.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# GiB that a program may use of a device's memory, by its kind: v5e as its compiler says, the other TPUs as they are
# sold, NVIDIA's as `train.step.nvidia` says.
MEMORY = {
    "TPU v2": 8.0,
    "TPU v3": 16.0,
    "TPU v4": 32.0,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.0,
    "TPU v6 lite": 32.0,
    "TPU7x": 96.0,
} | {chip.device_kind: chip.usable for chip in CHIPS.values()}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What XLA for a GPU tries out on the device where there is one. Left to guess, it finds no tiles for some products.
UNTUNED = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_experimental_enable_fusion_autotuner": False}
# What is compiled for GPUs that are not there is not kept: jax cannot read it back, and it would be untuned.
UNCACHED = ("jax_persistent_cache_min_compile_time_secs", math.inf)
# Compiles for a TPU three to four times faster; the memory hardly differs. For a GPU it is another program: loops are
# unrolled and collectives overlap, which for the paper's prior takes a fifth more memory and half as much time again.
QUICK = ("jax_optimization_level", "O1")
INSTALL_CUDA = "pip install 'dalle2-jax[cuda-compile]'"


def prepare_environment() -> None:
    """Keeps libtpu from looking for chips; best called before jax starts a backend, what the user has set stays."""
    for setting, value in SETTINGS.items():
        os.environ.setdefault(setting, value)


def prepare(name: str) -> None:
    """Sets what compiling for NVIDIA GPUs wants set before jax starts a backend; what the user has set stays."""
    if NVIDIA_NAME.fullmatch(name) and not backend.has_nvidia_gpu():
        backend.compute_on_cpu()


def topology_mesh(name: str, mesh: Mapping[str, int] | None = None) -> Mesh:
    """The mesh over the chips of `name` with axes of these sizes; by default all share the parameters.

    name: v5e:4x4, a TPU's generation and shape; or h200:8, GPUs of one host; or h200:2x8, hosts and GPUs of each.

    Raises:
        InputError: if it is no name of a topology, what compiles for it is missing or does not know it, or the mesh
            does not fit it.
    """
    nvidia = NVIDIA_NAME.fullmatch(name)
    devices = _tpus(name) if nvidia is None else _gpus(name, nvidia[1], nvidia[2])
    return make_mesh(**(mesh or {"fsdp": len(devices)}), devices=devices)


def _tpus(name: str) -> list[jax.Device]:
    if not NAME.fullmatch(name):
        raise InputError(
            f"the topology {name!r} is not of the form generation:shape; write it as v5e:4x4 or v5p:2x2x1, or as "
            "h200:8 for GPUs"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f'compiling for {name} needs libtpu, which is not installed; run: pip install "jax[tpu]"')
    prepare_environment()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise InputError(
            f"libtpu knows no topology {name!r}; some it knows are v5e:4x4 and v5p:2x2x1 ({_reason(error)})"
        ) from error


def _gpus(name: str, chip: str, shape: str | None) -> list[jax.Device]:
    if chip not in CHIPS:
        raise InputError(
            f"there is no chip {chip!r} to compile for: NVIDIA's are {', '.join(CHIPS)}; the nearest is "
            f"{nearest(chip.lower(), CHIPS)!r}"
        )
    sizes = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape or "")
    if sizes is None:
        raise InputError(
            f"the topology {name!r} does not say how many GPUs; write {chip}:8 for one host's, {chip}:2x8 for hosts x "
            "GPUs of each"
        )
    check_cuda_plugin(name)
    prepare(name)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=CHIPS[chip].target_config,
            topology=f"1x{sizes[1] or 1}x{sizes[2]}",  # slices, hosts, devices
        ).devices
    except NotImplementedError as error:
        raise InputError(
            f"jax started without its CUDA plugin and cannot compile for {name}; set JAX_PLATFORMS=cpu before it starts"
        ) from error
    except Exception as error:
        raise InputError(f"jax's CUDA plugin refuses the topology {name!r}: {_reason(error)}") from error


def check_cuda_plugin(name: str) -> None:
    """Checks that jax's CUDA plugin is there to compile for the topology `name`.

    Raises:
        InputError: if it is not installed, or not of jaxlib's version.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise InputError(f"compiling for {name} needs jax's CUDA plugin, which is not installed; run: {INSTALL_CUDA}")
    plugin = importlib.metadata.version("jax-cuda13-plugin")
    numbers = [re.match(r"\d+(\.\d+)*", version)[0] for version in (plugin, jaxlib.__version__)]
    if numbers[0] != numbers[1]:
        raise InputError(
            f"compiling for {name} needs jax's CUDA plugin of jaxlib's version, which is {jaxlib.__version__}, but "
            f"{plugin} is installed; run: {INSTALL_CUDA}"
        )


def _reason(error: Exception) -> str:
    """The first line of an error's words."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


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

    memory: bytes of its arguments, of the outputs beside the donated state's, of the temporaries, which are one piece;
    all of them are held at once. flops, bytes_accessed: the compiler's count, which takes a loop's body once; None
    where it does not count, as for GPUs. collectives: operations between devices in the program, by kind.
    """

    memory: Mapping[str, int]
    flops: float | None
    bytes_accessed: float | None
    collectives: Mapping[str, int]

    @property
    def needed(self) -> int:
        return sum(self.memory.values())


def compile_step(lowered: jax.stages.Lowered, platform: str) -> Needs | str:
    """Compiles for the chips of a topology; returns what a device needs, or what is too much, if it is refused.

    platform: of these chips, as jax names it: "tpu" or "gpu". XLA for a TPU refuses what does not fit; for a GPU it
    does not, and what is needed has to be held against what there is.
    """
    gpu = platform == "gpu"
    options = {name: value for name, value in UNTUNED.items() if gpu and jaxlib_knows(name)}
    try:
        with _configured(*(UNCACHED if gpu else QUICK)):
            compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        # "Shared memory size limit exceeded" is about one kernel of a GPU, and no answer to whether the step fits.
        if "RESOURCE_EXHAUSTED" not in str(error) or "Shared memory" in str(error):
            raise
        return what_is_too_much(str(error))
    analysis, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return Needs(
        memory=memory,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        collectives=count_collectives(text),
    )


def count_collectives(text: str) -> dict[str, int]:
    """How many operations between devices of each kind a compiled program has; a pair of start and done is one."""
    found = {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in found.items() if count}


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
def _configured(name: str, value: object) -> Iterator[None]:
    """A setting of jax's for as long as it lasts."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)
