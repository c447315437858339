"""The pre-norm transformer that CLIP, the prior and the decoder's caption encoder share."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.attention import MultiHeadAttention, last_of, pack
from dalle2_jax.layers.cache import Cache, LayerCache
from dalle2_jax.layers.kernels.dense import product
from dalle2_jax.layers.kernels.gelu import gelu
from dalle2_jax.layers.kernels.target import traced_for_nvidia
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.remat import Remat, rematerialised

ACTIVATIONS = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "relu": nn.relu,
}


class HiddenLayer(nn.Module):
    """A dense layer and its activation; parameters as `flax.linen.Dense` has them.

    For the backward pass it keeps one array of the hidden size, where GELU by itself would keep several.
    """

    features: int
    activation: str
    kernel_init: nn.initializers.Initializer
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., features]`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
        y, activation = product(x, kernel), ACTIVATIONS[self.activation]
        if traced_for_nvidia():
            # The product is kept and the sum never written.
            return jax.checkpoint(lambda y, bias: activation(y + bias))(y, bias)
        if self.activation == "gelu":
            activation = jax.checkpoint(activation)
        return activation(y + bias)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 and returned in float32.

    Fields:
      epsilon: added to the variance; 1e-5 is PyTorch's, which public weights expect.
      param_dtype: of scale and bias.
    """

    epsilon: float = 1e-5
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` `[..., width]`."""
        x = x.astype("float32")
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype).astype("float32")
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype("float32")
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return x * scale.reshape(shape) + bias.reshape(shape)


class LayerMasks(NamedTuple):
    """What each layer of a stack may see where they differ: a few masks, and which of them each layer has; a pytree.

    masks: bool `[kinds, n, n]`, True where the query (row) sees the key (column). kinds: int32 `[depth]`.
    """

    masks: jax.Array
    kinds: jax.Array


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + MLP(norm(x)). Fields are those of `Transformer`, which stacks it;
    with `last_only` all positions are attended to and the last real one alone goes on."""

    heads: int
    is_causal: bool
    mlp_ratio: float
    activation: str
    epsilon: float
    dropout: float
    residual_scale: float
    last_only: bool
    deterministic: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        lengths: jax.Array | None,
        cache: LayerCache | None = None,
        place: jax.Array | None = None,
        masks: jax.Array | None = None,
        kind: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps `x` `[batch, tokens, width]` to the same shape, or to one token. The others are as the attention's, and
        `masks` bool `[kinds, tokens, keys]` of which `kind`, int32, is this layer's."""
        width = x.shape[-1]
        hidden = round(width * self.mlp_ratio)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(LayerNorm, epsilon=self.epsilon, param_dtype=self.param_dtype)
        drop = functools.partial(nn.Dropout, rate=self.dropout, deterministic=self.deterministic)
        init = nn.initializers.normal
        if masks is not None:
            own = jax.lax.dynamic_index_in_dim(masks, kind, keepdims=False)[None, None]
            mask = own if mask is None else mask & own

        y = norm(name="attention_norm")(x).astype(self.dtype)
        y = MultiHeadAttention(
            heads=self.heads,
            is_causal=self.is_causal,
            last_only=self.last_only,
            out_scale=self.residual_scale,
            name="attention",
            **dtypes,
        )(y, mask, lengths, cache, place)
        y, cache = (y, None) if cache is None else y
        if self.last_only:
            x = last_of(x, lengths)
        x = x + drop(name="attention_dropout")(y)

        y = norm(name="mlp_norm")(x).astype(self.dtype)
        y = HiddenLayer(hidden, self.activation, init((2 * width) ** -0.5), name="mlp_in", **dtypes)(y)
        init_out = init(width**-0.5 * self.residual_scale)
        y = nn.Dense(width, kernel_init=init_out, dot_general=product, name="mlp_out", **dtypes)(y)
        x = x + drop(name="mlp_dropout")(y)
        return x, cache


class Transformer(nn.Module):
    """A stack of pre-norm blocks without a final norm.

    With `scan_layers` the parameters lie stacked under `blocks` with a leading axis of `depth`, and without under
    `block_0`, `block_1` and so on; `unstack_layers` and `stacked` make the one of the other. With `last_only` the last
    layer's lie under `last_block`. Initial weights are those of CLIP's code: attention width^-1/2, MLP (2 width)^-1/2,
    and the outputs of both branches width^-1/2 (2 depth)^-1/2.

    Fields:
      width, depth, heads: size of the states, number of layers, heads a layer.
      is_causal: whether position `i` sees only positions up to `i`.
      last_only: whether only the last position's state is wanted, so that the last layer computes no other one: a
        stack of twelve layers then takes a fourteenth less work, one of 24 half of that.
      mlp_ratio: hidden size of the MLP over the width.
      activation: "gelu" (exact), "quick_gelu" (OpenAI's CLIP) or "relu".
      epsilon: of the layer norms.
      dropout: rate on the output of both branches.
      scan_layers: whether one layer is compiled and run over the stacked parameters of all. False, and each one is
        compiled: no layer's parameters, gradients and states are copied from and to stacks, which is a tenth of the
        step of a prior of 40 million parameters on a CPU, and compiling takes longer with every layer.
      remat: which activations the backward pass computes again: False, none; True, all within a layer; "products", all
        but what matrix products give (`layers.remat`).
      dtype: of the computation. param_dtype: of the parameters. Norms and softmax are float32.
    """

    width: int
    depth: int
    heads: int
    is_causal: bool = False
    last_only: bool = False
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    dropout: float = 0.0
    scan_layers: bool = True
    remat: Remat = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
        layer_masks: LayerMasks | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Runs the stack.

        Args:
          x: `[batch, tokens, width]`.
          mask: bool `[batch, tokens]`, True for the tokens that may be attended to. States at the others mean nothing.
            With `last_only` the last one has to be real. With a cache of m places, bool `[batch, m]` of those.
          deterministic: False turns dropout on; it then needs the `dropout` key.
          cache: what the tokens before `x` left (`empty_cache`), for a causal transformer without `last_only`.
          layer_masks: what each layer may see at most, of n = tokens; with a cache of m places, of n = m. Without
            `last_only`.

        Returns:
          `[batch, tokens, width]` in `dtype`, or `[batch, 1, width]` with `last_only`. With a cache, that and the cache
          with the tokens of `x` in it.

        Raises:
          InputError: if `x` is not of `width`, `width` does not divide by `heads`, `activation` is unknown, or there is
            a cache, or are masks of layers, that the transformer cannot have.
        """
        check_mesh_axes(x)
        if x.shape[-1] != self.width:
            raise InputError(f"a transformer of width {self.width} got states of width {x.shape[-1]}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        fields = {
            "heads": self.heads,
            "is_causal": self.is_causal,
            "mlp_ratio": self.mlp_ratio,
            "activation": self.activation,
            "epsilon": self.epsilon,
            "dropout": self.dropout,
            "residual_scale": (2 * self.depth) ** -0.5,
            "deterministic": deterministic,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        x, lengths, full_lengths = x.astype(self.dtype), None, None
        if layer_masks is not None:
            self._check_layer_masks(layer_masks, x.shape[1] if cache is None else cache.layers.keys.shape[2])
        if cache is not None:
            return self._run_cached(x, mask, cache, layer_masks, fields)
        if mask is not None and layer_masks is None and traced_for_nvidia():
            # A mask costs cuDNN an array of all queries by all keys, lengths nothing. On a TPU the moving about costs a
            # tenth of the memory of the paper's prior.
            (x, lengths, order), mask = pack(x, mask), None
            # What lies behind the last real token is hidden by causality, and its own state is not read.
            full_lengths = None if self.is_causal and self.last_only else lengths
        mask = None if mask is None else mask[:, None, None, :]
        block = rematerialised(Block, self.remat, prevent_cse=False)
        # Outside of a scan XLA would take what is to be computed again from the forward pass, and keep it: which suits
        # the last layer, whose backward pass comes at once.
        block_by_itself = rematerialised(Block, self.remat)
        full_layers = self.depth - 1 if self.last_only else self.depth
        masks, kinds = layer_masks or (None, None)
        if not self.scan_layers:
            for layer in range(full_layers):
                kind = None if kinds is None else kinds[layer]
                single = block_by_itself(last_only=False, name=f"block_{layer}", **fields)
                x, _ = single(x, mask, full_lengths, None, None, masks, kind)
        elif full_layers:
            scanned = self._scanned(block, full_layers, fields)
            x, _ = scanned(x, mask, full_lengths, None, None, masks, kinds)
        if self.last_only:
            x, _ = block(last_only=True, name="last_block", **fields)(x, mask, lengths)
        elif lengths is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[:, :, None], axis=1)
        return x

    def _scanned(self, block: type[Block], layers: int, fields: dict[str, Any]) -> nn.Module:
        """All layers as one, over their stacked parameters."""
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast, 0),
            length=layers,
        )(last_only=False, name="blocks", **fields)

    def _check_layer_masks(self, layer_masks: LayerMasks, tokens: int) -> None:
        if self.last_only:
            raise InputError("masks of layers go with a transformer without last_only; leave them out")
        (_, *sizes), kinds = layer_masks.masks.shape, layer_masks.kinds.shape
        if sizes != [tokens, tokens] or kinds != (self.depth,):
            raise InputError(
                f"the masks of layers are for {sizes} tokens and {list(kinds)} layers; they must be for "
                f"[{tokens}, {tokens}] and [{self.depth}]"
            )

    def _run_cached(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        cache: Cache,
        layer_masks: LayerMasks | None,
        fields: dict[str, Any],
    ) -> tuple[jax.Array, Cache]:
        """The stack over the tokens behind those in the cache."""
        if not self.is_causal or self.last_only:
            raise InputError("a cache goes with a causal transformer without last_only; leave the cache out")
        seen = cache.seen(x.shape[1])
        if mask is not None:
            seen = seen & mask[:, None, None, :]
        masks, kinds = layer_masks or (None, None)
        if masks is not None:
            masks = jax.lax.dynamic_slice_in_dim(masks, cache.length, x.shape[1], axis=1)
        if self.scan_layers:
            scanned = self._scanned(Block, self.depth, fields)
            x, layers = scanned(x, seen, None, cache.layers, cache.length, masks, kinds)
        else:
            written = []
            for number in range(self.depth):
                layer = jax.tree.map(lambda value, number=number: value[number], cache.layers)
                block = Block(last_only=False, name=f"block_{number}", **fields)
                kind = None if kinds is None else kinds[number]
                x, layer = block(x, seen, None, layer, cache.length, masks, kind)
                written.append(layer)
            layers = jax.tree.map(lambda *values: jnp.stack(values), *written)
        return x, Cache(layers, cache.length + x.shape[1])

    @nn.nowrap
    def empty_cache(self, batch: int, places: int) -> Cache:
        """A cache for `places` tokens a row, none of them there yet."""
        shape = (self.depth, batch, places, self.heads, self.width // self.heads)
        return Cache(LayerCache(*(jnp.zeros(shape, self.dtype) for _ in range(2))), jnp.zeros((), jnp.int32))
