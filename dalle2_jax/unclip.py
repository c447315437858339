"""DALLE2: the assembled cascade. Captions go in, pictures come out.

A batch that divides by the number of local devices is shared out among them; a picture depends on its own key and
caption alone, not on the batch it is drawn in.

model = DALLE2.load("runs/demo")
pictures = model.generate(jax.random.key(0), ["a small red circle on a gray background"])
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.checkpoint import CheckpointError, LoadedStage, load_stage
from dalle2_jax.data.transforms import clip_pixels
from dalle2_jax.decoder import Caption, invert_decoder, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import Process, Sampling
from dalle2_jax.layers.pictures import resize, to_float, to_uint8
from dalle2_jax.prior import sample_prior
from dalle2_jax.sharding import batch_parts, batch_sharding, make_mesh
from dalle2_jax.tokenizer import ClipTokenizer, Tokenizer, tokenizer_from_json

_STATIC = ("module", "process", "sampling")

# What CLIP makes of captions: their embeddings, its text states, the tokens and their mask.
Encoded = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@partial(jax.jit, static_argnames="module")
def _encode_text(params, tokens, mask, *, module):
    return module.apply({"params": params}, tokens, mask, method="encode_text")


@partial(jax.jit, static_argnames="module")
def _encode_image(params, pictures, *, module):
    pictures = resize(to_float(pictures), module.vision.image_size)
    return module.apply({"params": params}, pictures, method="encode_image")


@partial(jax.jit, static_argnames=_STATIC)
def _prior(keys, params, text_embedding, text, mask, null, *, module, process, sampling):
    return sample_prior(keys, module, params, process, sampling, text_embedding, text, mask, null)


@partial(jax.jit, static_argnames=_STATIC)
def _decode(keys, params, embedding, caption, x_T, *, module, process, sampling):
    return sample_decoder(keys, module, params, process, sampling, embedding, caption, x_T)


@partial(jax.jit, static_argnames=(*_STATIC, "refinements"))
def _invert(params, pictures, embedding, caption, *, module, process, sampling, refinements):
    pictures = resize(to_float(pictures), module.unet.image_size)
    return invert_decoder(module, params, process, sampling, pictures, embedding, caption, refinements)


@partial(jax.jit, static_argnames=(*_STATIC, "size", "tile"))
def _upsample(keys, params, low_resolution, *, module, process, sampling, size, tile):
    return sample_upsampler(keys, module, params, process, sampling, low_resolution, size, tile)


def _placed(stage: LoadedStage) -> LoadedStage:
    """The stage with its parameters on a device."""
    return dataclasses.replace(stage, params=jax.device_put(stage.params))


def _process(stage: LoadedStage) -> Process:
    """The process a stage was trained with, and what was measured of the network then."""
    error = stage.info.get("measured", {}).get("x0_error")
    return dataclasses.replace(stage.part("process"), x0_error=None if error is None else tuple(error))


def _sampling(stage: LoadedStage, changes: dict[str, Any]) -> Sampling:
    """The stage's own sampling settings with some changed; ValueError for changes that would have no effect."""
    own = stage.part("sampling")
    for name in changes:
        if name not in (known := [field.name for field in dataclasses.fields(own)]):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"sampling has no field {name!r}; the nearest of {', '.join(known)} is {near}")
    sampling = dataclasses.replace(own, **changes)
    idle = {
        "variance": "" if sampling.sampler == "ddpm" else f"the sampler {sampling.sampler}; take ddpm",
        "eta": "" if sampling.sampler == "ddim" else f"the sampler {sampling.sampler}; take ddim",
        "percentile": "" if sampling.threshold == "dynamic" else "this threshold; take threshold dynamic",
        "candidates": "" if stage.kind == "prior" else f"the {stage.kind}; the prior draws them",
        "guidance_scale": "an upsampler, which reads no caption" if stage.kind == "upsampler" else "",
        "guidance_interval": "an upsampler, which reads no caption" if stage.kind == "upsampler" else "",
    }
    for name, reason in idle.items():
        if reason and getattr(sampling, name) != getattr(own, name):
            raise ValueError(f"{name} has no effect with {reason}")
    return sampling


def _keys(key: jax.Array, count: int) -> jax.Array:
    """One key a caption, from one key for all of them or from one each."""
    key = key if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    keys = jax.random.split(key, count) if key.ndim == 0 else key
    if keys.shape != (count,):
        raise ValueError(f"{keys.size} keys were given for {count} captions; give one key, or one a caption")
    return keys


