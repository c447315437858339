"""Whether a stage may go on in a folder: what it records is compared with what is about to be trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint import StageRecord, checkpoint_steps, read_record, with_defaults
from dalle2_jax.errors import InputError

# What may change between one start and the next; everything else makes it another stage.
CHANGEABLE = ("steps", "batch_size", "optimizer", "seed", "sampling", "training")
# What describes a start rather than the stage.
IGNORED = (
    "versions",
    "config",
    "seconds",
    "step",
    "finished",
    "parameters",
    "tokenizer",
    "measured",
    "init_from",
    "source",
)
# Where the data lies and how it is read, not what it is.
IGNORED_DATA = ("data_dir", "cache", "folder")


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(path, old value, new value) of the first place where two JSON values differ; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) == {"class", "fields"} == set(new) and old["class"] == new["class"]:
            return first_difference(old["fields"], new["fields"], path)
        for key in [*new, *(key for key in old if key not in new)]:
            where = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                return where, old.get(key, "absent"), new.get(key, "absent")
            found = first_difference(old[key], new[key], where)
            if found:
                return found
        return None
    # 1 and 1.0 are one value here, True and 1 are not.
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return None if same else (path, old, new)


def check_resumable(stage_dir: Path, record: StageRecord, log: Callable[[str], None]) -> None:
    """Lets a stage go on in a folder that holds the same one; logs what has changed harmlessly.

    Raises:
        InputError: one sentence with the first difference, if the folder's checkpoints are of another architecture,
            process, data or earlier stage.
    """
    if not checkpoint_steps(stage_dir):
        return
    recorded, new = read_record(stage_dir).values(), record.values()
    old = {key: with_defaults(value) for key, value in recorded.items() if key not in IGNORED}
    difference = first_difference(_identity(old), _identity(new))
    if difference:
        path, before, now = difference
        if path.startswith("built_on."):
            raise InputError(
                f"{stage_dir} was trained on another {path.split('.')[1]} than the one that is there now: "
                "delete the folder to train the stage anew, or choose another --run"
            )
        raise InputError(
            f"{stage_dir} holds another stage: {path} is {_short(before)} there and {_short(now)} here; "
            "choose another --run, or delete the folder"
        )
    for key in CHANGEABLE:
        changed = first_difference(old.get(key), new.get(key), key)
        if changed:
            log(f"changed since the last start: {changed[0]} was {_short(changed[1])} and is {_short(changed[2])}")


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """What makes the stage what it is."""
    result = {key: value for key, value in values.items() if key not in (*CHANGEABLE, *IGNORED)}
    # Timesteps that are sampled by their losses come with a history of these, which a checkpoint has or has not.
    result["training"] = {"timesteps": (values.get("training") or {}).get("timesteps")}
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("fields"), dict):
        fields = {name: value for name, value in data["fields"].items() if name not in IGNORED_DATA}
        result["data"] = {**data, "fields": fields}
    return result


def _short(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"class", "fields"}:
        return str(value["class"]).rpartition(".")[2]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
