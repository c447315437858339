"""Modules and dataclasses to JSON and back: how a stage's folder records an architecture.

A Linen module is a frozen dataclass whose fields are its hyper-parameters, so `{"class": ..., "fields": {...}}` says
all of it. `rebuild(to_json(module)) == module`, also after a trip through a JSON file, where tuples become lists.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterable
from typing import Any

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.errors import InputError, nearest
from dalle2_jax.layers.fields import field_names

PACKAGE = "dalle2_jax"


def to_json(value: Any, where: str = "value") -> Any:
    """JSON for a module, a dataclass, or containers and plain values of them; tuples become lists.

    Raises:
        CheckpointError: for a value that JSON cannot hold, naming its field.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {name: to_json(getattr(value, name), f"{where}.{name}") for name in field_names(cls)}
        return {"class": public_path(cls), "fields": fields}
    raise CheckpointError(f"{where} is a {type(value).__name__}, which a stage's folder cannot record")


def public_path(cls: type) -> str:
    """Where a class is imported from: the outermost package of its module that has it by its name.

    So a class keeps its path when its file is moved: `dalle2_jax.decoder.Decoder`.
    """
    parts = cls.__module__.split(".")
    packages = (".".join(parts[: end + 1]) for end in range(len(parts)))
    public = (name for name in packages if vars(sys.modules.get(name, object)).get(cls.__qualname__) is cls)
    return f"{next(public, cls.__module__)}.{cls.__qualname__}"


def rebuild(data: Any, allow: Iterable[str] = ()) -> Any:
    """The object that `to_json` wrote; lists become tuples, dicts that name no class stay dicts.

    Only classes inside dalle2_jax are made, so that a stage's folder from elsewhere cannot run foreign code.

    Args:
        allow: other packages or modules whose classes may be made, such as ("mypackage",).

    Raises:
        CheckpointError: for a class or a field that this version does not have, or a package that is not allowed,
            naming it.
    """
    allow = tuple(allow)
    if isinstance(data, list | tuple):
        return tuple(rebuild(item, allow) for item in data)
    if not isinstance(data, dict):
        return data
    if set(data) != {"class", "fields"}:
        return {key: rebuild(item, allow) for key, item in data.items()}
    cls = _find_class(str(data["class"]), (PACKAGE, *allow))
    known = field_names(cls)
    for name in data["fields"]:
        if name not in known:
            near = nearest(name, known, cutoff=0.6)
            hint = f" (the nearest is {near!r})" if near else ""
            version = f"this version of {_top(data['class'])}"
            raise CheckpointError(f"{data['class']} has no field {name!r} in {version}{hint}")
    fields = {name: rebuild(item, allow) for name, item in data["fields"].items()}
    try:
        return cls(**fields)
    except TypeError as error:
        raise CheckpointError(f"{data['class']} cannot be made from its recorded fields: {error}") from error


def with_defaults(data: Any) -> Any:
    """What `to_json` wrote, with the fields that its classes have had since then, at their defaults.

    A default stands for what was done before there was the field. What this version cannot make stays as it is.
    """
    try:
        return to_json(rebuild(data))
    except InputError:
        return data


def _find_class(path: str, packages: Iterable[str]) -> type:
    module_name, _, class_name = path.rpartition(".")
    if not any(module_name == package or module_name.startswith(package + ".") for package in packages):
        raise CheckpointError(
            f"the class {path!r} is not part of dalle2_jax, and no other class is loaded from a stage's folder unless "
            f"it is allowed: load_stage(..., allow=({_top(path)!r},))"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(str(error.name)):
            raise
        raise CheckpointError(
            f"this version of {_top(path)} has no module {module_name!r} (for the class {path!r})"
        ) from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise CheckpointError(f"this version of {_top(path)} has no class {path!r}")
    return cls


def _top(path: str) -> str:
    return path.partition(".")[0]
