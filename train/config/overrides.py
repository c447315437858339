"""`decoder.optimizer.learning_rate=1e-4`: any field of a system, set on the command line by its path.

A path walks through the system's stages, dataclasses, Linen modules and dicts. Values are read by the field's
annotation, since Linen checks no types: int, float, bool (true/false), str, None, and tuples written `1,2,2`.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn

from dalle2_jax.errors import InputError, nearest
from dalle2_jax.layers.fields import field_names


def apply_overrides(system: Any, overrides: Sequence[str]) -> Any:
    """The system with every `path=value` set, the last of each path; fields that must fit each other change together.

    Raises:
        InputError: one sentence, if a path does not exist (naming the nearest that does) or a value has the wrong type.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise InputError(f"{override!r} is not an override; write path.to.field=value")
        *owners, name = path.split(".")
        place = changes
        for index, owner in enumerate(owners):
            place = place.setdefault(owner, {})
            if isinstance(place, str):
                raise InputError(f"{path!r} goes on past a value: {'.'.join(owners[: index + 1])!r} is {place!r}")
        place[name] = text
    return _apply(system, system, changes, "")


def _apply(root: Any, owner: Any, changes: dict[str, Any], before: str) -> Any:
    """`owner`, which stands at the path `before`, with a tree of changes made: texts for fields, dicts for owners."""
    children, values = _children(owner), {}
    for name, change in changes.items():
        path = before + name
        if name not in children:
            raise InputError(
                f"there is no field {_whole(path, change)!r}{_nearest(root, children, before, name, change)}"
            )
        value = children[name]
        if isinstance(change, str):
            values[name] = parse(change, _expected(owner, name, value), path)
        elif _children(value):
            values[name] = _apply(root, value, change, path + ".")
        else:
            raise InputError(f"{_whole(path, change)!r} goes on past a value: {path!r} is {value!r}")
    return _replace(owner, values)


def _whole(path: str, change: Any) -> str:
    """The path as it was written: with the names below it, of the first change there."""
    while isinstance(change, dict):
        name, change = next(iter(change.items()))
        path = f"{path}.{name}"
    return path


def _nearest(root: Any, children: dict[str, Any], before: str, name: str, change: Any) -> str:
    """A hint: the path with its wrong name put right, or else the most similar path of all."""
    near = nearest(name, children, cutoff=0.7)
    if near:
        return f"; did you mean {_whole(before + near, change)!r}?"
    path, paths = _whole(before + name, change), list(all_paths(root))
    close = nearest(path, paths, cutoff=0.5)
    return f"; did you mean {close!r}?" if close else f"; the nearest is {nearest(path, paths)!r}"


def _children(owner: Any) -> dict[str, Any]:
    """What a path can go on with; a system's stages also stand for themselves (`prior.steps`)."""
    if isinstance(owner, dict):
        return dict(owner)
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return {}
    attached = {field.name for field in dataclasses.fields(owner) if field.metadata.get("attached")}
    fields = {name: getattr(owner, name) for name in field_names(type(owner)) if name not in attached}
    return {**_stages(owner), **fields}


def _stages(owner: Any) -> dict[str, Any]:
    stages = getattr(owner, "stages", None)
    return stages if isinstance(stages, dict) else {}


def _replace(owner: Any, values: dict[str, Any]) -> Any:
    if isinstance(owner, dict):
        return {**owner, **values}
    fields = field_names(type(owner))
    stages = {name: value for name, value in values.items() if name not in fields}
    values = {name: value for name, value in values.items() if name in fields}
    if stages:
        values["stages"] = {**values.get("stages", _stages(owner)), **stages}
    if isinstance(owner, nn.Module):
        return owner.clone(**values)
    return dataclasses.replace(owner, **values)


def all_paths(owner: Any, prefix: str = "") -> Iterator[str]:
    """Every path that can be set, depth first."""
    for name, value in _children(owner).items():
        if name == "stages" and value is _stages(owner):
            continue
        path = f"{prefix}{name}"
        if _children(value):
            yield from all_paths(value, path + ".")
        else:
            yield path


def _expected(owner: Any, name: str, value: Any) -> Any:
    if isinstance(owner, dict):
        return type(value)
    try:
        return typing.get_type_hints(type(owner)).get(name, type(value))
    except (NameError, TypeError):
        return type(value)  # an annotation that cannot be resolved from outside its module


def parse(text: str, expected: Any, path: str) -> Any:
    """The value that `text` means for a field annotated `expected`.

    Raises:
        InputError: saying what is expected.
    """
    for choice in _choices(expected):
        found, value = _read(text, choice)
        if found:
            return value
    raise InputError(f"{path} takes {describe_type(expected)}, not {text!r}")


def _choices(expected: Any) -> tuple[Any, ...]:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        # None before str, which takes anything.
        return tuple(sorted(typing.get_args(expected), key=lambda choice: (choice is str, choice is not type(None))))
    return (expected,)


def _read(text: str, expected: Any) -> tuple[bool, Any]:
    nothing = (False, None)
    if expected is type(None):
        return (True, None) if text in ("None", "none", "null") else nothing
    if expected is bool:
        return {"true": (True, True), "false": (True, False)}.get(text.lower(), nothing)
    if expected is int:
        return _number(int, text.replace("_", "") if not text.startswith("_") else text)
    if expected is float:
        return _number(float, text)
    if expected is str:
        return True, text
    if expected is tuple or typing.get_origin(expected) is tuple:
        return _tuple(text, typing.get_args(expected))
    if typing.get_origin(expected) is typing.Literal:
        return (True, text) if text in typing.get_args(expected) else nothing
    return nothing


def _number(kind: type, text: str) -> tuple[bool, Any]:
    try:
        return True, kind(text)
    except ValueError:
        return False, None


def _tuple(text: str, items: tuple[Any, ...]) -> tuple[bool, Any]:
    texts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
    if not items:
        kinds: list[Any] = [int | float | str] * len(texts)
    elif len(items) == 2 and items[1] is Ellipsis:
        kinds = [items[0]] * len(texts)
    elif len(items) == len(texts):
        kinds = list(items)
    else:
        return False, None
    values = []
    for part, kind in zip(texts, kinds, strict=True):
        found = [value for choice in _choices(kind) for ok, value in [_read(part, choice)] if ok]
        if not found:
            return False, None
        values.append(found[0])
    return True, tuple(values)


def describe_type(expected: Any) -> str:
    """What a field takes, in words."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "values with commas between them",
        type(None): "None",
    }
    choices = _choices(expected)
    if len(choices) > 1:
        return " or ".join(describe_type(choice) for choice in sorted(choices, key=lambda c: c is type(None)))
    if expected in words:
        return words[expected]
    if typing.get_origin(expected) is tuple:
        items = typing.get_args(expected)
        if len(items) == 2 and items[1] is Ellipsis:
            return f"values with commas between them, each {describe_type(items[0])}"
        return f"{len(items)} values with commas between them"
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(expected)))
    return f"no value of its own: it is a {getattr(expected, '__name__', expected)}, set its fields"
