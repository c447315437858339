"""Modules and dataclasses to JSON and back: how a stage's folder records an architecture.

A Linen module is a frozen dataclass whose fields are its hyper-parameters, so `{"class": ..., "fields": {...}}` says
all of it. `rebuild(to_json(module)) == module`, also after a trip through a JSON file, where tuples become lists.
"""

import dataclasses
import difflib
import importlib
from typing import Any

import flax.linen as nn

from dalle2_jax.checkpoint.errors import CheckpointError

PACKAGE = "dalle2_jax"

# Linen's own bookkeeping, which is not part of what a module is.
_LINEN_FIELDS = ("parent", "name")


def to_json(value: Any) -> Any:
    """JSON for a module, a dataclass, or containers and plain values of them; tuples become lists.

    Raises:
        CheckpointError: for a value that JSON cannot hold, naming its field.
    """
    return _to_json(value, "value")


def _to_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {str(key): _to_json(item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {name: _to_json(getattr(value, name), f"{where}.{name}") for name in field_names(cls)}
        return {"class": f"{cls.__module__}.{cls.__qualname__}", "fields": fields}
    raise CheckpointError(f"{where} is a {type(value).__name__}, which a stage's folder cannot record")


def field_names(cls: type) -> tuple[str, ...]:
    """The names of a dataclass's own constructor fields, without Linen's `parent` and `name`."""
    hidden = _LINEN_FIELDS if issubclass(cls, nn.Module) else ()
    return tuple(field.name for field in dataclasses.fields(cls) if field.init and field.name not in hidden)


def rebuild(data: Any) -> Any:
    """The object that `to_json` wrote; lists become tuples, dicts that name no class stay dicts.

    Only classes inside dalle2_jax are made, so that a stage's folder from elsewhere cannot run foreign code.

    Raises:
        CheckpointError: for a class or a field that this version does not have, naming it.
    """
    if isinstance(data, list | tuple):
        return tuple(rebuild(item) for item in data)
    if not isinstance(data, dict):
        return data
    if set(data) != {"class", "fields"}:
        return {key: rebuild(item) for key, item in data.items()}
    cls = _find_class(data["class"])
    known = field_names(cls)
    for name in data["fields"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (the nearest is {near[0]!r})" if near else ""
            raise CheckpointError(f"{data['class']} has no field {name!r} in this version of dalle2_jax{hint}")
    fields = {name: rebuild(item) for name, item in data["fields"].items()}
    try:
        return cls(**fields)
    except TypeError as error:
        raise CheckpointError(f"{data['class']} cannot be made from its recorded fields: {error}") from error


def _find_class(path: Any) -> type:
    module_name, _, class_name = str(path).rpartition(".")
    if module_name != PACKAGE and not module_name.startswith(PACKAGE + "."):
        raise CheckpointError(
            f"the class {path!r} is not part of dalle2_jax, and no other class is loaded from a stage's folder"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith(PACKAGE):
            raise
        raise CheckpointError(
            f"this version of dalle2_jax has no module {module_name!r} (for the class {path!r})"
        ) from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise CheckpointError(f"this version of dalle2_jax has no class {path!r}")
    return cls
