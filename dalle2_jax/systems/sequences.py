"""The Transformer of 2017 at work: sequences in, sequences out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.lineage.encoder_decoder import END, PAD
from dalle2_jax.lineage.encoder_decoder_sampling import greedy_decode, sample_decode
from dalle2_jax.lineage.sequence_tasks import FIRST
from dalle2_jax.systems.model import StageModel


@partial(jax.jit, static_argnames=("module", "length"))
def _decode(params, source, keys, temperature, *, module, length):
    if temperature is None:
        return greedy_decode(module, params, source, length)
    return sample_decode(keys, module, params, source, length, temperature)


class SequenceModel(StageModel):
    """A trained encoder-decoder. A sequence is text: its symbols as numbers from 0, such as "3 1 4 1 5"."""

    reads_captions = True

    def generate(
        self,
        key: jax.Array | None,
        captions: Sequence[str] | str | None = None,
        count: int | None = None,
        *,
        temperature: float | None = None,
    ) -> list[str]:
        """What each sequence becomes, `count` of each (default 1).

        temperature: each symbol is sampled from the softmax at it; None: the most probable one is taken, and the key
        and the count have no effect.

        Raises:
            InputError: for no sequence, one that is too long, or symbols that there are not.
        """
        if captions is None:
            raise InputError(f"the stage {self.stage.name} translates sequences; give at least one, such as '3 1 2'")
        captions = [captions] if isinstance(captions, str) else list(captions)
        source = self.encode([caption for caption in captions for _ in range(count or 1)])
        keys = None if temperature is None else key
        made = _decode(self.stage.params, source, keys, temperature, module=self.stage.module, length=source.shape[1])
        return [self._text(row) for row in np.asarray(made)]

    def encode(self, captions: Sequence[str]) -> jax.Array:
        """Sequences as tokens int32 `[b, max_length]`; raises as `generate`."""
        module = self.stage.module
        symbols, longest = module.vocabulary_size - FIRST, module.max_length - 1
        rows = np.full((len(captions), module.max_length), PAD, np.int32)
        for row, caption in zip(rows, captions, strict=True):
            words = caption.split()
            if not words or len(words) > longest:
                raise InputError(f"the sequence {caption!r} has {len(words)} symbols; 1 to {longest} can be read")
            for place, word in enumerate(words):
                if not (word.isascii() and word.isdigit() and int(word) < symbols):
                    raise InputError(f"{word!r} in the sequence {caption!r} is no symbol; they are 0 to {symbols - 1}")
                row[place] = int(word) + FIRST
            row[len(words)] = END
        return jnp.asarray(rows)

    def _text(self, row: np.ndarray) -> str:
        ends = np.flatnonzero((row == END) | (row == PAD))
        return " ".join(str(token - FIRST) for token in row[: ends[0] if len(ends) else None])
