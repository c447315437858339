"""Partition rules: how each parameter is split over the mesh, by its path."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import InputError
from dalle2_jax.sharding.mesh import replicate


@dataclass(frozen=True)
class Tensor:
    """The rule that splits `axis` over the mesh's `tensor`, and the largest other axis over `fsdp`."""

    axis: int


Rules = tuple[tuple[str, str | Tensor | PartitionSpec], ...]

# Of a transformer's block (arXiv 1909.08053, Sec. 3): heads and hidden units are split, and what they give is summed.
DEFAULT_RULES: Rules = (
    (r"block(s|_\d+)?/(attention/qkv|cross_attention/key_value)/(kernel|bias)$", Tensor(-3)),
    (r"block(s|_\d+)?/cross_attention/query/(kernel|bias)$", Tensor(-2)),
    (r"block(s|_\d+)?/(cross_)?attention/out/kernel$", Tensor(-2)),
    (r"block(s|_\d+)?/mlp_in/(kernel|bias)$", Tensor(-1)),
    (r"block(s|_\d+)?/mlp_out/kernel$", Tensor(-2)),
    (r".*", "fsdp"),
)

# Below this many elements a split parameter costs more in communication than it saves in memory.
SMALLEST_SPLIT = 2**16


def path_name(path: tuple[Any, ...]) -> str:
    """`decoder/blocks/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES, smallest: int = SMALLEST_SPLIT) -> Any:
    """One NamedSharding for each leaf of `tree` (arrays or their shapes), by the first rule whose pattern its path
    holds.

    A rule is (regular expression, what to do): `"replicated"`, `"fsdp"` (split the largest axis that the mesh's fsdp
    size divides; leaves with fewer than `smallest` elements, or without such an axis, are replicated), `Tensor(axis)`,
    or a PartitionSpec. A leaf that no rule matches is replicated. Optimizer moments carry their parameter's path and so
    follow its rule.

    Raises:
        InputError: if a rule is unknown, an axis does not divide over `tensor`, or a PartitionSpec names an axis that
            the mesh lacks or does not fit the shape.
    """
    compiled = [(re.compile(pattern), rule) for pattern, rule in rules]

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((rule for pattern, rule in compiled if pattern.search(name)), "replicated")
        if isinstance(rule, PartitionSpec):
            _check_spec(name, leaf.shape, rule, mesh)
            return NamedSharding(mesh, rule)
        if isinstance(rule, Tensor):
            return NamedSharding(mesh, _tensor_spec(name, leaf.shape, rule.axis, mesh, smallest))
        if rule == "fsdp":
            return NamedSharding(mesh, PartitionSpec(*_trimmed(_fsdp_axes(leaf.shape, mesh, smallest))))
        if rule == "replicated":
            return replicate(mesh)
        raise InputError(f"the partition rule {rule!r} is neither 'replicated', 'fsdp', a Tensor nor a PartitionSpec")

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def _fsdp_axes(shape: tuple[int, ...], mesh: Mesh, smallest: int, taken: int | None = None) -> list[str | None]:
    """The mesh axis of each axis: "fsdp" for the largest one that divides and is not `taken`."""
    parts = mesh.shape["fsdp"]
    axes: list[str | None] = [None] * len(shape)
    candidates = [axis for axis, size in enumerate(shape) if size and size % parts == 0 and axis != taken]
    if parts > 1 and math.prod(shape) >= smallest and candidates:
        axes[max(candidates, key=lambda axis: shape[axis])] = "fsdp"
    return axes


def _tensor_spec(name: str, shape: tuple[int, ...], axis: int, mesh: Mesh, smallest: int) -> PartitionSpec:
    parts, axis = mesh.shape["tensor"], axis % len(shape)
    if shape[axis] % parts:
        raise InputError(
            f"{name} {list(shape)} has an axis of {shape[axis]}, which does not divide over tensor={parts}: choose a "
            "smaller tensor axis, or heads and widths that divide"
        )
    axes = _fsdp_axes(shape, mesh, smallest, axis)
    if parts > 1:
        axes[axis] = "tensor"
    return PartitionSpec(*_trimmed(axes))


def _trimmed(axes: list[str | None]) -> list[str | None]:
    """Without the Nones at the end."""
    return axes[: max((place + 1 for place, axis in enumerate(axes) if axis), default=0)]


def _check_spec(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InputError(f"the partition {spec} has more axes than {name}, whose shape is {shape}")
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise InputError(
                f"the partition {spec} of {name} names the axis {unknown[0]!r}; the mesh has {tuple(mesh.shape)}"
            )
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise InputError(f"{name} has an axis of {size}, which does not divide over {parts} devices by {spec}")
