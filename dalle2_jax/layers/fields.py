"""The fields of a module: a Linen module is its own config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

# Linen's own bookkeeping, which is not part of what a module is.
_LINEN_FIELDS = ("parent", "name")


def field_names(cls: type) -> tuple[str, ...]:
    """The names of a dataclass's own constructor fields, without Linen's `parent` and `name`."""
    hidden = _LINEN_FIELDS if issubclass(cls, nn.Module) else ()
    return tuple(field.name for field in dataclasses.fields(cls) if field.init and field.name not in hidden)


def module_fields(module: nn.Module, path: str) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(path, field, value) of every field of a network and of the networks among its fields.

    A field of whole numbers that may be 0 says so: `dataclasses.field(default=4, metadata={"minimum": 0})`.
    """
    if not isinstance(module, nn.Module):
        return
    names = field_names(type(module))
    for field in dataclasses.fields(module):
        value, where = getattr(module, field.name), f"{path}.{field.name}"
        if isinstance(value, nn.Module) and field.name in names:
            yield from module_fields(value, where)
        elif field.name in names:
            yield where, field, value


def with_fields(module: nn.Module, **values: Any) -> nn.Module:
    """The network with these values in the fields of these names, in itself and in the networks among its fields."""
    changes: dict[str, Any] = {}
    for name in field_names(type(module)):
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            changes[name] = with_fields(value, **values)
        elif name in values:
            changes[name] = values[name]
    return module.clone(**changes)


def without_remat(module: nn.Module) -> nn.Module:
    """The network with the field `remat` False in itself and in the networks among its fields."""
    return with_fields(module, remat=False)


def count_parameters(tree: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
