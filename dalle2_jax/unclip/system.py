"""DALLE2: the assembled cascade. Captions go in, images come out.

A batch that divides by the number of local devices is shared out among them; an image depends on its own key and
caption alone, not on the batch it is sampled in.

model = DALLE2.load("runs/demo")
images = model.generate(jax.random.key(0), ["a small red circle on a gray background"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.captions import EncodedCaptions
from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.checkpoint.run import require
from dalle2_jax.clip import classify, zero_shot_weights
from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.unclip.embed import cosines, embed_captions, embed_images, empty_caption, encode_tokens, input_size
from dalle2_jax.unclip.generate import Generated, Options, generate, repeat_captions
from dalle2_jax.unclip.load import Stages, load_run
from dalle2_jax.unclip.placement import shard_batch
from dalle2_jax.unclip.sample import decode, encode_images, invert, sample_image_embeddings, upsample
from dalle2_jax.unclip.settings import check_sampling, evaluations_of

StageName = Literal["prior", "decoder", "upsampler"]


@dataclass(frozen=True, repr=False)
class DALLE2(Stages):
    """CLIP, prior, decoder and upsamplers of one run, with the tokenizer they were trained with.

    A run need not have all of them (None): without a prior it samples variations of images and nothing from captions,
    without a decoder it has CLIP's embeddings and the prior's, and GLIDE's networks need neither CLIP nor prior. What
    asks for a stage that is not there says so in an InputError.
    """

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        ema: bool = True,
        dtype: Literal["float32", "bfloat16"] | None = None,
        shard: bool | None = None,
        prior: str | None = None,
    ) -> DALLE2:
        """Reads the finished or latest checkpoints of `run`; needs no config file and no training code.

        ema: read the averaged parameters (the default) rather than the raw ones. dtype: weights and arithmetic in
        "bfloat16" or "float32"; None: as the run says. shard: share each network's weights out among this process's
        devices; None: on accelerators. prior: the name of the stage that is to be the prior, in a run that has several;
        None: the one named prior. Raises CheckpointError where the run or one of its stages is missing or damaged.
        """
        return cls(**vars(load_run(run, ema=ema, dtype=dtype, shard=shard, prior=prior)))

    def __repr__(self) -> str:
        return f"DALLE2({', '.join(f'{stage.name}: {stage.kind}' for stage in self.stages)})"

    @property
    def stages(self) -> tuple[LoadedStage, ...]:
        """Those that there are, in the order in which they work."""
        return tuple(filter(None, (self.clip, self.prior, self.decoder, *self.upsamplers)))

    @property
    def reads_captions(self) -> bool:
        """True: what it samples, it samples of captions."""
        return True

    def require(self, *kinds: str) -> None:
        """Raises InputError if there is no "clip", "prior" or "decoder" among the stages that is asked for."""
        require(self.stages, *kinds)

    def recorded(self, name: str) -> Any:
        """What the first stage that records it says, as an object: `model.recorded("data")` is a Data."""
        stage = next((stage for stage in self.stages if getattr(stage.record, name)), None)
        if stage is None:
            raise InputError(f"no stage of this run records its {name}; it was converted and not trained here")
        return stage.record.rebuilt(name)

    @property
    def image_size(self) -> int:
        """The side of the final images."""
        self.require("decoder")
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).record.image_size

    @cached_property
    def empty_caption(self) -> EncodedCaptions:
        """The empty caption, which stands for a withheld one where a network has learned no null caption."""
        return empty_caption(self.clip, self.tokenizer)

    def encode_text(self, captions: Sequence[str] | str, *, strict: bool = False) -> EncodedCaptions:
        """Captions as tokens with their mask, CLIP's embeddings `[b, z]` and its text states.

        Embeddings have unit norm unless its networks read them as they leave CLIP (`CLIP.unit_norm`).
        """
        self.require("clip")
        return self._encode(captions, strict)

    def _encode(self, captions: Sequence[str] | str, strict: bool = False) -> EncodedCaptions:
        return encode_tokens(self.clip, *self.tokenizer.encode(captions, strict=strict))

    def _captions_or_empty(self, captions: Sequence[str] | None, count: int, strict: bool = False) -> EncodedCaptions:
        if captions is not None:
            return self._encode(captions, strict)
        return self.empty_caption[np.zeros(count, int)]

    def encode_image(self, images: np.ndarray) -> jax.Array:
        """CLIP's image embeddings `[b, z]` of uint8 images `[b, h, h, 3]`; of unit norm as in `encode_text`."""
        self.require("clip")
        input_size(self.clip)
        return encode_images(self.clip, shard_batch(jnp.asarray(images)))()

    def scores(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> jax.Array:
        """Cosines `[images, captions]` of CLIP's embeddings; images: uint8 `[h, w, 3]` each, of any size."""
        self.require("clip")
        return cosines(self.clip, self.tokenizer, images, captions)

    def classify(
        self, images: Sequence[np.ndarray], classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}",)
    ) -> jax.Array:
        """Probabilities `[images, classes]`, with no training for them (CLIP, Sec. 3.1).

        images: uint8 `[h, w, 3]` each, of any size. templates: captions with {} where the class goes; the embeddings
        of a class's captions are averaged.
        """
        self.require("clip")
        captions = [template.replace("{}", name) for name in classes for template in templates]
        embeddings = embed_captions(self.clip, self.tokenizer, captions).reshape(len(classes), len(templates), -1)
        scale = jnp.exp(jnp.asarray(self.clip.params["logit_scale"], jnp.float32))
        scale = jnp.minimum(scale, self.clip.module.max_logit_scale)
        return classify(unit_norm(embed_images(self.clip, images)), zero_shot_weights(embeddings), scale)

    def sample_prior(
        self, keys: jax.Array, captions: Sequence[str] | str, *, strict: bool = False, **changes: Any
    ) -> jax.Array:
        """Image embeddings `[b, z]` from the prior; `changes` are fields of its Sampling (steps, candidates, ...)."""
        self.require("clip", "prior")
        encoded = self._encode(captions, strict)
        keys = shard_batch(keys_for(keys, len(encoded)))
        return sample_image_embeddings(self.prior, encoded, keys, self.empty_for(self.prior), **changes)()

    def decode(
        self,
        keys: jax.Array,
        image_embeddings: jax.Array,
        captions: Sequence[str] | None = None,
        *,
        x_T: jax.Array | None = None,
        strict: bool = False,
        **changes: Any,
    ) -> jax.Array:
        """The decoder's images, float32 `[b, h, w, 3]` in [-1, 1]; captions None lets the embedding speak alone.

        x_T: the noise to start from, such as `invert`'s; None: from the keys.
        """
        self.require("decoder", *(("clip",) if self.decoder.module.text_width is not None else ()))
        encoded = self._captions_or_empty(captions, len(image_embeddings), strict)
        keys, embeddings = shard_batch((keys_for(keys, len(encoded)), jnp.asarray(image_embeddings)))
        return decode(
            self.decoder,
            encoded,
            keys,
            embeddings,
            keep_caption=captions is not None,
            empty=self.empty_for(self.decoder),
            x_T=x_T,
            **changes,
        )()

    def empty_for(self, stage: LoadedStage) -> EncodedCaptions | None:
        """The empty caption for a prior or a decoder that has learned no null caption; None for the others."""
        return self.empty_caption if stage.module.needs_empty_caption else None

    def invert(
        self, images: np.ndarray, captions: Sequence[str] | None = None, *, refinements: int = 0, **changes: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The two parts of images (Sec. 3): CLIP's embeddings `[b, z]`, and the noise x_T of the decoder's DDIM.

        `decode` with both, the same captions and `changes` (steps), sampler "ddim" and guidance_scale 1 samples the
        images again at the decoder's size. images: uint8 `[b, h, h, 3]`. refinements: see `ddim_invert`.
        """
        self.require("clip", "decoder")
        embeddings = self.encode_image(images)
        x_T = invert(
            self.decoder,
            self._captions_or_empty(captions, len(images)),
            shard_batch(jnp.asarray(images)),
            embeddings,
            keep_caption=captions is not None,
            empty=self.empty_for(self.decoder),
            refinements=refinements,
            **changes,
        )()
        return embeddings, x_T

    def upsample(
        self,
        keys: jax.Array,
        images: jax.Array,
        *,
        index: int = 0,
        tile: int | None = None,
        captions: Sequence[str] | None = None,
        **changes: Any,
    ) -> jax.Array:
        """Images `[b, h, w, 3]` in [-1, 1] at the size of upsampler number `index`, in the same range.

        tile: the side of the tiles it is done in, to save memory; None: whole. captions: for an upsampler that reads
        them (GLIDE's).
        """
        if not 0 <= index < len(self.upsamplers):
            raise InputError(f"this run has {len(self.upsamplers)} upsamplers; there is no number {index}")
        encoded = None if captions is None else self._encode(captions)
        keys, images = shard_batch((keys_for(keys, len(images)), jnp.asarray(images)))
        return upsample(self.upsamplers[index], keys, images, captions=encoded, tile=tile, **changes)()

    def check_sampling(self, **changes: dict[str, Any]) -> None:
        """Raises InputError for fields of a stage's Sampling (`decoder={"steps": 12}`) that it cannot have."""
        for name, fields in changes.items():
            stages = self._stages(name)
            if fields and not stages:
                raise InputError(f"this run has no {name} whose {', '.join(fields)} could be changed")
            for stage in stages:
                check_sampling(stage, fields)

    def evaluations(self, stage: StageName, changes: dict[str, Any]) -> int:
        """How many times the stage's network is asked for one image, under these fields of its Sampling."""
        return sum(evaluations_of(loaded, changes) for loaded in self._stages(stage))

    def _stages(self, name: str) -> tuple[LoadedStage, ...]:
        return self.upsamplers if name == "upsampler" else tuple(filter(None, (getattr(self, name),)))

    @overload
    def generate(
        self,
        key: jax.Array,
        captions: Sequence[str] | str | None = None,
        count: int | None = None,
        *,
        return_stages: Literal[False] = False,
        **options: Unpack[Options],
    ) -> np.ndarray: ...

    @overload
    def generate(
        self,
        key: jax.Array,
        captions: Sequence[str] | str | None = None,
        count: int | None = None,
        *,
        return_stages: Literal[True],
        **options: Unpack[Options],
    ) -> Generated: ...

    def generate(self, key, captions=None, count=None, *, return_stages=False, **options):
        """Images of `captions`, uint8 `[b, h, w, 3]`, `count` of each (default 1); captions None: of
        `image_embeddings` alone, one of each.

        key: one key, from which an image's key is its place in the batch, or one key an image `[b]`, with which an
        image comes out the same alone and in any batch. return_stages: return Generated, with each stage's part.
        options: see `dalle2_jax.unclip.generate.Options`.

        Raises InputError, before anything is sampled, for captions, keys or settings that do not fit.
        """
        if captions is None and count is not None:
            raise InputError("count goes with captions; of image embeddings give one an image, and leave count out")
        captions, _ = repeat_captions(captions, count)
        generated = generate(self, key, captions, **options)
        return generated if return_stages else generated.images

    def vary(self, key: jax.Array, images: Sequence[np.ndarray], **options: Any) -> np.ndarray | Generated:
        """Images that share what CLIP sees in others (Sec. 3.1), uint8 `[b, h, w, 3]`.

        images: uint8 `[h, w, 3]` each, of any size; what is beyond their central square is not seen. options: those of
        `generate` (key and keys as there), without captions.
        """
        self.require("decoder", "clip")
        return self.generate(key, None, image_embeddings=embed_images(self.clip, images), **options)
