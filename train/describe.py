"""What a system is and what it would take: parameters, FLOPs and memory of every stage, from shapes alone."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.sharding import batch_parts, check_batch, make_mesh, partition
from train.config.recipe import Recipe, Task
from train.config.system import System
from train.loop.clock import duration
from train.run.given import planned_given
from train.run.plan import plan_stage
from train.step.lower import trace_step
from train.step.memory import device_bytes, kept_bytes
from train.step.state import abstract_state
from train.step.topology import compile_step, device_memory, topology_mesh

HEADER = (
    "stage",
    "parameters",
    "steps x batch",
    "forward",
    "in training",
    "all steps",
    "state",
    "activations",
    "largest batch",
)
NOTE = (
    "\nForward, in training: FLOPs an image, of matrix products and convolutions, frozen networks and what remat\n"
    "computes again included. State, activations: of one device. The state is what lasts through a step, and the\n"
    "gradients; activations are what is kept for the backward pass. What a layer has in hand comes on top, so the\n"
    "largest batch that they leave room for is an estimate{}."
)
HOW_TO_COMPILE = (
    "; `--topology v5e:4x4 --mesh data=4,fsdp=4`\n"
    "proves a fit by compiling for that many TPU chips, `--topology h200:8` for NVIDIA GPUs"
)


@dataclass(frozen=True)
class Stage:
    """A stage's figures.

    parts: parameters by the network's part. memory: bytes a device by what they hold. forward, training: operations an
    image of the loss alone, and of a whole step. activations: bytes an image that are kept for the backward pass,
    on the device that has the image.
    """

    name: str
    recipe: Recipe
    parts: Mapping[str, int]
    frozen: int
    forward: float
    training: float
    memory: Mapping[str, int]
    activations: int
    lowered: jax.stages.Lowered

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def state(self) -> int:
        """Bytes that a device holds before it sees an image."""
        return sum(self.memory.values())

    def largest_batch(self, memory: int, parts: int) -> int:
        """How many images over `parts` devices of so many bytes each; 0 if the state leaves no room."""
        return max(0, memory - self.state) // self.activations * parts * self.recipe.optimizer.accumulation


def describe(
    system: System, names: Sequence[str] = (), topology: str | None = None, mesh: Mapping[str, int] | None = None
) -> int:
    """Prints a table of the stages; with `topology` (as v5e:4x4, h200:8) also compiles each one's training step for it.

    names: the stages to tell of; () all. mesh: sizes of its axes, as `sharding.mesh_sizes` gives them; by default all
    devices of a topology share the parameters, and those of this machine the batch alone.
    Returns the exit code: 0, 1 if a stage does not fit the topology's memory, 2 if a stage is refused.

    Raises:
        InputError: if the topology is wrong or cannot be compiled for, or the mesh does not fit the devices.
    """
    made = make_mesh(**(mesh or {})) if topology is None else topology_mesh(topology, mesh)
    print(f"{_title(system)}\non {_mesh_words(made)}\n", flush=True)
    stages, refused = examine(system, made, names)
    memory = device_memory(made.devices.flat[0])
    if stages:
        print(_table([HEADER, *(_row(stage, made, memory) for stage in stages)]) + "\n")
    for stage in stages:
        held = ", ".join(f"{name} {_bytes(size)}" for name, size in stage.memory.items())
        print(f"{stage.name}: {_largest_parts(stage)}\n  a device holds: {held}")
    for name, reason in refused.items():
        print(f"{name}: refused: {reason}")
    print(NOTE.format("" if topology else HOW_TO_COMPILE))
    fits = [_print_compiled(stage, made, memory) for stage in stages] if topology else []
    return 2 if refused else 0 if all(fits) else 1


def examine(system: System, mesh: Mesh, names: Sequence[str] = ()) -> tuple[list[Stage], dict[str, str]]:
    """Every stage (of `names`; () all) that can be built and lowered on `mesh`, and why each other one is refused.

    Raises:
        InputError: if a stage that the system is given is missing.
    """
    stages: list[Stage] = []
    refused: dict[str, str] = {}
    planned = planned_given(system)
    for name, recipe in system.stages.items():
        try:
            task = plan_stage(name, recipe, planned).task
            if names and name not in names:
                continue
            check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
            stages.append(_stage(system, name, task, mesh))
        except InputError as error:
            refused[name] = str(error).strip().splitlines()[0]
    return stages, refused


def _stage(system: System, name: str, task: Task, mesh: Mesh) -> Stage:
    recipe, abstract = task.recipe, abstract_state(task, mesh, system.sharding, system.smallest_split)
    traced = trace_step(system, task, abstract, mesh)
    lowered = traced.lower()
    arguments = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), lowered.args_info[0])
    state, batch, frozen_shapes = arguments
    gradients = device_bytes(abstract["params"])
    if recipe.optimizer.accumulation > 1:  # their sum is float32 beside the micro-batch's own
        gradients += sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract["params"]))
    memory = {
        "parameters": device_bytes(abstract["params"]),
        "average": device_bytes(abstract["ema"]),
        "optimizer": device_bytes(abstract["optimizer"]),
        "gradients": gradients,
        "frozen": device_bytes(task.frozen, partition(task.frozen, mesh, system.sharding, system.smallest_split)),
    }
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which says for what devices this is traced
        forward = jax.make_jaxpr(task.loss)(
            state["params"], batch, jax.random.key(0), frozen_shapes, state.get("extra")
        )
        activations = kept_bytes(system, task, state["params"], frozen_shapes, state.get("extra"))
    return Stage(
        name=name,
        recipe=recipe,
        parts={part: count_parameters(tree) for part, tree in abstract["params"].items()},
        frozen=count_parameters(task.frozen),
        forward=count_flops(forward) / recipe.batch_size,
        training=count_flops(traced.jaxpr) / recipe.batch_size,
        memory=memory,
        activations=activations,
        lowered=lowered,
    )


def _print_compiled(stage: Stage, mesh: Mesh, memory: int | None) -> bool:
    """Compiles a stage's step and prints what it needs; False if it does not fit."""
    if memory is not None and stage.state > memory:
        print(f"\n{stage.name}: does not fit: its state alone needs {_bytes(stage.state)} of {_bytes(memory)}")
        return False
    print(f"\n{stage.name}: compiling", flush=True)
    start = time.monotonic()
    platform = mesh.devices.flat[0].platform
    needs = compile_step(stage.lowered, platform)
    if isinstance(needs, str):
        print(f"  does not fit: {needs}")
        return False
    took = duration(time.monotonic() - start)
    share = stage.training * stage.recipe.batch_size / mesh.devices.size
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in needs.memory.items())
    of = f" of {_bytes(memory)}" if memory else ""
    # A TPU's compiler has refused what does not.
    fits = platform == "tpu" or memory is None or needs.needed <= memory
    verdict = "fits" if fits else "does not fit"
    print(f"  {verdict}: a device needs {_bytes(needs.needed)}{of} ({parts}); compiled in {took}")
    counted = f"  a device computes {share:.2e} FLOPs a step"
    if needs.flops is not None and needs.bytes_accessed is not None:
        counted += (
            f"; XLA's own count, which takes a loop's body once, is {needs.flops:.2e}, with "
            f"{_bytes(needs.bytes_accessed)} read and written"
        )
    print(counted)
    print(
        f"  a step's program has {', '.join(f'{count} {name}' for name, count in needs.collectives.items()) or 'no'} "
        "operations between devices"
    )
    return fits


