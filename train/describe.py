"""What a system is and what it would take: parameters, FLOPs and memory of every stage, from shapes alone."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax.sharding import DEFAULT_RULES, check_batch, make_mesh, partition
from train.cascade import lower_step, plan_stage
from train.flops import count_flops
from train.given import planned_given
from train.metrics import duration
from train.state import abstract_state, make_step
from train.system import Recipe, System
from train.topology import compiled_memory, topology_mesh

HEADER = ("stage", "parameters", "frozen", "steps x batch", "FLOPs a step", "all steps", "state a device")
NOTE = (
    "\nFLOPs are an estimate: matrix products and convolutions of one training step over the whole batch, with what\n"
    "remat computes again. The state is what lasts through a step, and the gradients; activations come on top"
)
HOW_TO_COMPILE = ", and\n`--topology v5e:4x4` finds them by compiling for that many TPU chips."


@dataclass(frozen=True)
class Stage:
    """A stage's figures. `parts`: parameters by the network's part; `memory`: bytes a device by what they hold."""

    name: str
    recipe: Recipe
    parts: Mapping[str, int]
    frozen: int
    flops: int
    memory: Mapping[str, int]
    lowered: jax.stages.Lowered

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


def describe(system: System, topology: str | None = None, fsdp: int | None = None) -> int:
    """Prints a table of the stages; with `topology` (as v5e:4x4) also compiles each one's training step for it.

    fsdp: over how many devices parameters are split; None: all of a topology's, one of this machine's.
    Returns the exit code: 0, 1 if a stage does not fit the topology's memory, 2 if a stage is refused.

    Raises:
        ValueError: if the topology is wrong or cannot be compiled for, or the mesh does not fit the devices.
    """
    mesh = make_mesh(fsdp=1 if fsdp is None else fsdp) if topology is None else topology_mesh(topology, fsdp)
    print(f"{_title(system)}\non {_mesh_words(mesh)}\n", flush=True)
    stages, refused = examine(system, mesh)
    if stages:
        print(_table([HEADER, *(_row(stage) for stage in stages)]) + "\n")
    for stage in stages:
        memory = ", ".join(f"{name} {_bytes(size)}" for name, size in stage.memory.items())
        print(f"{stage.name}: {_largest_parts(stage)}\n  a device holds: {memory}")
    for name, reason in refused.items():
        print(f"{name}: refused: {reason}")
    print(NOTE + ("." if topology else HOW_TO_COMPILE))
    fits = [_print_compiled(stage) for stage in stages] if topology else []
    return 2 if refused else 0 if all(fits) else 1


def examine(system: System, mesh: Mesh) -> tuple[list[Stage], dict[str, str]]:
    """Every stage that can be built and lowered on `mesh`, and the reason for each one that is refused.

    Raises:
        ValueError: if a stage that the system is given is missing.
    """
    stages: list[Stage] = []
    refused: dict[str, str] = {}
    planned = planned_given(system)
    for name, recipe in system.stages.items():
        try:
            recipe, frozen, _ = plan_stage(name, recipe, planned)
            check_batch(recipe.batch_size, mesh, recipe.optimizer.accumulation)
            stages.append(_stage(system, name, recipe, abstract_state(recipe, mesh), frozen, mesh))
        except ValueError as error:
            refused[name] = str(error).strip().splitlines()[0]
    return stages, refused


def _stage(system: System, name: str, recipe: Recipe, abstract: Any, frozen: Any, mesh: Mesh) -> Stage:
    lowered = lower_step(system, recipe, abstract, frozen, mesh)
    arguments = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), lowered.args_info[0])
    placed = partition(frozen, mesh, DEFAULT_RULES)
    gradients = device_bytes(abstract["params"])
    if recipe.optimizer.accumulation > 1:  # their sum is float32 beside the micro-batch's own
        gradients += sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract["params"]))
    memory = {
        "parameters": device_bytes(abstract["params"]),
        "average": device_bytes(abstract["ema"]),
        "optimizer": device_bytes(abstract["optimizer"]),
        "gradients": gradients,
        "frozen": device_bytes(frozen, placed),
    }
    return Stage(
        name=name,
        recipe=recipe,
        parts={part: _count(tree) for part, tree in abstract["params"].items()},
        frozen=_count(frozen),
        flops=count_flops(make_step(recipe, mesh, abstract).trace(*arguments).jaxpr),
        memory=memory,
        lowered=lowered,
    )


def device_bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes that one device holds of a tree of shapes, by its shardings or those given beside it."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(parts))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _print_compiled(stage: Stage) -> bool:
    """Compiles a stage's step and prints what it needs; False if it does not fit."""
    print(f"\n{stage.name}: compiling", flush=True)
    start = time.monotonic()
    memory = compiled_memory(stage.lowered)
    if isinstance(memory, str):
        print(f"  does not fit: {memory}")
        return False
    needs = ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items())
    print(f"  fits; a device needs: {needs} (compiled in {duration(time.monotonic() - start)})")
    return True


def _title(system: System) -> str:
    data = system.data.name + (f"/{system.data.config}" if system.data.config else "")
    tokens = f"a vocabulary of {system.vocabulary_size:,}, captions of up to {system.context_length} tokens"
    count = len(system.stages)
    given = ""
    for name, folder in system.given.items():
        given += f"\ngiven{' until it is trained' * (name in system.stages)}: {name}, that of {folder}"
    return f"{system.name}: {count} stage{'s' * (count > 1)} on {data}, {tokens}{given}"


def _mesh_words(mesh: Mesh) -> str:
    devices, copies, split = mesh.devices, mesh.shape["data"], mesh.shape["fsdp"]
    held = f"{copies} {'copy' if copies == 1 else 'copies'} of the state"
    return f"{devices.size} x {devices.flat[0].device_kind}: {held}" + (f", split over {split} devices" * (split > 1))


def _largest_parts(stage: Stage) -> str:
    """The network's parts by size; those under 1% are added up."""
    parts = sorted(stage.parts.items(), key=lambda part: -part[1])
    large = [(name, count) for name, count in parts if 100 * count >= stage.parameters]
    rest = stage.parameters - sum(count for _, count in large)
    return ", ".join(f"{name} {count:,}" for name, count in [*large, *([("the rest", rest)] if rest else [])])


def _row(stage: Stage) -> tuple[str, ...]:
    recipe = stage.recipe
    return (
        stage.name,
        f"{stage.parameters:,}",
        f"{stage.frozen:,}" if stage.frozen else "-",
        f"{recipe.steps:,} x {recipe.batch_size:,}",
        f"{stage.flops:.2e}",
        f"{stage.flops * recipe.steps:.2e}",
        _bytes(sum(stage.memory.values())),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _bytes(size: int) -> str:
    """4.0 MiB, as memory is sold."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
