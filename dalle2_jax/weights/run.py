"""Converted networks as a run's folder: what `DALLE2.load` reads like one of our own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax._version import __version__
from dalle2_jax.checkpoint import CheckpointWriter, StageRecord, write_record
from dalle2_jax.checkpoint.stage import stage_version
from dalle2_jax.layers.precision import with_dtype
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError

WRITTEN_AT_ONCE = 256 * 2**20  # bytes, or the largest array's


@dataclass(frozen=True)
class Part:
    """Parameters that are counted together: those below `prefix`, or with "" all that no other part counts.

    published: how many the published network has; None: nobody says.
    """

    name: str
    prefix: str = ""
    published: int | None = None


@dataclass(frozen=True)
class Conversion:
    """One stage to be: our module, whose parameters `table` makes of `tensors`.

    inputs: shapes by which the module is built, the arguments of its `method`. info: what `stage.json` says beside
    the module: process, sampling, sizes, tokenizer. needs: kinds of stages that it was trained on. parts: how its
    parameters are told; () as one.
    """

    name: str
    kind: str
    module: nn.Module
    table: Table
    tensors: Tensors
    inputs: dict[str, jax.ShapeDtypeStruct]
    info: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    method: str = "__call__"
    parts: tuple[Part, ...] = ()

    @cached_property
    def shapes(self) -> Any:
        """Our parameters, as shapes."""

        def init(inputs: dict[str, jax.Array]) -> Any:
            return self.module.init(jax.random.key(0), **inputs, method=self.method)

        return jax.eval_shape(init, self.inputs)["params"]

    def told(self) -> list[str]:
        """A line a part: its parameters, and how many the published one has."""
        counts = {name: count(tree) for name, tree in self.shapes.items()}
        prefixes = {part.prefix for part in self.parts}
        lines = []
        for part in self.parts or (Part(self.name),):
            own = [name for name in counts if name == part.prefix or (not part.prefix and name not in prefixes)]
            line = f"{part.name}: {sum(counts[name] for name in own):,} parameters"
            lines.append(line + (f" (published: {part.published:,})" if part.published else ""))
        return lines


@contextmanager
def settings_of(where: str) -> Iterator[None]:
    """For reading the settings of `where` or building a network by them: what trips over them is a WeightsError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"the settings of {where} are not what they should be ({type(error).__name__}: {error}); is it the "
            "folder of another model?"
        ) from error


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An input's shape."""
    return jax.ShapeDtypeStruct(shape, dtype)


def count(tree: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def check_new(run: str | Path) -> Path:
    """Raises WeightsError if there is something at `run` already."""
    run = Path(run)
    if run.exists():
        raise WeightsError(f"{run} exists already; name a run to make")
    return run


def _on_host(table: Table, tensors: Tensors, shapes: Any, dtype: str) -> Any:
    """The converted parameters as jax arrays: of numpy's orbax makes two more copies, and all at once."""
    leaves, structure = jax.tree.flatten(table.convert(tensors, shapes, dtype))
    host = jax.local_devices(backend="cpu")[0]
    for place in range(len(leaves)):
        leaves[place] = jax.device_put(leaves[place], host).block_until_ready()
    return jax.tree.unflatten(structure, leaves)


def _written_at_once(params: Any) -> int:
    """Orbax refuses an array that is not below its limit."""
    return max(WRITTEN_AT_ONCE, *(leaf.nbytes + 1 for leaf in jax.tree.leaves(params)))


def write_run(
    run: str | Path,
    conversions: Sequence[Conversion],
    source: dict[str, str],
    say: Callable[[str], None] = print,
    dtype: str = "float32",
) -> None:
    """Converts every stage and writes the run; the folder appears when it is whole.

    source: what the weights are ("name"), where they came "from" and their "licence", recorded in every stage.

    Raises:
        WeightsError: if the folder exists, a module cannot be built by its settings, or a table does not fit its
            tensors, before anything is written.
    """
    run = check_new(run)
    for conversion in conversions:
        with settings_of(source.get("from", conversion.tensors.where)):
            shapes = conversion.shapes
        conversion.table.check(conversion.tensors, shapes)
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    versions: dict[str, str] = {}
    try:
        for conversion in conversions:
            shape = conversion.shapes
            directory = partial / conversion.name
            params = _on_host(conversion.table, conversion.tensors, shape, dtype)
            with CheckpointWriter(directory, write_bytes=_written_at_once(params)) as writer:
                writer.save(0, {"ema": params})
            del params
            record = StageRecord(
                stage=conversion.name,
                kind=conversion.kind,
                module=with_dtype(conversion.module, dtype),
                **conversion.info,
                built_on={kind: versions[kind] for kind in conversion.needs if kind in versions},
                source=source,
                versions={"dalle2-jax": __version__},
                finished=True,
                parameters=count(shape),
                steps=0,
            )
            write_record(directory, record)
            versions.setdefault(conversion.kind, stage_version(directory, 0))
            for line in conversion.told():
                say(line)
        partial.rename(run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"wrote {run}; licence of the weights: {source['licence']}")
