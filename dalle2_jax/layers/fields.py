"""The fields of a module: a Linen module is its own config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

# Linen's own bookkeeping, which is not part of what a module is.
_LINEN_FIELDS = ("parent", "name")


def field_names(cls: type) -> tuple[str, ...]:
    """The names of a dataclass's own constructor fields, without Linen's `parent` and `name`."""
    hidden = _LINEN_FIELDS if issubclass(cls, nn.Module) else ()
    return tuple(field.name for field in dataclasses.fields(cls) if field.init and field.name not in hidden)


def module_fields(module: nn.Module, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path, name, value) of every field of a network and of the networks among its fields."""
    for name in field_names(type(module)) if isinstance(module, nn.Module) else ():
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            yield from module_fields(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", name, value


def without_remat(module: nn.Module) -> nn.Module:
    """The network with the field `remat` False in itself and in the networks among its fields."""
    changes: dict[str, Any] = {}
    for name in field_names(type(module)):
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            changes[name] = without_remat(value)
        elif name == "remat":
            changes[name] = False
    return module.clone(**changes)
