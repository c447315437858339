"""`stage.json`: what a trained stage is, as a typed record. It is read and written here alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.checkpoint.files import read_json
from dalle2_jax.checkpoint.rebuild import rebuild, to_json
from dalle2_jax.files import write_atomically

STAGE_FILE = "stage.json"
FORMAT = 1

Json = Any


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What is recorded of a stage; None or an empty dict where it is not.

    Modules and dataclasses become JSON as soon as they are given (`to_json`), so that records compare as their files
    do; `rebuilt` makes the objects again.

    Fields:
      stage: its name. kind: what it does in a run, one of `KINDS` (`checkpoint.run`) or a kind of the user's own.
      module, process, sampling: the network, and how it is trained and sampled.
      training: what else a recipe says of its training, by name.
      image_size: the side of the images it makes. low_size: of those an upsampler is given.
      data, tokenizer: what it was trained on; the tokenizer as its own JSON text.
      config: name, text, arguments and overrides of the config.
      init_from: the folder of the stage whose parameters it started from.
      source: whose public weights it goes back to: "name", "from", "licence".
      built_on: versions of the earlier stages by kind.
      versions: of the libraries.
      steps, batch_size, optimizer, seed: how it is trained. step, seconds, finished: how far it is.
      parameters: how many. measured: what was measured of the network when its training ended.
      extra: what a recipe's `describe` says beside all of these.
    """

    stage: str
    kind: str
    module: Json
    process: Json = None
    sampling: Json = None
    training: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    low_size: int | None = None
    data: Json = None
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    source: dict[str, str] = field(default_factory=dict)
    built_on: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    batch_size: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    step: int = 0
    seconds: float | None = None
    finished: bool = False
    parameters: int | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, to_json(getattr(self, entry.name), entry.name))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StageRecord:
        """The record of these values by name; names that it does not know go to `extra`."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(
            **{name: value for name, value in values.items() if name in known and name != "extra"},
            extra={**values.get("extra", {}), **extra},
        )

    def values(self) -> dict[str, Json]:
        """What is recorded, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in (None, {})}

    def rebuilt(self, name: str, allow: Iterable[str] = ()) -> Any:
        """An entry as the object it records: `record.rebuilt("process")` is a Process.

        allow: packages beside dalle2_jax whose classes may be made.

        Raises:
            CheckpointError: if the stage records none, or one that this version cannot make.
        """
        value = getattr(self, name)
        if value is None:
            raise CheckpointError(f"the stage {self.stage!r} records no {name!r}")
        return rebuild(value, allow)


def write_record(stage_dir: str | Path, record: StageRecord) -> None:
    """Writes `stage.json` whole or not at all."""
    text = json.dumps({"format": FORMAT, **record.values()}, indent=2, ensure_ascii=False)
    write_atomically(Path(stage_dir) / STAGE_FILE, text + "\n")


def has_record(stage_dir: str | Path) -> bool:
    """Whether the folder is a stage's."""
    return (Path(stage_dir) / STAGE_FILE).is_file()


def read_record(stage_dir: str | Path) -> StageRecord:
    """What a stage's folder records.

    Raises:
        CheckpointError: if the folder is not a stage's, or the file is damaged or of a later format.
    """
    directory = Path(stage_dir)
    if not has_record(directory):
        raise CheckpointError(f"{directory} is not a stage's folder: it has no {STAGE_FILE}")
    values = read_json(directory / STAGE_FILE)
    if not isinstance(values, dict) or not isinstance(values.get("format"), int):
        raise CheckpointError(f"{directory / STAGE_FILE} is damaged: it names no format")
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"{directory} was written by a later version of dalle2_jax (format {values['format']}): update it"
        )
    for name in ("kind", "module"):
        if name not in values:
            raise CheckpointError(f"{directory / STAGE_FILE} does not say the stage's {name}")
    del values["format"]
    return StageRecord.of({"stage": directory.name, **values})