def _spread(*arrays: Any) -> tuple[Any, ...]:
    """Shares a batch out among this process's devices, if it divides by their number; else leaves it as it is."""
    mesh = make_mesh(devices=jax.local_devices())
    if arrays[0].shape[0] % batch_parts(mesh):
        return arrays
    return jax.device_put(arrays, batch_sharding(mesh))


def _check_tile(stage: LoadedStage, tile: int | None) -> None:
    unet = stage.module.unet
    divisor = unet.patch * 2 ** (len(unet.channel_multipliers) - 1)
    if tile is not None and (tile < 1 or tile % divisor):
        raise ValueError(f"tile is {tile}; tiles of the stage {stage.name} must be multiples of {divisor}")


def enlarge(
    stage: LoadedStage, keys: jax.Array, pictures: jax.Array, *, tile: int | None = None, **changes: Any
) -> jax.Array:
    """Enlarges `[b, h, w, 3]` in [-1, 1] with a trained upsampler to its own size; returns the same range.

    keys: one, or one a picture `[b]`. tile: the side of the tiles it is done in, to save memory; None: whole. changes:
    fields of the stage's Sampling. Raises ValueError for changes and tiles that the stage cannot have.
    """
    _check_tile(stage, tile)
    keys, pictures = _spread(_keys(keys, pictures.shape[0]), pictures)
    return _upsample(
        keys,
        stage.params,
        pictures,
        module=stage.module,
        process=_process(stage),
        sampling=_sampling(stage, changes),
        size=stage.info["image_size"],
        tile=tile,
    )


@dataclass(frozen=True)
class Generated:
    """What each stage contributed to a batch of pictures.

    image_embeddings: unit norm `[b, z]`, from the prior. decoded: uint8 `[b, h, w, 3]`, from the decoder. upsampled: a
    tuple of uint8 pictures, one an upsampler. pictures: the last of these.
    """

    captions: tuple[str, ...]
    text_embeddings: np.ndarray
    image_embeddings: np.ndarray
    decoded: np.ndarray
    upsampled: tuple[np.ndarray, ...]

    @property
    def pictures(self) -> np.ndarray:
        return self.upsampled[-1] if self.upsampled else self.decoded


