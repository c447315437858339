"""DALLE2: the assembled cascade. Captions go in, pictures come out.

A batch that divides by the number of local devices is shared out among them; a picture depends on its own key and
caption alone, not on the batch it is drawn in.

model = DALLE2.load("runs/demo")
pictures = model.generate(jax.random.key(0), ["a small red circle on a gray background"])
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import stages
from dalle2_jax.checkpoint import CheckpointError, LoadedStage, Run
from dalle2_jax.checkpoint.run import KINDS, first_of_kind, of_kind, require
from dalle2_jax.clip import classify, zero_shot_weights
from dalle2_jax.data.transforms import clip_pixels
from dalle2_jax.decoder import Caption, caption_for
from dalle2_jax.errors import CaptionTruncated, InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.layers.pictures import to_uint8
from dalle2_jax.tokenizer import AnyTokenizer, tokenizer_from_json

# What CLIP makes of captions: their embeddings, its text states (both None without a CLIP), the tokens and their mask.
Encoded = tuple[jax.Array | None, jax.Array | None, jax.Array, jax.Array]
READ_AT_ONCE = 128  # pictures or captions, by CLIP


def _parts(many: Any) -> list[Any]:
    """At most `READ_AT_ONCE` at a time, for the memory's sake."""
    return [many[start : start + READ_AT_ONCE] for start in range(0, len(many), READ_AT_ONCE)]


@dataclass(frozen=True)
class Generated:
    """What each stage contributed to a batch of pictures.

    text_embeddings: CLIP's `[b, z]`. image_embeddings: `[b, z]`, from the prior. (None where there is no such stage.)
    decoded: uint8 `[b, h, w, 3]`, from the decoder. upsampled: a tuple of uint8 pictures, one an upsampler. pictures:
    the last of these.
    """

    captions: tuple[str, ...]
    text_embeddings: np.ndarray | None
    image_embeddings: np.ndarray | None
    decoded: np.ndarray
    upsampled: tuple[np.ndarray, ...]

    @property
    def pictures(self) -> np.ndarray:
        return self.upsampled[-1] if self.upsampled else self.decoded


