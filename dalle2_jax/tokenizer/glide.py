"""`GlideTokenizer`: that of GLIDE's own caption encoder, which is GPT-2's (glide_text2im/tokenizer/bpe.py)."""

import dataclasses
import functools
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer.common import Published, byte_letters, check_text, optional, rows

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_FILES = (("encoder.json.gz", "vocab.bpe.gz"), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


@dataclasses.dataclass(frozen=True)
class GlideTokenizer(Published):
    """Captions in lower case, with no start and no end token; the last token of the vocabulary fills them up.

    vocabulary: tokens in the order of their numbers. Two with the same fields are equal.
    """

    vocabulary: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    context_length: int = 128

    @classmethod
    def read(cls, folder: str | Path, context_length: int = 128) -> "GlideTokenizer":
        """From a folder with `encoder.json` and `vocab.bpe` (packed or not), or GPT-2's `vocab.json` and `merges.txt`.

        Raises InputError where the files are missing or are not GPT-2's.
        """
        folder = Path(folder)
        found = next((names for names in _FILES if all((folder / name).is_file() for name in names)), None)
        if found is None:
            raise InputError(
                f"{folder} holds no vocabulary of GLIDE's; put glide-text2im's encoder.json.gz and vocab.bpe.gz there, "
                "or GPT-2's vocab.json and merges.txt"
            )
        try:
            numbers, merges = (_read(folder / name) for name in found)
            numbers = json.loads(numbers)
            vocabulary = sorted(numbers, key=numbers.get)
            pairs = [tuple(line.split()) for line in merges.split("\n")[1:] if line.strip()]
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            raise InputError(f"the vocabulary in {folder} is damaged ({error}); fetch it again") from error
        if len(vocabulary) < 257 or any(len(pair) != 2 for pair in pairs):
            raise InputError(f"the vocabulary in {folder} is not GPT-2's: {len(vocabulary)} tokens")
        return cls(tuple(vocabulary), tuple(pairs), context_length)

    @functools.cached_property
    def _backend(self):
        from tokenizers import models

        return models.BPE(self.token_rows(), list(self.merges))

    @functools.cached_property
    def _splitter(self):
        return optional("regex").compile(_WORDS)

    def _words(self, caption: str) -> list[tuple[str, int]]:
        letters = byte_letters()
        words = self._splitter.finditer(caption)
        return [("".join(letters[byte] for byte in word[0].encode()), word.start()) for word in words]

    def encode(self, captions: Sequence[str], strict: bool = False, warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Captions to tokens and mask, as `Tokenizer.encode` does."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        lowered = [check_text(caption).lower() for caption in captions]
        if not all(caption.strip() for caption in lowered):
            raise InputError("the prompt is empty; say what the image should show")
        return rows(lowered, self._found(lowered), self.context_length, self.vocabulary_size - 1, (), strict, warn)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask `[1, context_length]` of the empty caption, which is nothing but padding."""
        return rows([""], [([], [])], self.context_length, self.vocabulary_size - 1, (), False, False)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens [batch, length] back to text, without the padding."""
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        texts = []
        for row in np.asarray(tokens).tolist():
            joined = "".join(self.vocabulary[i] for i in row if i != self.vocabulary_size - 1)
            texts.append(bytes(bytes_of[letter] for letter in joined).decode(errors="replace"))
        return texts

    def to_json(self) -> str:
        return json.dumps({"kind": "glide", **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "GlideTokenizer":
        fields = json.loads(text)
        return cls(tuple(fields["vocabulary"]), tuple(map(tuple, fields["merges"])), fields["context_length"])


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")