@dataclass(frozen=True)
class DALLE2:
    """CLIP, prior, decoder and upsamplers of one run, with the tokenizer they were trained with.

    Without a prior (None) it draws variations of pictures, and nothing from captions alone.
    """

    clip: LoadedStage
    prior: LoadedStage | None
    decoder: LoadedStage
    upsamplers: tuple[LoadedStage, ...]
    tokenizer: Tokenizer | ClipTokenizer

    @classmethod
    def load(cls, run: str | Path, *, ema: bool = True) -> DALLE2:
        """Reads the finished or latest checkpoints of `run`; needs no config file and no training code.

        ema: read the averaged parameters (the default) rather than the raw ones. Raises CheckpointError where the run
        or one of its stages is missing or damaged.
        """
        run = Path(run)
        if not run.is_dir():
            raise CheckpointError(f"there is no run at {run}; train one with `python -m train configs/shapes.py all`")
        stages = [load_stage(path.parent, ema=ema) for path in sorted(run.glob("*/stage.json"))]
        by_kind: dict[str, list[LoadedStage]] = {}
        for stage in stages:
            by_kind.setdefault(stage.kind, []).append(stage)
        for kind, least in (("clip", 1), ("prior", 0), ("decoder", 1)):
            if not least <= len(by_kind.get(kind, [])) <= 1:
                found = ", ".join(stage.name for stage in stages) or "none"
                raise CheckpointError(
                    f"{run} needs {'exactly' if least else 'at most'} one {kind} stage to draw pictures; its stages "
                    f"are: {found}"
                )
        upsamplers = tuple(sorted(by_kind.get("upsampler", []), key=lambda stage: stage.info["image_size"]))
        size = by_kind["decoder"][0].info["image_size"]
        for upsampler in upsamplers:
            if upsampler.info["low_size"] != size:
                raise CheckpointError(
                    f"the stage {upsampler.name} of {run} enlarges {upsampler.info['low_size']} px pictures but the "
                    f"stage before it makes {size} px; train them with matching sizes"
                )
            size = upsampler.info["image_size"]
        clip, decoder = by_kind["clip"][0], by_kind["decoder"][0]
        prior = by_kind.get("prior", [None])[0]
        for stage in filter(None, (prior, decoder)):
            if stage.info.get("built_on", {}).get("clip", clip.version) != clip.version:
                warnings.warn(
                    f"the stage {stage.name} of {run} was trained on another clip than the one that is there now: its "
                    f"pictures will not fit their captions; delete {run / stage.name} and train it anew",
                    stacklevel=2,
                )
        tokenizer = tokenizer_from_json(clip.info["tokenizer"])
        # On the devices once, and not at every call.
        clip, decoder, *upsamplers = map(_placed, (clip, decoder, *upsamplers))
        return cls(clip, prior and _placed(prior), decoder, tuple(upsamplers), tokenizer)

    @property
    def image_size(self) -> int:
        """The side of the final pictures."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).info["image_size"]

    def encode_text(self, captions: Sequence[str], *, strict: bool = False) -> Encoded:
        """CLIP's caption embeddings, unit norm `[b, z]`; then its text states, the tokens and their mask."""
        tokens, mask = _spread(*map(jnp.asarray, self.tokenizer.encode(captions, strict=strict)))
        embedding, states = _encode_text(self.clip.params, tokens, mask, module=self.clip.module)
        return embedding, states, tokens, mask

    def encode_image(self, pictures: np.ndarray) -> jax.Array:
        """CLIP's image embeddings, unit norm `[b, z]`, of uint8 pictures `[b, h, h, 3]`."""
        (pictures,) = _spread(jnp.asarray(pictures))
        return _encode_image(self.clip.params, pictures, module=self.clip.module)

    def draw_embeddings(
        self, keys: jax.Array, captions: Sequence[str], *, strict: bool = False, **changes: Any
    ) -> jax.Array:
        """Image embeddings `[b, z]` from the prior; `changes` are fields of its Sampling (steps, candidates, ...)."""
        return self._draw(keys, self.encode_text(captions, strict=strict), **changes)

    def _draw(self, keys: jax.Array, encoded: Encoded, **changes: Any) -> jax.Array:
        if self.prior is None:
            raise ValueError("this run has no prior, which draws image embeddings of captions; give image_embeddings")
        text_embedding, states, tokens, mask = encoded
        text = tokens if self.prior.module.vocabulary_size is not None else states
        (keys,) = _spread(_keys(keys, text_embedding.shape[0]))
        return _prior(
            keys,
            self.prior.params,
            text_embedding,
            text,
            mask,
            None if self.prior.module.learned_null else self._empty,
            module=self.prior.module,
            process=_process(self.prior),
            sampling=_sampling(self.prior, changes),
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
        encoded = self.encode_text(captions or ["nothing"] * image_embeddings.shape[0], strict=strict)
        return self._decode(keys, image_embeddings, encoded, captions is not None, x_T, **changes)

    def _decode(
        self,
        keys: jax.Array,
        image_embeddings: jax.Array,
        encoded: Encoded,
        keep_text: bool,
        x_T: jax.Array | None = None,
        **changes: Any,
    ) -> jax.Array:
        keys, image_embeddings = _spread(_keys(keys, image_embeddings.shape[0]), image_embeddings)
        return _decode(
            keys,
            self.decoder.params,
            image_embeddings,
            self._caption(encoded, keep_text),
            x_T,
            module=self.decoder.module,
            process=_process(self.decoder),
            sampling=_sampling(self.decoder, changes),
        )

    def _caption(self, encoded: Encoded, keep_text: bool) -> Caption:
        """What the decoder reads of encoded captions."""
        embedding, states, tokens, mask = encoded
        decoder, kept = self.decoder.module, jnp.full(embedding.shape[0], keep_text)
        if decoder.text is not None:
            return Caption(tokens, mask, kept)
        if decoder.text_width is None:
            return Caption(None, None, kept)
        null = None
        if not decoder.learned_null_text:
            empty_embedding, empty_states, empty_mask = self._empty
            null = (empty_states, empty_mask, empty_embedding)
        return Caption(states, mask, kept, embedding if decoder.pools_embedding else None, null)

    @cached_property
    def _empty(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Text embedding, states and mask `[1, ...]` of the empty caption, for networks that learned no null one."""
        tokens, mask = map(jnp.asarray, self.tokenizer.empty())
        embedding, states = _encode_text(self.clip.params, tokens, mask, module=self.clip.module)
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
        embeddings = self.encode_image(pictures)
        encoded = self.encode_text(captions or ["nothing"] * len(pictures))
        (pictures,) = _spread(jnp.asarray(pictures))
        x_T = _invert(
            self.decoder.params,
            pictures,
            embeddings,
            self._caption(encoded, captions is not None),
            module=self.decoder.module,
            process=_process(self.decoder),
            sampling=_sampling(self.decoder, {**changes, "sampler": "ddim"}),
            refinements=refinements,
        )
        return embeddings, x_T

    def upsample(
        self, keys: jax.Array, pictures: jax.Array, *, index: int = 0, tile: int | None = None, **changes: Any
    ) -> jax.Array:
        """Enlarges `[b, h, w, 3]` in [-1, 1] with upsampler number `index`; returns the same range.

        tile: the side of the tiles it is done in, to save memory; None: whole.
        """
        return enlarge(self.upsamplers[index], keys, pictures, tile=tile, **changes)

    def check_sampling(self, **changes: dict[str, Any]) -> None:
        """Raises ValueError for fields of a stage's Sampling (`decoder={"steps": "12"}`) that it cannot have."""
        for stage, fields in changes.items():
            loaded_stages = self._stages(stage)
            if fields and not loaded_stages:
                raise ValueError(f"this run has no {stage} whose {', '.join(fields)} could be changed")
            for loaded in loaded_stages:
                _sampling(loaded, fields).process(_process(loaded))

    def evaluations(self, stage: str, changes: dict[str, Any]) -> int:
        """How many times the stage's network is asked for one picture, under these fields of its Sampling."""
        total = 0
        for loaded in self._stages(stage):
            sampling = _sampling(loaded, changes)
            guided = 2 if sampling.guidance_scale != 1 and stage != "upsampler" else 1
            drawn = sampling.candidates if stage == "prior" else 1
            total += sampling.process(_process(loaded)).steps * guided * drawn
        return total

    def _stages(self, name: str) -> tuple[LoadedStage, ...]:
        stages = self.upsamplers if name == "upsampler" else (getattr(self, name),)
        return tuple(filter(None, stages))

    def vary(self, key: jax.Array, pictures: Sequence[np.ndarray], **settings: Any) -> np.ndarray | Generated:
        """Pictures that share what CLIP sees in others (Sec. 3.1), uint8 `[b, h, w, 3]`.

        pictures: uint8 `[h, w, 3]` each, of any size; what is beyond their central square is not seen. settings: those
        of `generate` (key and keys as there), which draws with no caption.
        """
        size = self.clip.module.vision.image_size if self.clip.module.vision is not None else 0
        if not size:
            raise ValueError("this run's CLIP reads captions alone; convert a run with a picture encoder")
        embeddings = self.encode_image(np.stack([clip_pixels(np.asarray(picture), size) for picture in pictures]))
        return self.generate(
            key, ["a variation"] * len(embeddings), image_embeddings=embeddings, caption_to_decoder=False, **settings
        )

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

        Raises ValueError, before anything is drawn, for captions, keys or settings that do not fit.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("there is no caption to draw; give at least one")
        self.tokenizer.encode(captions, strict=strict, warn=warn)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        keys = _keys(key, len(captions))
        if image_embeddings is not None and len(image_embeddings) != len(captions):
            raise ValueError(
                f"{len(image_embeddings)} image embeddings were given for {len(captions)} captions; give one a caption"
            )
        decoder = dict(decoder or {})
        if guidance_scale is not None:
            decoder["guidance_scale"] = float(guidance_scale)
        self.check_sampling(prior=prior or {}, decoder=decoder, upsampler=upsampler or {})
        if tile is not None and not self.upsamplers:
            raise ValueError("this run has no upsampler that could work in tiles; leave tile out")
        for stage in self.upsamplers:
            _check_tile(stage, tile)
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
                warnings.filterwarnings("ignore", message="the prompt is longer")
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

    def _generate_batch(self, keys, captions, image_embeddings, caption_to_decoder, prior, decoder, upsampler):
        stage_keys = jax.vmap(lambda key: jax.random.split(key, 2 + len(self.upsamplers)))(keys)
        encoded = self.encode_text(captions)
        if image_embeddings is None:
            image_embeddings = self._draw(stage_keys[:, 0], encoded, **prior)
        pictures = self._decode(stage_keys[:, 1], image_embeddings, encoded, caption_to_decoder, **decoder)
        decoded, upsampled = to_uint8(pictures), []
        for index in range(len(self.upsamplers)):
            pictures = self.upsample(stage_keys[:, 2 + index], pictures, index=index, **upsampler)
            upsampled.append(to_uint8(pictures))
        return encoded[0], image_embeddings, decoded, tuple(upsampled)
