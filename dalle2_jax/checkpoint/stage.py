"""Loading a stage without the code or the config that trained it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from dalle2_jax.checkpoint.files import CHECKSUMS, digest
from dalle2_jax.checkpoint.record import StageRecord, read_record
from dalle2_jax.checkpoint.store import checkpoint_path, load_part


@dataclass(frozen=True, repr=False)
class LoadedStage:
    """A trained stage: its network, its parameters, and what is recorded of it.

    `version` is a checksum of the checkpoint that was read, by which a later stage knows what it was built on.
    """

    module: nn.Module
    params: Any
    record: StageRecord
    version: str = ""

    def __repr__(self) -> str:
        return f"LoadedStage({self.name}: {self.kind}, {type(self.module).__name__})"

    @property
    def name(self) -> str:
        return self.record.stage

    @property
    def kind(self) -> str:
        return self.record.kind


def load_params(stage_dir: str | Path, ema: bool = True) -> Any:
    """The parameters of a stage, or their moving average, as a tree of numpy arrays; no optimizer state is read."""
    return load_part(stage_dir, _part_name(ema))[0]


def _part_name(ema: bool) -> str:
    return "ema" if ema else "params"


def load_stage(
    stage_dir: str | Path, ema: bool = True, *, module: nn.Module | None = None, allow: Iterable[str] = ()
) -> LoadedStage:
    """A stage from its folder alone; see `read_record` and `load_params` for what can be wrong with it.

    Args:
        ema: the moving average of the parameters rather than the parameters.
        module: the network, in place of the one that the folder records.
        allow: packages beside dalle2_jax whose classes may be made, for networks of your own: ("mypackage",).
    """
    directory = Path(stage_dir)
    record = read_record(directory)
    module = record.rebuilt("module", allow) if module is None else module
    params, step = load_part(directory, _part_name(ema))
    return LoadedStage(module, params, record, stage_version(directory, step))


def stage_version(stage_dir: str | Path, step: int) -> str:
    """What `LoadedStage.version` says of the checkpoint of one step, without reading its arrays."""
    return digest(checkpoint_path(stage_dir, step) / CHECKSUMS)
