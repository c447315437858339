"""Converted networks as a run's folder: what `DALLE2.load` reads like one of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dalle2_jax._version import __version__
from dalle2_jax.checkpoint import CheckpointWriter, StageRecord, write_record
from dalle2_jax.checkpoint.stage import stage_version
from dalle2_jax.files import folder_written_whole
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.precision import with_dtype
from dalle2_jax.weights.conversion import Conversion, settings_of
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors

WRITTEN_AT_ONCE = 256 * 2**20  # bytes, or the largest array's


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
    log: Callable[[str], None] = print,
    dtype: str = "float32",
) -> None:
    """Converts every stage and writes the run; the folder appears when it is whole.

    source: what the weights are ("name"), where they came "from" and their "licence", recorded in every stage.

    Raises:
        InputError: if the folder exists, a module cannot be built by its settings, or a table does not fit its
            tensors, before anything is written.
    """
    run = Path(run)
    for conversion in conversions:
        with settings_of(source.get("from", conversion.tensors.where)):
            shapes = conversion.shapes
        conversion.table.check(conversion.tensors, shapes)
    versions: dict[str, str] = {}
    with folder_written_whole(run) as partial:
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
                **conversion.record,
                built_on={kind: versions[kind] for kind in conversion.needs if kind in versions},
                source=source,
                versions={"dalle2-jax": __version__},
                finished=True,
                parameters=count_parameters(shape),
                steps=0,
            )
            write_record(directory, record)
            versions.setdefault(conversion.kind, stage_version(directory, 0))
            for line in conversion.parameter_counts():
                log(line)
    log(f"wrote {run}; licence of the weights: {source['licence']}")
