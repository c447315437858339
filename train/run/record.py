"""What is recorded of a stage before it is trained, by which libraries, and from whose weights."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint import StageFolder, StageRecord
from train.config.recipe import Recipe


def stage_record(recipe: Recipe, stage_name: str, info: Mapping[str, Any] | None = None) -> StageRecord:
    """What is recorded of a stage before it is trained; info: other entries of the record."""
    values = {
        "stage": stage_name,
        **recipe.describe(),
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "optimizer": {name: getattr(recipe.optimizer, name) for name in recipe.optimizer.__dataclass_fields__},
        "seed": recipe.seed,
        **(info or {}),
    }
    return StageRecord.of(values)


Log = Callable[[str], None]


def versions() -> dict[str, str]:
    """The versions of what trained a stage."""
    names = ("dalle2-jax", "jax", "flax", "optax", "orbax-checkpoint")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_of(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Whose public weights a stage goes back to, and their licence, as it or the one it starts from records it."""
    for stage in (StageFolder(folder) for folder in (directory, recipe.init_from) if folder is not None):
        if stage.exists and stage.record.source:
            return {"source": stage.record.source}
    return {}
