"""Reads PyTorch weights into Flax parameters and keeps account of which tensors were used."""

import jax
import numpy as np


class TorchWeights:
    """The tensors of a state dict, handed out once each."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._left = dict(tensors)

    def take(self, name: str) -> np.ndarray:
        """One tensor as it is; a second time it is missing."""
        return self._left.pop(name)

    def dense(self, name: str, bias: bool = True) -> dict[str, np.ndarray]:
        """A Linear layer as a Dense layer's parameters."""
        params = {"kernel": self.take(f"{name}.weight").T}
        return params | {"bias": self.take(f"{name}.bias")} if bias else params

    def fused_dense(self, names: list[str]) -> dict[str, np.ndarray]:
        """Several Linear layers of one input as a single Dense layer, side by side."""
        layers = [self.dense(name) for name in names]
        return {part: np.concatenate([layer[part] for layer in layers], axis=-1) for part in ("kernel", "bias")}

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """A LayerNorm's parameters."""
        return {"scale": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def assert_all_used(self) -> None:
        assert not self._left, f"tensors that nothing took: {sorted(self._left)}"


def stack_layers(layers: list) -> dict:
    """Parameter trees of single layers as one tree with a leading layer axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def assert_same_shapes(params, expected) -> None:
    """Every parameter of ours is filled, none is left over, and the shapes agree."""
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
