"""A few lines to read about a trained stage, from its folder alone and without loading its parameters."""

from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.files import CHECKSUMS
from dalle2_jax.checkpoint.record import StageRecord, read_record
from dalle2_jax.checkpoint.store import SET_ASIDE, STEP, checkpoint_path, checkpoint_steps

_WIDTH = 100  # of a line of fields, before it is broken
_INDENT = 15  # of what follows a line's title


def describe_stage(stage_dir: str | Path) -> str:
    """What a stage is and how far it is trained: network, process, data, versions, checkpoints, size on disk.

    Raises:
        CheckpointError: if the folder is not a stage's (see `read_record`).
    """
    directory = Path(stage_dir)
    record = read_record(directory)
    facts = {
        "parameters": None if record.parameters is None else f"{record.parameters:,}",
        "images": _sizes(record),
        "module": _compact(record.module),
        "process": _compact(record.process),
        "sampling": _compact(record.sampling),
        "data": _compact(record.data),
        "trained with": _training(record),
        "source": _items(record.source),
        "versions": _items(record.versions),
        "checkpoints": _checkpoints(directory),
        "on disk": _size(directory),
    }
    lines = [f"{record.stage} ({record.kind}): {_progress(record)}"]
    for title, text in facts.items():
        lines.extend(_wrap(title, text) if text else ())
    return "\n".join(lines)


def _progress(record: StageRecord) -> str:
    state = "finished" if record.finished else "not finished"
    if record.steps is None:
        return state
    took = "" if record.seconds is None else f", {record.seconds:.0f} s"
    return f"{state}, {record.step:,} of {record.steps:,} steps{took}"


def _sizes(record: StageRecord) -> str | None:
    if record.image_size is None:
        return None
    return f"{record.image_size} px" if record.low_size is None else f"{record.low_size} px to {record.image_size} px"


def _training(record: StageRecord) -> str:
    parts = [] if record.batch_size is None else [f"batches of {record.batch_size}"]
    parts += [] if record.seed is None else [f"seed {record.seed}"]
    rate = record.optimizer.get("learning_rate")
    parts += [f"learning rate {rate:g}"] if isinstance(rate, int | float) else []
    return ", ".join(parts)


def _checkpoints(directory: Path) -> str:
    found = [f"step {step} ({_size(checkpoint_path(directory, step))})" for step in checkpoint_steps(directory)]
    parent = directory / "checkpoints"
    others = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    found += [f"{name} (set aside)" for name in others if SET_ASIDE.fullmatch(name)]
    found += [f"step {name} (unfinished)" for name in others if STEP.fullmatch(name) and not _whole(parent / name)]
    return ", ".join(found) or "none"


def _whole(path: Path) -> bool:
    return (path / CHECKSUMS).is_file()


def _size(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def _compact(value: Any) -> str:
    """`Class(field=value, ...)` of what `to_json` wrote, without the fields that are None."""
    if isinstance(value, dict) and set(value) == {"class", "fields"}:
        fields = ", ".join(f"{name}={_compact(item)}" for name, item in value["fields"].items() if item is not None)
        return f"{str(value['class']).rpartition('.')[2]}({fields})"
    if isinstance(value, list):
        return f"({', '.join(_compact(item) for item in value)})"
    if isinstance(value, dict):
        return f"{{{_items(value)}}}"
    return "" if value is None else str(value)


def _items(value: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {_compact(item)}" for name, item in (value or {}).items())


def _wrap(title: str, text: str) -> list[str]:
    words, lines = text.split(" "), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 1 > _WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    first = f"  {title}".ljust(_INDENT)
    return [first + lines[0], *(" " * _INDENT + line for line in lines[1:])]
