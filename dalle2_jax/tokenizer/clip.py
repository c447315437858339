"""`ClipTokenizer`: that of OpenAI's CLIP and of open_clip, read from the vocabulary files that come with weights."""

import dataclasses
import functools
import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.tokenizer.common import Published, byte_letters, check_text, optional, rows

_VOCABULARY = 49_408
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"


@dataclasses.dataclass(frozen=True)
class ClipTokenizer(Published):
    """CLIP's tokenizer (OpenAI's clip/simple_tokenizer.py; open_clip's tokenizer.py), read from its vocabulary files.

    vocabulary: tokens in the order of their numbers, the start and the end token last. padding: the number that fills
    captions up; public checkpoints disagree on it (0, or the end token's), and the mask says what is padding.
    cleaning: "ftfy", of damaged text and HTML, as in CLIP's training and in open_clip; or "nfc", of Unicode's forms
    alone, as transformers does today. Two with the same fields are equal.
    """

    vocabulary: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    context_length: int = 77
    padding: int = 0
    cleaning: str = "ftfy"

    def __post_init__(self):
        if self.cleaning not in ("ftfy", "nfc"):
            raise InputError(f"a tokenizer's cleaning is ftfy or nfc, not {self.cleaning!r}")

    @classmethod
    def read(cls, path: str | Path, context_length: int = 77, padding: int = 0) -> "ClipTokenizer":
        """From a folder with `vocab.json` and `merges.txt`, or `tokenizer.json`, or from OpenAI's packed file.

        Raises InputError where the files are missing or are not CLIP's.
        """
        path = Path(path)
        try:
            if path.is_dir() and not (path / "vocab.json").is_file() and (path / "tokenizer.json").is_file():
                model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
                vocabulary = sorted(model["vocab"], key=model["vocab"].get)
                merges = [tuple(merge.split()) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
            elif path.is_dir():
                numbers = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
                lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
                merges = [tuple(line.split()) for line in lines if line.strip()]
                vocabulary = sorted(numbers, key=numbers.get)
            else:
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    lines = file.read().split("\n")
                merges = [tuple(line.split()) for line in lines[1 : _VOCABULARY - 512 - 2 + 1]]
                letters = list(byte_letters().values())
                vocabulary = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_ENDS]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise InputError(
                f"{path} holds no vocabulary of CLIP's ({error}); give a folder with vocab.json and merges.txt or with "
                "tokenizer.json, or bpe_simple_vocab_16e6.txt.gz"
            ) from error
        if len(vocabulary) < 514 or any(len(merge) != 2 for merge in merges):
            raise InputError(f"the vocabulary in {path} is not CLIP's: {len(vocabulary)} tokens, {len(merges)} merges")
        return cls(tuple(vocabulary), tuple(merges), context_length, padding)

    @functools.cached_property
    def _backend(self):
        from tokenizers import models

        return models.BPE(self.token_rows(), list(self.merges), end_of_word_suffix=_WORD_END)

    @functools.cached_property
    def _splitter(self):
        from tokenizers import Regex, pre_tokenizers

        if self.cleaning == "nfc":  # the library's own regular expressions know another Unicode than Python's
            split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        regex = optional("regex")
        return regex.compile(_WORDS, regex.IGNORECASE)

    def _words(self, caption: str) -> list[tuple[str, int]]:
        """The pieces of a cleaned caption in the letters of its bytes, and where each begins."""
        if self.cleaning == "nfc":
            return [(piece, start) for piece, (start, _) in self._splitter.pre_tokenize_str(caption)]
        letters = byte_letters()
        return [
            ("".join(letters[byte] for byte in word[0].encode()), word.start())
            for word in self._splitter.finditer(caption)
        ]

    @property
    def _ends(self) -> tuple[int, int]:
        return len(self.vocabulary) - 2, len(self.vocabulary) - 1

    def encode(self, captions: Sequence[str], strict: bool = False, warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Captions to tokens and mask, as `Tokenizer.encode` does."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        cleaned = [self._clean(caption) for caption in captions]
        if not all(cleaned):
            raise InputError("the prompt is empty; say what the image should show")
        return self._rows(cleaned, strict, warn)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask `[1, context_length]` of the empty caption, which stands for no caption at all."""
        return self._rows([""], False, False)

    def _clean(self, caption: str) -> str:
        if self.cleaning == "nfc":
            return self._normalizer.normalize_str(check_text(caption)).strip()
        fixed = optional("ftfy").fix_text(check_text(caption))
        return " ".join(html.unescape(html.unescape(fixed)).split()).lower()

    @functools.cached_property
    def _normalizer(self):
        from tokenizers import Regex, normalizers

        return normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )

    def _rows(self, cleaned: list[str], strict: bool, warn: bool) -> tuple[np.ndarray, np.ndarray]:
        return rows(cleaned, self._found(cleaned), self.context_length, self.padding, self._ends, strict, warn)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens [batch, length] back to text, up to the end token; special tokens are left out."""
        start, end = self._ends
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        texts = []
        for row in np.asarray(tokens).tolist():
            row = row[: row.index(end)] if end in row else row
            joined = "".join(self.vocabulary[i] for i in row if i != start)
            parts = (bytes(bytes_of[letter] for letter in part) for part in joined.split(_WORD_END))
            texts.append(b" ".join(parts).decode(errors="replace").strip())
        return texts

    def to_json(self) -> str:
        return json.dumps({"kind": "clip", **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "ClipTokenizer":
        fields = json.loads(text)
        merges = tuple(map(tuple, fields["merges"]))
        plain = {name: fields[name] for name in ("context_length", "padding", "cleaning")}
        return cls(tuple(fields["vocabulary"]), merges, **plain)