def _title(system: System) -> str:
    data = system.data.name + (f"/{system.data.config}" if system.data.config else "")
    tokens = "no captions"
    if system.reads_captions:
        tokens = f"a vocabulary of {system.vocabulary_size:,}, captions of up to {system.context_length} tokens"
    count = len(system.stages)
    given = ""
    for name, folder in system.given.items():
        given += f"\ngiven{' until it is trained' * (name in system.stages)}: {name}, that of {folder}"
    return f"{system.name}: {count} stage{'s' * (count > 1)} on {data}, {tokens}{given}"


def _mesh_words(mesh: Mesh) -> str:
    devices, (copies, split, tensor) = mesh.devices, mesh.devices.shape
    held = f"{copies} {'copy' if copies == 1 else 'copies'} of the state"
    held += f", split over {split * tensor} devices" * (split * tensor > 1)
    held += f", {tensor} of which share each example" * (tensor > 1)
    return f"{devices.size} x {devices.flat[0].device_kind}: {held}"


def _largest_parts(stage: Stage) -> str:
    """The network's parts by size; those under 1% are added up, and the frozen networks come last."""
    parts = sorted(stage.parts.items(), key=lambda part: -part[1])
    large = [(name, count) for name, count in parts if 100 * count >= stage.parameters]
    rest = stage.parameters - sum(count for _, count in large)
    parts = [*large, *([("the rest", rest)] if rest else []), *([("frozen", stage.frozen)] if stage.frozen else [])]
    return ", ".join(f"{name} {count:,}" for name, count in parts)


def _row(stage: Stage, mesh: Mesh, memory: int | None) -> tuple[str, ...]:
    recipe, parts = stage.recipe, batch_parts(mesh)
    micro = recipe.batch_size // recipe.optimizer.accumulation // parts
    return (
        stage.name,
        f"{stage.parameters:,}",
        f"{recipe.steps:,} x {recipe.batch_size:,}",
        f"{stage.forward:.2e}",
        f"{stage.training:.2e}",
        f"{stage.training * recipe.batch_size * recipe.steps:.2e}",
        _bytes(stage.state),
        _bytes(stage.activations * micro),
        "?" if memory is None else f"{stage.largest_batch(memory, parts):,}",
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _bytes(size: float) -> str:
    """4.0 MiB, as memory is sold."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
