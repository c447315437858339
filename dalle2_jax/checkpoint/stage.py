"""`stage.json`: what a trained stage is; and loading a stage without the code or the config that trained it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.checkpoint.files import CHECKSUMS, digest, read_json, write_atomically
from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.checkpoint.store import checkpoint_path, load_part

STAGE_FILE = "stage.json"
FORMAT = 1


@dataclass(frozen=True)
class LoadedStage:
    """A trained stage: its network, its parameters, and all that `stage.json` says of it (JSON).

    `version` is a checksum of the checkpoint that was read, by which a later stage knows what it was built on.
    """

    name: str
    kind: str
    module: nn.Module
    params: Any
    info: dict[str, Any]
    version: str = ""

    def part(self, name: str) -> Any:
        """An entry of `info` as the object it records: `stage.part("process")` is a Process."""
        if name not in self.info:
            raise CheckpointError(f"the stage {self.name!r} records no {name!r}")
        return rebuild(self.info[name])


def write_stage(stage_dir: str | Path, info: dict[str, Any]) -> None:
    """Writes `stage.json` whole or not at all; modules and dataclasses among the values become JSON (`to_json`)."""
    text = json.dumps({"format": FORMAT, **to_json(info)}, indent=2, ensure_ascii=False)
    write_atomically(Path(stage_dir) / STAGE_FILE, text + "\n")


def read_stage(stage_dir: str | Path) -> dict[str, Any]:
    """The contents of `stage.json`.

    Raises:
        CheckpointError: if the folder is not a stage's, or the file is damaged or of a later format.
    """
    directory = Path(stage_dir)
    if not (directory / STAGE_FILE).is_file():
        raise CheckpointError(f"{directory} is not a stage's folder: it has no {STAGE_FILE}")
    info = read_json(directory / STAGE_FILE)
    if not isinstance(info, dict) or not isinstance(info.get("format"), int):
        raise CheckpointError(f"{directory / STAGE_FILE} is damaged: it names no format")
    if info["format"] > FORMAT:
        raise CheckpointError(
            f"{directory} was written by a later version of dalle2_jax (format {info['format']}): update it"
        )
    return info


def load_params(stage_dir: str | Path, ema: bool = True) -> Any:
    """The parameters of a stage, or their moving average, as a tree of numpy arrays; no optimizer state is read."""
    return load_part(stage_dir, _part_name(ema))[0]


def _part_name(ema: bool) -> str:
    return "ema" if ema else "params"


def load_stage(stage_dir: str | Path, ema: bool = True) -> LoadedStage:
    """A stage from its folder alone; see `read_stage` and `load_params` for what can be wrong with it."""
    directory = Path(stage_dir)
    info = read_stage(directory)
    missing = [key for key in ("kind", "module") if key not in info]
    if missing:
        raise CheckpointError(f"{directory / STAGE_FILE} does not say the stage's {missing[0]}")
    module = rebuild(info["module"])
    params, step = load_part(directory, _part_name(ema))
    version = stage_version(directory, step)
    return LoadedStage(info.get("stage", directory.name), info["kind"], module, params, info, version)


def stage_version(stage_dir: str | Path, step: int) -> str:
    """What `LoadedStage.version` says of the checkpoint of one step, without reading its arrays."""
    return digest(checkpoint_path(stage_dir, step) / CHECKSUMS)
