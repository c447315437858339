"""What the systems of the lineage have in common: images of keys, and of captions where the network reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import numpy as np

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.checkpoint.run import require
from dalle2_jax.diffusion.sampler import keys_for
from dalle2_jax.errors import InputError
from dalle2_jax.layers.pixels import in_colour
from dalle2_jax.tokenizer import AnyTokenizer
from dalle2_jax.unclip.embed import cosines
from dalle2_jax.unclip.generate import repeat_captions
from dalle2_jax.unclip.placement import device_batches, shard_batch
from dalle2_jax.unclip.sample import Call
from dalle2_jax.unclip.settings import check_names, check_sampling


@dataclass(frozen=True, repr=False)
class StageModel:
    """A trained stage at work, with the stages that it needs.

    Fields:
        stage: its network. others: the stages it works with, by kind. tokenizer: of the run; None: there is none.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # kinds of the other stages that it cannot do without
    takes: ClassVar[tuple[str, ...]] = ()  # kinds of those that it works with where the run has them
    reads_captions: ClassVar[bool] = False

    stage: LoadedStage
    others: Mapping[str, LoadedStage] = field(default_factory=dict)
    tokenizer: AnyTokenizer | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{stage.name}: {stage.kind}' for stage in self.stages)})"

    @property
    def stages(self) -> tuple[LoadedStage, ...]:
        """Those that are at work, in their order."""
        parts = (stage for kind, stage in self.others.items() if kind in self.needs)
        return (*parts, self.stage)


class ImageModel(StageModel, ABC):
    """A stage that samples images."""

    @property
    def image_size(self) -> int:
        """The side of the images."""
        return self.stage.record.image_size

    def require(self, *kinds: str) -> None:
        """Raises InputError if there is no stage of one of the kinds, such as "clip"."""
        require((*self.others.values(), self.stage), *kinds)

    def scores(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> jax.Array:
        """Cosines `[images, captions]` of the embeddings of the run's CLIP, as those of `DALLE2.scores`."""
        self.require("clip")
        return cosines(self.others["clip"], self.tokenizer, images, captions)

    @abstractmethod
    def call(self, keys: jax.Array, captions: Any = None, **changes: Any) -> Call[jax.Array]:
        """What samples one image a key `[b]`, in [-1, 1].

        captions: as `encode` gives them; None where none are read. changes: fields of the stage's sampling settings.
        """

    def encode(self, captions: Sequence[str], *, strict: bool = False, warn: bool = True) -> Any:
        """Captions as `call` takes them: arrays `[b, ...]`."""
        return self.tokenizer.encode(list(captions), strict=strict, warn=warn)

    def check_sampling(self, **changes: Any) -> None:
        """Raises InputError for sampling settings that the stage does not have."""
        if self.stage.record.sampling is not None:
            own = self.stage.record.rebuilt("sampling")
            check_names(own, changes, f"the stage {self.stage.name} has no sampling setting")
            check_sampling(self.stage, changes)
        elif changes:
            raise InputError(f"the stage {self.stage.name} has no sampling settings; leave {next(iter(changes))} out")

    def generate(
        self,
        key: jax.Array,
        captions: Sequence[str] | str | None = None,
        count: int | None = None,
        *,
        batch_size: int = 64,
        strict: bool = False,
        warn: bool = True,
        **changes: Any,
    ) -> np.ndarray:
        """Images, uint8 `[b, h, w, 3]`: `count` of each caption, or `count` where no captions are read (default 1).

        Args:
            key: one key, or one an image `[b]`, with which an image is the same alone and in any batch.
            batch_size: images sampled at a time. strict: a caption that is too long is an error, not a warning.
            changes: fields of the stage's sampling settings (steps, temperature, ...).

        Raises:
            InputError: for captions where none are read, none where they are, or settings that do not fit.
        """
        captions, count = self.checked(captions, count)
        self.check_sampling(**changes)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
        encoded = None if captions is None else self.encode(captions, strict=strict, warn=warn)
        keys = keys_for(key, count)
        parts = []
        for rows, kept in device_batches(count, batch_size):
            part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (keys, encoded))
            images = in_colour(self.call(*shard_batch(part), **changes)())
            parts.append(np.asarray(images[:kept]))
        return np.concatenate(parts)

    def checked(self, captions: Sequence[str] | str | None, count: int | None) -> tuple[list[str] | None, int]:
        """The captions, one an image, or None; and how many images these are. Raises InputError as `generate`."""
        if self.reads_captions and captions is None:
            raise InputError(f"the stage {self.stage.name} samples images of captions; give at least one")
        if not self.reads_captions and captions is not None:
            raise InputError(
                f"the stage {self.stage.name} reads no captions; leave them out, and say by count how many images"
            )
        return repeat_captions(captions, count)
