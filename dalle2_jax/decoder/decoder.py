"""The decoder: GLIDE's text-conditional U-Net, conditioned on the CLIP image embedding in two ways (Sec. 2.1)."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.errors import InputError
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.transformer import LayerNorm
from dalle2_jax.layers.unet import UNet


class Decoder(nn.Module):
    """A denoiser of small images given a CLIP image embedding and, if it has a caption pathway, a caption.

    The image embedding is projected and added to the time embedding, and projected to a few context tokens placed
    before the caption's; the pooled caption is added to the time embedding too, as GLIDE does. The caption pathway is
    one of three: `text` set: an encoder of its own reads tokens; `text_width` set: states of CLIP's text transformer
    are projected to that width and normalised (as Karlo does); neither: the image embedding speaks alone.

    Dropping a condition, for training and for guidance, is part of the network: where `keep_image` is False a learned
    embedding, zero before training, stands for the image's, and where `keep_text` is False the caption is empty: all
    padding for the own encoder; for states, a learned pooled embedding and no tokens to look at. Without
    `learned_null_text` the null caption is the empty caption's states, which whoever samples or trains has to give.

    Fields:
        unet: the U-Net; its fields are those of Table 3 by default.
        image_tokens: how many context tokens the image embedding becomes.
        embedding_scale: multiplies the image embedding; None: the square root of its size, for unit variance of unit
            embeddings.
        reads_image: False leaves the image embedding out: GLIDE.
        pools_embedding: the pooled caption is CLIP's text embedding (Karlo), not the state of its last token.
        learned_null_text: with states, whether a withheld caption is a learned embedding.
        inpainting: the U-Net also sees what is known of the image, and where it is known (GLIDE's inpainting net).
    """

    unet: UNet
    image_tokens: int = dataclasses.field(default=4, metadata={"minimum": 0})
    text: CaptionEncoder | None = None
    text_width: int | None = None
    embedding_scale: float | None = None
    reads_image: bool = True
    pools_embedding: bool = False
    learned_null_text: bool = True
    inpainting: bool = False
    epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def needs_empty_caption(self) -> bool:
        """Whether the empty caption stands for a withheld one, since no null caption was learned."""
        return self.text is None and self.text_width is not None and not self.learned_null_text

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array,
        timesteps: jax.Array,
        image_embedding: jax.Array | None = None,
        text: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        keep_image: jax.Array | None = None,
        keep_text: jax.Array | None = None,
        deterministic: bool = True,
        text_embedding: jax.Array | None = None,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts from `x_t` [batch, height, width, 3] in [-1, 1] at `timesteps` int [batch].

        Args:
            image_embedding: CLIP image embeddings [batch, z]; None without `reads_image`.
            text: tokens int32 [batch, n] for the own encoder, or CLIP's text states float [batch, n, d].
            text_mask: bool [batch, n], True where `text` is real; None: everywhere.
            keep_image, keep_text: bool [batch], False where that condition is withheld; None: kept.
            text_embedding: with states only: the pooled caption [batch, d'] to use in place of the last real state;
                with `pools_embedding` it is needed.
            known: with `inpainting`, [batch, height, width, 4]: the image in [-1, 1], zero where it is not known, and
                1 where it is.

        Returns:
            float32 [batch, height, width, unet.out_channels].

        Raises:
            InputError: if the caption is missing, superfluous or of the wrong kind, or an input's shape does not fit.
        """
        self._check(x_t, image_embedding, text, text_mask, keep_text, text_embedding, known)
        batch = x_t.shape[0]
        conditions, contexts, masks = [], [], []
        if self.reads_image:
            embedding = self._image(image_embedding, keep_image)
            conditions.append(self._dense(4 * self.unet.channels, "image_time", jnp.float32)(embedding))
            if self.image_tokens:
                tokens = self._dense(self.image_tokens * self._context_width(), "image_tokens_projection")(embedding)
                contexts.append(tokens.reshape(batch, self.image_tokens, self._context_width()))
                masks.append(jnp.ones((batch, self.image_tokens), bool))
        if text is not None:
            if self.text is not None:
                pooled, states, mask = self._read_tokens(text, text_mask, keep_text, deterministic)
            else:
                pooled, states, mask = self._read_states(text, text_mask, keep_text, text_embedding)
            conditions.append(self._dense(4 * self.unet.channels, "text_time", jnp.float32)(pooled))
            contexts.append(states)
            masks.append(mask)

        condition = sum(conditions[1:], conditions[0]) if conditions else None
        context = jnp.concatenate(contexts, axis=1) if contexts else None
        context_mask = None
        if masks and masks[-1] is not None and text is not None:
            context_mask = jnp.concatenate(masks, axis=1)
        if known is not None:
            x_t = jnp.concatenate([x_t, known.astype(x_t.dtype)], axis=-1)
        return self.unet(x_t, timesteps, condition, context, context_mask, deterministic=deterministic)

    def _image(self, embedding, keep):
        """The image embedding at the scale in which it is read, a learned one where it is not kept."""
        scale = math.sqrt(embedding.shape[1]) if self.embedding_scale is None else self.embedding_scale
        embedding = embedding.astype(jnp.float32) * scale
        null = self.param("null_image", nn.initializers.zeros, embedding.shape[1:], jnp.dtype(self.param_dtype))
        return embedding if keep is None else jnp.where(keep[:, None], embedding, null.astype(jnp.float32)[None])

    def _read_tokens(self, tokens, mask, keep, deterministic):
        """The own encoder's pooled state, states and no mask. GLIDE pools the last position, usually a padding."""
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        if keep is not None:
            mask = mask & keep[:, None]
        states = self.text(tokens, mask, deterministic)
        return states[:, -1], states, None

    def _read_states(self, states, mask, keep, pooled):
        """CLIP's pooled caption, its states projected and normalised, and the mask of those to look at (None: all)."""
        if pooled is None and mask is None:
            pooled = states[:, -1]
        elif pooled is None:
            positions = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
            last = jnp.max(jnp.where(mask, positions, 0), axis=1)
            pooled = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        if self.learned_null_text:
            null_text = self.param("null_text", nn.initializers.zeros, pooled.shape[1:], jnp.dtype(self.param_dtype))
        if keep is not None:
            pooled = jnp.where(keep[:, None], pooled, null_text.astype(pooled.dtype)[None])
            mask = jnp.broadcast_to(keep[:, None], states.shape[:2]) if mask is None else mask & keep[:, None]
        states = self._dense(self.text_width, "text_projection")(states)
        norm = LayerNorm(self.epsilon, self.param_dtype, name="text_norm")
        return pooled, norm(states).astype(self.dtype), mask

    def _dense(self, features: int, name: str, dtype=None) -> nn.Dense:
        dtype = jnp.dtype(self.dtype) if dtype is None else dtype
        return nn.Dense(features, dtype=dtype, param_dtype=jnp.dtype(self.param_dtype), name=name)

    def _context_width(self) -> int:
        """The width of the context tokens: the caption's, and without one the time embedding's."""
        if self.text is not None:
            return self.text.width
        return 4 * self.unet.channels if self.text_width is None else self.text_width

    def _check(self, x_t, image_embedding, text, text_mask, keep_text, text_embedding, known) -> None:
        """Refuses what the layers would fail on with less clear words."""
        batch = x_t.shape[0]
        check_mesh_axes(x_t)
        if self.reads_image != (image_embedding is not None):
            wanted = "an image embedding" if self.reads_image else "no image embedding: it has reads_image=False"
            raise InputError(f"this decoder reads {wanted}.")
        if self.reads_image and (image_embedding.ndim != 2 or image_embedding.shape[0] != batch):
            raise InputError(
                f"the decoder's image_embedding must be [batch, size] with the batch of x_t {x_t.shape}, "
                f"not {image_embedding.shape}."
            )
        if self.inpainting != (known is not None) or (self.inpainting and known.shape != (*x_t.shape[:3], 4)):
            wanted = f"known {(*x_t.shape[:3], 4)}" if self.inpainting else "no known: it has inpainting=False"
            raise InputError(f"this decoder wants {wanted}, not {None if known is None else known.shape}.")
        if self.text is not None and self.text_width is not None:
            raise InputError("the decoder reads captions in one way: set text or text_width, not both.")
        if self.text is None and self.text_width is None:
            if text is not None:
                raise InputError("this decoder has no caption pathway: pass no text, or set its text or text_width.")
            return
        if text is None:
            raise InputError("this decoder reads captions: pass text, with keep_text False where it is withheld.")
        rank, kind, names = (2, jnp.integer, "int32 [batch, n] tokens")
        if self.text is None:
            rank, kind, names = (3, jnp.floating, "float [batch, n, d] states")
        if text.ndim != rank or not jnp.issubdtype(text.dtype, kind) or text.shape[0] != batch:
            raise InputError(f"the decoder's text must be {names}, not {text.dtype} {text.shape}.")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise InputError(f"the decoder's text_mask must have shape {text.shape[:2]}, not {text_mask.shape}.")
        if text_embedding is not None and self.text is not None:
            raise InputError("text_embedding goes with CLIP's text states: this decoder encodes captions itself.")
        if text_embedding is None and self.pools_embedding:
            raise InputError("this decoder pools CLIP's text embedding: pass text_embedding.")
        if keep_text is not None and self.text is None and not self.learned_null_text:
            raise InputError("this decoder has learned no null caption: give it the empty caption's states instead.")
