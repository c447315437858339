"""`Tokenizer`: byte-level BPE whose vocabulary is learned from captions.

Captions are lowercased and their white space collapsed. Every byte is in the vocabulary, so any alphabet and any emoji
is encoded, seen in training or not. The pair encoding itself is that of Hugging Face `tokenizers`, imported only when
it is used.
"""

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer.common import check_text, rows

PAD, START, END = 0, 1, 2
_SPECIAL = 3  # how many ids come before those of the BPE vocabulary


def _clean(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", check_text(caption)).lower().split())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Learned from captions; token 0 is padding, 1 starts a caption and 2 ends it, the rest is byte-level BPE.

    Made by `Tokenizer.train` or `tokenizer_from_json`; two with the same vocabulary, merges and length are equal.
    """

    vocabulary: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    context_length: int

    def __post_init__(self):
        if self.context_length < 3:
            raise InputError(
                f"a context length of {self.context_length} has no room for text between the start and end tokens; "
                "use 3 or more"
            )

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary_size: int, context_length: int) -> "Tokenizer":
        """Learns up to `vocabulary_size` tokens, the three special ones and the 256 bytes included.

        Fewer come out where the captions give no more. The order of the captions does not matter.
        Raises InputError for a vocabulary too small for the bytes.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + _SPECIAL
        if vocabulary_size < least:
            raise InputError(
                f"a vocabulary of {vocabulary_size} is too small; all bytes and special tokens take {least}"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size - _SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(sorted(_clean(caption) for caption in captions), trainer)
        model = json.loads(backend.to_str())["model"]
        vocabulary = tuple(sorted(model["vocab"], key=model["vocab"].get))
        merges = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        return cls(vocabulary, tuple(merges), context_length)

    @functools.cached_property
    def _backend(self):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        backend = Backend(models.BPE({token: i for i, token in enumerate(self.vocabulary)}, list(self.merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token: how many rows an embedding table needs."""
        return len(self.vocabulary) + _SPECIAL

    def token_rows(self) -> dict[str, int]:
        """The row of an embedding table that each token has; padding, start and end are named <pad>, <start>, <end>."""
        rows = {"<pad>": PAD, "<start>": START, "<end>": END}
        return rows | {token: number + _SPECIAL for number, token in enumerate(self.vocabulary)}

    def encode(self, captions: Sequence[str], strict: bool = False, warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Captions to (tokens int32 [batch, context_length], mask bool [batch, context_length]).

        The mask is True from the start token through the end token. A caption that is too long is cut and keeps its
        end token; a CaptionTruncated warning names the words that were cut (unless `warn` is False), and with `strict`
        it is an InputError. So is an empty caption, always.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        cleaned = [_clean(caption) for caption in captions]
        if not all(cleaned):
            raise InputError("the prompt is empty; say what the image should show")
        found = []
        for encoding in self._backend.encode_batch(cleaned):
            found.append(([i + _SPECIAL for i in encoding.ids], [start for start, _ in encoding.offsets]))
        return rows(cleaned, found, self.context_length, PAD, (START, END), strict, warn)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask `[1, context_length]` of the empty caption, which stands for no caption at all."""
        return rows([""], [([], [])], self.context_length, PAD, (START, END), False, False)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens [batch, length] back to text, up to the end token; special tokens are left out."""
        texts = []
        for row in np.asarray(tokens).tolist():
            row = row[: row.index(END)] if END in row else row
            texts.append(self._backend.decode([i - _SPECIAL for i in row if i >= _SPECIAL]))
        return texts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        fields = json.loads(text)
        return cls(tuple(fields["vocabulary"]), tuple(map(tuple, fields["merges"])), fields["context_length"])
