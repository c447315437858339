"""A strict table from somebody else's tensors to our parameters.

A source's file says, entry by entry, which of its tensors make which of our parameters and how. What the tensors'
shapes must be follows from our module. Converting then checks everything before it reads anything: every tensor is
used exactly once, every parameter is made exactly once, every shape and dtype is as expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np

from dalle2_jax.weights.tensors import FLOATS, Tensors, WeightsError

Shape = tuple[int, ...]
SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, or one layer of a stacked one, from one or more tensors.

    target: its path, with / between. shapes: from our shape to the tensors'. make: from the tensors to ours, up to a
    reshape.
    """

    target: str
    sources: tuple[str, ...]
    shapes: Callable[[Shape], Sequence[Shape]]
    make: Callable[..., np.ndarray]
    layer: int | None = None


class Table:
    """Entries, and short ways to write them.

    `layer` picks a layer of a transformer's parameters, whose target is written as if they were stacked; where they are
    not (`Transformer.scan_layers`), the layer's own are meant.
    """

    def __init__(self):
        self.entries: list[Entry] = []

    def add(self, target: str, sources: Sequence[str], shapes: Any, make: Any, layer: int | None = None) -> None:
        """Adds an entry as it is."""
        self.entries.append(Entry(target, tuple(sources), shapes, make, layer))

    def plain(self, target: str, source: str, layer: int | None = None, leading: int = 0) -> None:
        """A tensor as it is, without its `leading` axes of one."""
        ones = (1,) * leading
        self.add(target, [source], lambda shape: [ones + shape], lambda x: x.reshape(x.shape[leading:]), layer)

    def constant(self, target: str, value: float) -> None:
        """A number that no tensor gives."""
        self.add(target, [], lambda shape: [], lambda: np.asarray(value))

    def norm(self, target: str, source: str, layer: int | None = None) -> None:
        """A LayerNorm or GroupNorm."""
        self.plain(f"{target}/scale", f"{source}.weight", layer)
        self.plain(f"{target}/bias", f"{source}.bias", layer)

    def dense(self, target: str, source: str, layer: int | None = None, bias: bool = True, places: int = 0) -> None:
        """A Linear layer [out, in]; with `places`, a convolution over single places, [out, in] and so many ones."""
        self.fused(target, [source], layer, bias, places)

    def fused(
        self,
        target: str,
        sources: Sequence[str],
        layer: int | None = None,
        bias: bool = True,
        places: int = 0,
        heads: int = 1,
    ) -> None:
        """Several Linear layers of one input as one: side by side, or each head's features side by side."""
        count, ones = len(sources), (1,) * places

        def kernels(shape: Shape) -> list[Shape]:
            return [(prod(shape[1:]) // count, shape[0], *ones)] * count

        def kernel(*weights: np.ndarray) -> np.ndarray:
            split = [weight.reshape(weight.shape[:2]).T.reshape(weight.shape[1], heads, -1) for weight in weights]
            return np.concatenate(split, axis=-1)

        self.add(f"{target}/kernel", [f"{source}.weight" for source in sources], kernels, kernel, layer)
        if bias:
            names = [f"{source}.bias" for source in sources]
            self.add(
                f"{target}/bias",
                names,
                lambda shape: [(prod(shape) // count,)] * count,
                lambda *biases: np.concatenate([each.reshape(heads, -1) for each in biases], axis=-1),
                layer,
            )

    def heads(
        self, target: str, source: str, parts: int, head_channels: int, layer: int | None = None, places: int = 0
    ) -> None:
        """A Linear layer whose outputs are [heads, parts, head_channels], as ours, [parts, heads, head_channels]."""

        def ours(x: np.ndarray) -> np.ndarray:
            split = x.reshape(-1, parts, head_channels, *x.shape[1:])
            return np.swapaxes(split, 0, 1).reshape(x.shape)

        self.add(
            f"{target}/kernel",
            [f"{source}.weight"],
            lambda shape: [(prod(shape[1:]), shape[0], *(1,) * places)],
            lambda x: ours(x.reshape(x.shape[:2])).T,
            layer,
        )
        self.add(f"{target}/bias", [f"{source}.bias"], lambda shape: [(prod(shape),)], ours, layer)

    def conv(self, target: str, source: str) -> None:
        """A convolution [out, in, height, width]."""
        self.add(
            f"{target}/kernel",
            [f"{source}.weight"],
            lambda shape: [(shape[3], shape[2], shape[0], shape[1])],
            lambda x: x.transpose(2, 3, 1, 0),
        )
        self.plain(f"{target}/bias", f"{source}.bias")

    def convert(self, tensors: Tensors, parameters: Any, dtype: str = "float32") -> Any:
        """Our parameters from theirs, one tensor at a time.

        parameters: the tree of our parameters' shapes (of `jax.eval_shape`). dtype: of the result.

        Raises:
            WeightsError: naming what is missing, left over, or of another shape or dtype.
        """
        shapes = self.check(tensors, parameters)
        made = {target: np.empty(shape, jax.numpy.dtype(dtype)) for target, shape in shapes.items()}
        for entry in self._placed(shapes):
            value = entry.make(*(self._read(tensors, source) for source in entry.sources))
            value = value.reshape(_shape(entry, shapes))
            if entry.layer is None:
                made[entry.target][...] = value
            else:
                made[entry.target][entry.layer] = value
        return jax.tree_util.tree_map_with_path(lambda path, _: made[_path(path)], parameters)

    def _read(self, tensors: Tensors, source: str) -> np.ndarray:
        value = tensors.read(source)
        if not np.isfinite(value).all():
            raise WeightsError(
                f"the tensor {source} of {tensors.where} has numbers that are not finite; download it again"
            )
        return value

    def check(self, tensors: Tensors, parameters: Any) -> dict[str, Shape]:
        """All that `convert` checks, before anything is read; {path: shape} of our parameters."""
        shapes = {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
        self._check_itself(shapes)
        self._check(tensors, shapes)
        return shapes

    def _placed(self, shapes: dict[str, Shape]) -> list[Entry]:
        """The entries, with those of layers that lie by themselves naming them so."""

        def place(entry: Entry) -> Entry:
            if entry.layer is None or entry.target in shapes:
                return entry
            return replace(entry, target=entry.target.replace("/blocks/", f"/block_{entry.layer}/"), layer=None)

        return [place(entry) for entry in self.entries]

    def _check_itself(self, shapes: dict[str, Shape]) -> None:
        """The table makes every number of every parameter once and uses no tensor twice: our own mistake if not."""
        sources = [source for entry in self.entries for source in entry.sources]
        assert len(sources) == len(set(sources)), "a tensor stands twice in the table"
        numbers = dict.fromkeys(shapes, 0)
        for entry in self._placed(shapes):
            numbers[entry.target] += prod(_shape(entry, shapes))
        wrong = [target for target, shape in shapes.items() if numbers[target] != prod(shape)]
        assert not wrong, f"the table does not make these parameters once: {wrong}"

    def _check(self, tensors: Tensors, shapes: dict[str, Shape]) -> None:
        wanted = {source for entry in self.entries for source in entry.sources}
        missing, surplus = sorted(wanted - set(tensors.shapes)), sorted(set(tensors.shapes) - wanted)
        if missing or surplus:
            parts = [f"{len(names)} {what} ({_some(names)})" for what, names in _named(missing, surplus) if names]
            raise WeightsError(
                f"{tensors.where} is not what it was taken for: {' and '.join(parts)}; is it another model's?"
            )
        for entry in self._placed(shapes):
            for source, shape in zip(entry.sources, entry.shapes(_shape(entry, shapes)), strict=True):
                if tensors.shapes[source] != shape:
                    raise WeightsError(
                        f"the tensor {source} of {tensors.where} has the shape {list(tensors.shapes[source])} where "
                        f"{list(shape)} is due; is it another size of the model?"
                    )
                if tensors.dtypes[source] not in FLOATS:
                    raise WeightsError(
                        f"the tensor {source} of {tensors.where} is {tensors.dtypes[source]}; weights are one of "
                        f"{', '.join(FLOATS)}"
                    )


def _named(missing: list[str], surplus: list[str]) -> list[tuple[str, list[str]]]:
    return [("missing tensors", missing), ("tensors too many", surplus)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shape(entry: Entry, shapes: dict[str, Shape]) -> Shape:
    shape = shapes[entry.target]
    return shape if entry.layer is None else shape[1:]


def _path(path: Any) -> str:
    return "/".join(str(key.key) for key in path)
