"""Rematerialisation: what of a block's activations the backward pass finds, and what it computes again."""

from typing import Any, Literal

import flax.linen as nn

from dalle2_jax.errors import InputError

Remat = bool | Literal["products"]


def rematerialised(block: type[nn.Module], remat: Remat, **options: Any) -> type[nn.Module]:
    """`block` with its activations treated as `remat` says; parameters and results are the same in all cases.

    False: all are kept. True: none but the block's inputs; the backward pass computes the block again, for a third more
    operations. "products": what matrix products and convolutions give is kept (but for attention's, which grow with the
    square of the length), and only the cheap rest computed again: norms, activations, softmax.

    options: of `flax.linen.remat`. Raises InputError for another `remat`.
    """
    if remat is False:
        return block
    if remat is True:
        return nn.remat(block, **options)
    if remat == "products":
        return nn.remat(block, policy=_is_product, **options)
    raise InputError(f"remat is {remat!r}; it must be false, true or 'products'")


def _is_product(primitive: Any, *_: Any, **parameters: Any) -> bool:
    if primitive.name == "conv_general_dilated":
        return True
    return primitive.name == "dot_general" and not any(parameters["dimension_numbers"][1])
