"""A few lines to read about a trained stage, from its folder alone and without loading its parameters."""

from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.files import CHECKSUMS
from dalle2_jax.checkpoint.stage import read_stage
from dalle2_jax.checkpoint.store import checkpoint_path, checkpoint_steps

_WIDTH = 100  # of a line of fields, before it is broken
_INDENT = 15  # of what follows a line's title


def describe_stage(stage_dir: str | Path) -> str:
    """What a stage is and how far it is trained: network, process, data, versions, checkpoints, size on disk.

    Raises:
        CheckpointError: if the folder is not a stage's (see `read_stage`).
    """
    directory = Path(stage_dir)
    info = read_stage(directory)
    lines = [f"{info.get('stage', directory.name)} ({info.get('kind', 'of no known kind')}): {_progress(info)}"]

    def say(title: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            lines.extend(_wrap(title, str(value)))

    say("parameters", f"{info['parameters']:,}" if isinstance(info.get("parameters"), int) else None)
    say("pictures", _sizes(info))
    say("module", _compact(info.get("module")))
    say("process", _compact(info.get("process")))
    say("sampling", _compact(info.get("sampling")))
    say("data", _compact(info.get("data")))
    say("trained with", _training(info))
    say("source", _items(info.get("source")))
    say("versions", _items(info.get("versions")))
    say("checkpoints", _checkpoints(directory))
    say("on disk", _size(directory))
    return "\n".join(lines)


def _progress(info: dict[str, Any]) -> str:
    if "steps" not in info:
        return "finished" if info.get("finished") else "not finished"
    state = "finished" if info.get("finished") else "not finished"
    seconds = info.get("seconds")
    took = f", {seconds:.0f} s" if isinstance(seconds, int | float) else ""
    return f"{state}, {info.get('step', 0):,} of {info['steps']:,} steps{took}"


def _sizes(info: dict[str, Any]) -> str | None:
    size, low = info.get("image_size"), info.get("low_size")
    if size is None:
        return None
    return f"{size} px" if low is None else f"{low} px to {size} px"


def _training(info: dict[str, Any]) -> str | None:
    parts = [f"batches of {info['batch_size']}"] if "batch_size" in info else []
    parts += [f"seed {info['seed']}"] if "seed" in info else []
    rate = (info.get("optimizer") or {}).get("learning_rate")
    parts += [f"learning rate {rate:g}"] if isinstance(rate, int | float) else []
    return ", ".join(parts)


def _checkpoints(directory: Path) -> str:
    found = [f"step {step} ({_size(checkpoint_path(directory, step))})" for step in checkpoint_steps(directory)]
    parent = directory / "checkpoints"
    others = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    found += [f"{name} (set aside)" for name in others if name.endswith(".damaged")]
    found += [f"step {name} (unfinished)" for name in others if name.isdigit() and not _whole(parent / name)]
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
