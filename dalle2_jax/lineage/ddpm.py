"""Denoising diffusion probabilistic models (Ho et al. 2020): unconditional, or of a class or a caption.

The arithmetic is `dalle2_jax.diffusion`'s, over the process of the paper, `PROCESS`, or any other; the network is the
U-Net that all stages share, with the paper's choices in its fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.diffusion.guidance import classifier_free_guidance
from dalle2_jax.diffusion.loss import variational_bound
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sampler import keys_for, normal, split_each
from dalle2_jax.diffusion.sampling import Sampling, sample
from dalle2_jax.errors import InputError
from dalle2_jax.layers.caption_encoder import CaptionEncoder
from dalle2_jax.layers.mesh_axes import check_mesh_axes
from dalle2_jax.layers.unet import UNet

CONDITIONS = ("none", "class", "caption")

# The paper's for CIFAR-10, 35.7M parameters (hojonathanho/diffusion, scripts/run_cifar.py, models/unet.py). Its kernels
# start from another distribution of about the same variance (fan_avg, uniform).
CIFAR10_UNET = UNet(
    image_size=32,
    out_channels=3,
    channels=128,
    channel_multipliers=(1, 2, 2, 2),
    depth=2,
    attention_resolutions=(16,),
    head_channels=None,
    dropout=0.1,
    scale_shift=False,
    time_embedding="ddpm",
    resblock_resampling=False,
    downsampling_padding="after",
    epsilon=1e-6,
)
# With it bits per dimension are the paper's L; "fixed_small" is its other choice.
PROCESS = Process(schedule="linear", timesteps=1000, prediction="epsilon", variance="fixed_large", clip=1.0)


class DDPM(nn.Module):
    """A denoiser of images by themselves, or given their class or caption.

    A class has a learned embedding that is added to the time embedding; one row more stands for no class. A caption is
    read as GLIDE does: the states of an encoder join the keys and values of all attention, the last of them is added to
    the time embedding, and a withheld caption is empty. So training can withhold the condition, and sampling be guided
    (Ho and Salimans 2021).

    Fields:
        unet: the paper's for CIFAR-10 by default. Its `out_channels` are `channels`, or twice as many where the
            variance is learned; its `image_size` is that of the images.
        condition: "none", "class" (of `num_classes`) or "caption" (read by `text`).
        channels: of the images: 3, or 1 for grey ones.
        param_dtype: of the embedding of classes and the layer from the caption, which compute in float32.

    Raises:
        InputError: for an unknown condition, and for what it needs and has not, or has and does not need.
    """

    unet: UNet = CIFAR10_UNET
    condition: str = "none"
    num_classes: int | None = None
    text: CaptionEncoder | None = None
    channels: int = 3
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise InputError(f"a DDPM's condition is {self.condition!r}; it must be one of {', '.join(CONDITIONS)}")
        for field, condition in (("num_classes", "class"), ("text", "caption")):
            value = getattr(self, field)
            if (value is not None) != (self.condition == condition):
                wants = "needs" if value is None else "has no use for"
                raise InputError(f"a DDPM with condition={self.condition} {wants} {field}")
        if self.num_classes is not None and self.num_classes < 1:
            raise InputError(f"num_classes is {self.num_classes}; it must be 1 or more")
        if self.channels < 1:
            raise InputError(f"channels is {self.channels}; it must be 1 or more")
        super().__post_init__()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the images."""
        return (self.unet.image_size, self.unet.image_size, self.channels)

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array,
        timesteps: jax.Array,
        labels: jax.Array | None = None,
        tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        keep: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Predicts from `x_t` `[b, h, w, c]` at `timesteps` int `[b]`; float32 `[b, h, w, unet.out_channels]`.

        Args:
            labels: int32 `[b]` in 0 to `num_classes` - 1, where it is conditional on classes.
            tokens, mask: int32 and bool `[b, n]`, where it is conditional on captions; without a mask all are real.
            keep: bool `[b]`, False where the condition is withheld; None: nowhere.
            deterministic: False where dropout draws from the "dropout" key.

        Raises:
            InputError: for a condition that is missing, superfluous or of another shape.
        """
        check_mesh_axes(x_t)
        self._check(x_t, labels, tokens, mask)
        width, context = 4 * self.unet.channels, None
        condition = None
        if self.condition == "class":
            labels = labels if keep is None else jnp.where(keep, labels, self.num_classes)
            condition = nn.Embed(
                self.num_classes + 1,
                width,
                embedding_init=nn.initializers.normal(0.02),
                dtype=jnp.float32,
                param_dtype=jnp.dtype(self.param_dtype),
                name="class_embedding",
            )(labels)
        if self.condition == "caption":
            mask = jnp.ones(tokens.shape, bool) if mask is None else mask
            mask = mask if keep is None else mask & keep[:, None]
            context = self.text(tokens, mask, deterministic)
            dense = nn.Dense(width, dtype=jnp.float32, param_dtype=jnp.dtype(self.param_dtype), name="text_time")
            condition = dense(context[:, -1])
        return self.unet(x_t, timesteps, condition, context, deterministic=deterministic)

    def _check(self, x_t, labels, tokens, mask) -> None:
        """Refuses what the layers would fail on with less clear words."""
        if x_t.ndim != 4 or x_t.shape[-1] != self.channels:
            raise InputError(f"the DDPM wants x_t [b, h, w, {self.channels}], not {list(x_t.shape)}")
        for name, value, condition in (("labels", labels, "class"), ("tokens", tokens, "caption")):
            if value is None and self.condition == condition:
                raise InputError(f"this DDPM is conditional on a {condition}: give it {name}")
            if value is not None and self.condition != condition:
                raise InputError(f"this DDPM has condition={self.condition} and reads no {name}")
        if labels is not None and (labels.shape != x_t.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer)):
            raise InputError(f"the labels must be int32 [{x_t.shape[0]}], not {labels.dtype} {list(labels.shape)}")
        if tokens is not None and (tokens.ndim != 2 or tokens.shape[0] != x_t.shape[0]):
            raise InputError(f"the tokens must be int32 [{x_t.shape[0]}, n], not {tokens.dtype} {list(tokens.shape)}")
        if mask is not None and (tokens is None or mask.shape != tokens.shape):
            raise InputError(f"the mask must have the tokens' shape, not {list(mask.shape)}")


def sample_ddpm(
    key: jax.Array,
    module: DDPM,
    params: Any,
    process: Process,
    sampling: Sampling,
    count: int,
    labels: Any = None,
    captions: EncodedCaptions | None = None,
    x_T: jax.Array | None = None,
) -> jax.Array:
    """`count` images, float32 `[count, h, w, c]` in [-1, 1], by any sampler of `dalle2_jax.diffusion`.

    Args:
        key: one key, or one an image `[count]`, with which an image is the same alone and in any batch.
        process: as the network was trained with. sampling: the sampler, its timesteps and the guidance scale.
        labels: int `[count]`, an array or a list, where the module is conditional on classes.
        captions: `count` of them, of which tokens and mask are read, where it is conditional on captions.
        x_T: the noise to start from, `[count, h, w, c]`; None: from the key.

    Raises:
        InputError: for another number of keys, a condition that is missing, superfluous or out of range, or guidance
            where there is no condition.
    """
    condition = conditions(module, count, labels, captions)
    if sampling.is_guided and not condition:
        raise InputError(
            f"the guidance scale is {sampling.guidance_scale} and this DDPM has no condition to guide by; set "
            "guidance_scale=1"
        )
    noise_keys, step_keys = split_each(keys_for(key, count))

    def denoiser(x_t: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
        return module.apply({"params": params}, x_t, timesteps, **condition)

    guided = classifier_free_guidance(
        denoiser,
        {**condition, "keep": jnp.ones(count, bool)},
        {**condition, "keep": jnp.zeros(count, bool)},
        sampling.guidance_scale,
        interval=sampling.interval(process),
    )
    x_T = normal(noise_keys, (count, *module.image_shape)) if x_T is None else x_T
    return jnp.clip(sample(step_keys, guided, x_T, process, sampling), -1.0, 1.0)


def bits_per_dimension(
    key: jax.Array,
    module: DDPM,
    params: Any,
    process: Process,
    images: jax.Array,
    labels: Any = None,
    captions: EncodedCaptions | None = None,
    clip_denoised: bool = True,
    noise: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The variational bound of -log2 p(x_0) a dimension (Sec. 3.3; improved-diffusion, `calc_bpd_loop`).

    Of a process with a discretised likelihood at its first step, so that it is of images of 256 levels.

    Args:
        images: `[b, h, w, c]` in [-1, 1]. labels, captions: as in `sample_ddpm`, of `b` images.
        clip_denoised: predicted x_0 are clamped to [-1, 1], as is usual in evaluation, and not in training.
        noise: `[steps, b, h, w, c]`, of every step; None: from the key.

    Returns:
        "total" `[b]`, "prior" `[b]` (L_T), "terms" `[b, steps]` (L_0, the likelihood, first) and "mse" `[b, steps]`, of
        epsilon, all float32 (`variational_bound`).

    Raises:
        InputError: for images of another shape, or a condition as in `sample_ddpm`.
    """
    if images.ndim != 4 or images.shape[1:] != module.image_shape:
        raise InputError(f"the images must be [b, {', '.join(map(str, module.image_shape))}], not {list(images.shape)}")
    condition = conditions(module, images.shape[0], labels, captions)

    def denoiser(x_t: jax.Array, timesteps: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x_t, timesteps, **condition)

    return variational_bound(key, denoiser, images, for_evaluation(process, clip_denoised), noise)


