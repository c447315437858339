"""In which order an array's axes lie in a GPU's memory, where XLA's own choice costs copies."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from dalle2_jax.layers.kernels.target import traced_for_nvidia


def row_major(x: jax.Array) -> jax.Array:
    """`x`, on an NVIDIA GPU with its last axis innermost.

    For the gradients of convolutions' kernels: cuDNN's lie otherwise than the parameters, and XLA then copies parameter
    and both moments instead of the gradient. Compiled for an H200, 2.3 of 55.9 ms of the bound of Karlo's decoder
    (docs/results/gpu.md, November 2026).
    """
    if not traced_for_nvidia():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