@dataclass(frozen=True)
class DALLE2:
    """CLIP, prior, decoder and upsamplers of one run, with the tokenizer they were trained with.

    A run need not have all of them (None): without a prior it draws variations of pictures and nothing from captions,
    without a decoder it has CLIP's embeddings and the prior's, and GLIDE's networks need neither CLIP nor prior. What
    asks for a stage that is not there says so in an InputError.
    """

    clip: LoadedStage | None
    prior: LoadedStage | None
    decoder: LoadedStage | None
    upsamplers: tuple[LoadedStage, ...]
    tokenizer: AnyTokenizer

    @classmethod
    def load(cls, run: str | Path, *, ema: bool = True, dtype: str | None = None, shard: bool | None = None) -> DALLE2:
        """Reads the finished or latest checkpoints of `run`; needs no config file and no training code.

        ema: read the averaged parameters (the default) rather than the raw ones. dtype: weights and arithmetic in
        "bfloat16" or "float32"; None: as the run says. shard: share each network's weights out among this process's
        devices; None: on accelerators. Raises CheckpointError where the run or one of its stages is missing or damaged.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        run = Path(run)
        if not run.is_dir():
            raise CheckpointError(f"there is no run at {run}; train one with `python -m train configs/shapes.py all`")
        folders = Run(run)
        # On the devices at once, so that the host holds one stage at a time.
        loaded = [stages.placed(folder.load(ema), dtype, shard) for folder in folders]
        reader = folders.caption_reader.record
        for name, kind in KINDS.items():
            found = ", ".join(stage.name for stage in of_kind(loaded, name))
            if kind.only and "," in found:
                raise CheckpointError(f"{run} has more than one {name} stage: {found}; a run has one of them")
        clip, prior, decoder = (first_of_kind(loaded, kind) for kind in ("clip", "prior", "decoder"))
        upsamplers = of_kind(loaded, "upsampler")
        size = None if decoder is None else decoder.record.image_size
        for upsampler in upsamplers:
            low_size = upsampler.record.low_size
            if size is not None and low_size != size:
                raise CheckpointError(
                    f"the stage {upsampler.name} of {run} enlarges {low_size} px pictures but the stage before it "
                    f"makes {size} px; train them with matching sizes"
                )
            size = upsampler.record.image_size
        for stage in filter(None, (prior, decoder) if clip else ()):
            if stage.record.built_on.get("clip", clip.version) != clip.version:
                warnings.warn(
                    f"the stage {stage.name} of {run} was trained on another clip than the one that is there now: its "
                    f"pictures will not fit their captions; delete {run / stage.name} and train it anew",
                    stacklevel=2,
                )
        return cls(clip, prior, decoder, upsamplers, tokenizer_from_json(reader.tokenizer))

    @property
    def stages(self) -> tuple[LoadedStage, ...]:
        """Those that there are, in the order in which they work."""
        return tuple(filter(None, (self.clip, self.prior, self.decoder, *self.upsamplers)))

    def need(self, *kinds: str) -> None:
        """Raises InputError if there is no "clip", "prior" or "decoder" among the stages that is asked for."""
        require(self.stages, *kinds)

    def recorded(self, name: str) -> Any:
        """What the first stage that records it says, as the object it records: `model.recorded("data")` is a Data."""
        stage = next((stage for stage in self.stages if getattr(stage.record, name)), None)
        if stage is None:
            raise InputError(f"no stage of this run records its {name}; it was converted and not trained here")
        return stage.record.rebuilt(name)

    @property
    def image_size(self) -> int:
        """The side of the final pictures."""
        self.need("decoder")
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).record.image_size

    def encode_text(self, captions: Sequence[str], *, strict: bool = False) -> Encoded:
        """CLIP's caption embeddings `[b, z]`; then its text states, the tokens and their mask.

        Embeddings have unit norm unless its networks read them as they leave CLIP (`CLIP.unit_norm`).
        """
        self.need("clip")
        return self._encode(captions, strict)

    def _encode(self, captions: Sequence[str], strict: bool) -> Encoded:
        tokens, mask = stages.spread(*map(jnp.asarray, self.tokenizer.encode(captions, strict=strict)))
        if self.clip is None:
            return None, None, tokens, mask
        embedding, states = stages.encode_text(self.clip.params, tokens, mask, module=self.clip.module)
        return embedding, states, tokens, mask

    def encode_image(self, pictures: np.ndarray) -> jax.Array:
        """CLIP's image embeddings `[b, z]` of uint8 pictures `[b, h, h, 3]`; of unit norm as in `encode_text`."""
        self._seen_size()
        (pictures,) = stages.spread(jnp.asarray(pictures))
        return stages.encode_image(self.clip.params, pictures, module=self.clip.module)

    def _see(self, pictures: Sequence[np.ndarray]) -> jax.Array:
        """CLIP's embeddings of uint8 pictures `[h, w, 3]` of any size, by their central squares."""
        size = self._seen_size()
        pixels = np.stack([clip_pixels(np.asarray(picture), size) for picture in pictures])
        return jnp.concatenate([self.encode_image(part) for part in _parts(pixels)])

    def _read(self, captions: Sequence[str]) -> jax.Array:
        """CLIP's embeddings of captions, of unit norm."""
        return unit_norm(jnp.concatenate([self.encode_text(part)[0] for part in _parts(captions)]))

    def _seen_size(self) -> int:
        """The side of the pictures that CLIP sees; InputError where it sees none."""
        self.need("clip")
        if self.clip.module.vision is None:
            raise InputError("this run's CLIP reads captions alone; convert a run with a picture encoder (--clip)")
        return self.clip.module.vision.image_size

    def scores(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> jax.Array:
        """Cosines `[pictures, captions]` of CLIP's embeddings; pictures: uint8 `[h, w, 3]` each, of any size."""
        return unit_norm(self._see(pictures)) @ self._read(captions).T

    def classify(
        self, pictures: Sequence[np.ndarray], classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}",)
    ) -> jax.Array:
        """Probabilities `[pictures, classes]`, with no training for them (CLIP, Sec. 3.1).

        pictures: uint8 `[h, w, 3]` each, of any size. templates: captions with {} where the class goes; the embeddings
        of a class's captions are averaged.
        """
        captions = [template.replace("{}", name) for name in classes for template in templates]
        embeddings = self._read(captions).reshape(len(classes), len(templates), -1)
        scale = jnp.exp(jnp.asarray(self.clip.params["logit_scale"], jnp.float32))
        scale = jnp.minimum(scale, self.clip.module.max_logit_scale)
        return classify(unit_norm(self._see(pictures)), zero_shot_weights(embeddings), scale)

    def draw_embeddings(
        self, keys: jax.Array, captions: Sequence[str], *, strict: bool = False, **changes: Any
    ) -> jax.Array:
        """Image embeddings `[b, z]` from the prior; `changes` are fields of its Sampling (steps, candidates, ...)."""
        return self._draw(keys, self.encode_text(captions, strict=strict), **changes)

    def _draw(self, keys: jax.Array, encoded: Encoded, **changes: Any) -> jax.Array:
        self.need("clip", "prior")
        text_embedding, states, tokens, mask = encoded
        text = tokens if self.prior.module.vocabulary_size is not None else states
        (keys,) = stages.spread(stages.keys_of(keys, text_embedding.shape[0]))
        return stages.draw_embeddings(
            keys,
            self.prior.params,
            text_embedding,
            text,
            mask,
            None if self.prior.module.learned_null else self._empty,
            module=self.prior.module,
            process=stages.process_of(self.prior),
            sampling=stages.sampling_of(self.prior, changes),
        )

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
        """The decoder's pictures, float32 `[b, h, w, 3]` in [-1, 1]; captions None lets the embedding speak alone.

        x_T: the noise to start from, such as `invert`'s; None: drawn by the keys.
        """
        self.need("decoder", *(("clip",) if self.decoder.module.text_width is not None else ()))
        encoded = self._encode(captions or ["nothing"] * image_embeddings.shape[0], strict)
        return self._decode(keys, image_embeddings, encoded, captions is not None, x_T, **changes)

    def _decode(
        self,
        keys: jax.Array,
        image_embeddings: jax.Array | None,
        encoded: Encoded,
        keep_text: bool,
        x_T: jax.Array | None = None,
        **changes: Any,
    ) -> jax.Array:
        keys = stages.keys_of(keys, len(encoded[2]))
        (keys,) = stages.spread(keys)
        if image_embeddings is not None:
            (image_embeddings,) = stages.spread(image_embeddings)
        return stages.decode(
            keys,
            self.decoder.params,
            image_embeddings,
            self._caption(encoded, keep_text),
            x_T,
            module=self.decoder.module,
            process=stages.process_of(self.decoder),
            sampling=stages.sampling_of(self.decoder, changes),
        )

    def _caption(self, encoded: Encoded, keep_text: bool) -> Caption:
        """What the decoder reads of encoded captions."""
        kept = jnp.full(len(encoded[2]), keep_text)
        return caption_for(self.decoder.module, encoded, kept, lambda: self._empty)

    @cached_property
    def _empty(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Text embedding, states and mask `[1, ...]` of the empty caption, for networks that learned no null one."""
        tokens, mask = map(jnp.asarray, self.tokenizer.empty())
        embedding, states = stages.encode_text(self.clip.params, tokens, mask, module=self.clip.module)
        return embedding, states, mask

    def invert(
        self,
        pictures: np.ndarray,
        captions: Sequence[str] | None = None,
        *,
        refinements: int = 0,
        **changes: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The two parts of pictures (Sec. 3): CLIP's embeddings `[b, z]`, and the noise x_T of the decoder's DDIM.

        `decode` with both, the same captions and `changes` (steps), sampler "ddim" and guidance_scale 1 draws the
        pictures again at the decoder's size. pictures: uint8 `[b, h, h, 3]`. refinements: see `ddim_invert`.
        """
        self.need("clip", "decoder")
        embeddings = self.encode_image(pictures)
        encoded = self.encode_text(captions or ["nothing"] * len(pictures))
        (pictures,) = stages.spread(jnp.asarray(pictures))
        x_T = stages.invert(
            self.decoder.params,
            pictures,
            embeddings,
            self._caption(encoded, captions is not None),
            module=self.decoder.module,
            process=stages.process_of(self.decoder),
            sampling=stages.sampling_of(self.decoder, {**changes, "sampler": "ddim"}),
            refinements=refinements,
        )
        return embeddings, x_T

    def upsample(
        self,
        keys: jax.Array,
        pictures: jax.Array,
        *,
        index: int = 0,
        tile: int | None = None,
        captions: Sequence[str] | None = None,
        **changes: Any,
    ) -> jax.Array:
        """Enlarges `[b, h, w, 3]` in [-1, 1] with upsampler number `index`; returns the same range.

        tile: the side of the tiles it is done in, to save memory; None: whole. captions: for an upsampler that reads
        them (GLIDE's).
        """
        if not 0 <= index < len(self.upsamplers):
            raise InputError(f"this run has {len(self.upsamplers)} upsamplers; there is no number {index}")
        caption = None if captions is None else self._encode(captions, False)[2:]
        return stages.enlarge(self.upsamplers[index], keys, pictures, tile=tile, caption=caption, **changes)

    def check_sampling(self, **changes: dict[str, Any]) -> None:
        """Raises InputError for fields of a stage's Sampling (`decoder={"steps": "12"}`) that it cannot have."""
        for stage, fields in changes.items():
            loaded_stages = self._stages(stage)
            if fields and not loaded_stages:
                raise InputError(f"this run has no {stage} whose {', '.join(fields)} could be changed")
            for loaded in loaded_stages:
                stages.sampling_of(loaded, fields).process(stages.process_of(loaded))

    def evaluations(self, stage: str, changes: dict[str, Any]) -> int:
        """How many times the stage's network is asked for one picture, under these fields of its Sampling."""
        total = 0
        for loaded in self._stages(stage):
            sampling = stages.sampling_of(loaded, changes)
            guided = 2 if sampling.guidance_scale != 1 and stage != "upsampler" else 1
            drawn = sampling.candidates if stage == "prior" else 1
            total += sampling.process(stages.process_of(loaded)).steps * guided * drawn
        return total

    def _stages(self, name: str) -> tuple[LoadedStage, ...]:
        stages = self.upsamplers if name == "upsampler" else (getattr(self, name),)
        return tuple(filter(None, stages))

    def vary(self, key: jax.Array, pictures: Sequence[np.ndarray], **settings: Any) -> np.ndarray | Generated:
        """Pictures that share what CLIP sees in others (Sec. 3.1), uint8 `[b, h, w, 3]`.

        pictures: uint8 `[h, w, 3]` each, of any size; what is beyond their central square is not seen. settings: those
        of `generate` (key and keys as there), which draws with no caption.
        """
        self.need("decoder")
        embeddings = self._see(pictures)
        unread = {"image_embeddings": embeddings, "caption_to_decoder": False, "warn": False}
        return self.generate(key, ["a variation"] * len(embeddings), **unread, **settings)

    def generate(
        self,
        key: jax.Array,
        captions: Sequence[str],
        *,
        guidance_scale: float | None = None,
        prior: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        upsampler: dict[str, Any] | None = None,
        tile: int | None = None,
        caption_to_decoder: bool = True,
        image_embeddings: jax.Array | None = None,
        batch_size: int = 64,
        strict: bool = False,
        warn: bool = True,
        return_stages: bool = False,
    ) -> np.ndarray | Generated:
        """Pictures of `captions`, uint8 `[b, h, w, 3]`.

        key: one key, from which a caption's key is its place in the batch, or one key a caption `[b]`, with which a
        picture comes out the same alone and in any batch. guidance_scale: the decoder's. prior, decoder, upsampler:
        fields of a stage's Sampling to change, such as `{"steps": "25"}`. tile: enlarge in tiles of that side, to save
        memory. caption_to_decoder: False lets only the image embedding speak. image_embeddings: unit norm `[b, z]`,
        instead of the prior's. strict: a caption that is too long is an error rather than a warning (without `warn`,
        not even that). return_stages: return Generated, with each stage's part.

        Raises InputError, before anything is drawn, for captions, keys or settings that do not fit.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise InputError("there is no caption to draw; give at least one")
        self._check_drawing(image_embeddings)
        self.tokenizer.encode(captions, strict=strict, warn=warn)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
        keys = stages.keys_of(key, len(captions))
        if image_embeddings is not None and len(image_embeddings) != len(captions):
            raise InputError(
                f"{len(image_embeddings)} image embeddings were given for {len(captions)} captions; give one a caption"
            )
        decoder = dict(decoder or {})
        if guidance_scale is not None:
            decoder["guidance_scale"] = float(guidance_scale)
        self.check_sampling(prior=prior or {}, decoder=decoder, upsampler=upsampler or {})
        if tile is not None and not self.upsamplers:
            raise InputError("this run has no upsampler that could work in tiles; leave tile out")
        for stage in self.upsamplers:
            stages.check_tile(stage, tile)
        parts, devices = [], jax.local_device_count()
        # Whole batches, also of the last few captions and of an odd number of them: one compiled program serves all,
        # and every device has its part.
        size = min(batch_size, len(captions))
        size = size if size < devices else -(-size // devices) * devices
        for start in range(0, len(captions), size):
            chosen = np.arange(start, min(start + size, len(captions)))
            filled = np.resize(chosen, size)
            embeddings = None if image_embeddings is None else jnp.asarray(image_embeddings)[filled]
            with warnings.catch_warnings():
                # Said above, once.
                warnings.simplefilter("ignore", CaptionTruncated)
                part = self._generate_batch(
                    keys[filled],
                    [captions[i] for i in filled],
                    embeddings,
                    caption_to_decoder,
                    prior or {},
                    decoder,
                    {"tile": tile, **(upsampler or {})},
                )
            count = len(chosen)
            parts.append(jax.tree.map(lambda value, count=count: np.asarray(value[:count]), part))
        text, image, decoded, upsampled = jax.tree.map(lambda *values: np.concatenate(values), *parts)
        generated = Generated(tuple(captions), text, image, decoded, upsampled)
        return generated if return_stages else generated.pictures

    def _check_drawing(self, image_embeddings: jax.Array | None) -> None:
        """Raises InputError if a stage is missing that drawing takes, or embeddings are given that nobody reads."""
        self.need("decoder")
        if self.decoder.module.reads_image:
            self.need(*(("clip", "prior") if image_embeddings is None else ("clip",)))
        elif image_embeddings is not None:
            raise InputError("this run's decoder reads captions alone; leave image_embeddings out")

    def _generate_batch(self, keys, captions, image_embeddings, caption_to_decoder, prior, decoder, upsampler):
        stage_keys = jax.vmap(lambda key: jax.random.split(key, 2 + len(self.upsamplers)))(keys)
        encoded = self._encode(captions, False)
        if image_embeddings is None and self.decoder.module.reads_image:
            image_embeddings = self._draw(stage_keys[:, 0], encoded, **prior)
        pictures = self._decode(stage_keys[:, 1], image_embeddings, encoded, caption_to_decoder, **decoder)
        decoded, upsampled = to_uint8(pictures), []
        for index in range(len(self.upsamplers)):
            stage, keys = self.upsamplers[index], stage_keys[:, 2 + index]
            pictures = stages.enlarge(stage, keys, pictures, caption=encoded[2:], **upsampler)
            upsampled.append(to_uint8(pictures))
        return encoded[0], image_embeddings, decoded, tuple(upsampled)