def for_evaluation(process: Process, clip_denoised: bool = True) -> Process:
    """The process with predicted x_0 clamped to [-1, 1], or not at all."""
    return dataclasses.replace(process, clip=1.0 if clip_denoised else None, dynamic_percentile=None)


def conditions(module: DDPM, count: int, labels: Any, captions: EncodedCaptions | None) -> dict[str, jax.Array]:
    """What `module` reads of labels or captions of `count` images, by the names of its arguments; {} without either.

    Raises:
        InputError: for a condition that is missing or superfluous, of another number, or a label out of range.
    """
    given = {"class": labels, "caption": captions}
    for condition, value in given.items():
        names = "labels" if condition == "class" else "captions"
        if value is None and module.condition == condition:
            raise InputError(f"this DDPM is conditional on a {condition} and there are no {names}; give {count}")
        if value is not None and module.condition != condition:
            raise InputError(f"there are {names} for a DDPM with condition={module.condition}; leave them out")
    if labels is not None:
        labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        if labels.shape != (count,):
            raise InputError(f"there are labels of shape {list(labels.shape)} for {count} images; give one an image")
        if not isinstance(labels, jax.core.Tracer):
            _check_range(np.asarray(labels), module.num_classes)
        return {"labels": jnp.asarray(labels, jnp.int32)}
    if captions is not None:
        if len(captions) != count:
            raise InputError(f"there are {len(captions)} captions for {count} images; give one an image")
        return {"tokens": captions.tokens, "mask": captions.mask}
    return {}


def _check_range(labels: np.ndarray, num_classes: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"the labels are {labels.dtype}; they must be whole numbers")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise InputError(f"there is no class {wrong[0]}; this DDPM's are 0 to {num_classes - 1}")
