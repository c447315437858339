"""Byte-level BPE tokenizers: `Tokenizer`, whose vocabulary is learned from captions, and `ClipTokenizer`, CLIP's own.

Captions are lowercased and their white space collapsed. Every byte is in the vocabulary, so any alphabet and any emoji
is encoded, seen in training or not. The pair encoding itself is that of Hugging Face `tokenizers`, imported only when
it is used.
"""

import dataclasses
import functools
import gzip
import html
import json
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

PAD, START, END = 0, 1, 2
_SPECIAL = 3  # how many ids come before those of the BPE vocabulary


def _clean(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", _text(caption)).lower().split())


def _text(caption: str) -> str:
    """The caption; ValueError where it holds what is no Unicode text, such as bytes of another encoding."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        shown = caption.encode(errors="backslashreplace").decode()
        raise ValueError(f"the prompt is not valid Unicode text: {shown!r}; write it in UTF-8") from None
    return caption


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
            raise ValueError(
                f"a context length of {self.context_length} has no room for text between the start and end tokens; "
                "use 3 or more"
            )

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary_size: int, context_length: int) -> "Tokenizer":
        """Learns up to `vocabulary_size` tokens, the three special ones and the 256 bytes included.

        Fewer come out where the captions give no more. The order of the captions does not matter.
        Raises ValueError for a vocabulary too small for the bytes.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + _SPECIAL
        if vocabulary_size < least:
            raise ValueError(
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

        The mask is True from the start token through the end token. A caption that is too long is cut, keeps its end
        token, and a UserWarning names the words that were cut (unless `warn` is False); with `strict` that is a
        ValueError. An empty caption is one too.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        cleaned = [_clean(caption) for caption in captions]
        if not all(cleaned):
            raise ValueError("the prompt is empty; say what the picture should show")
        found = []
        for encoding in self._backend.encode_batch(cleaned):
            found.append(([i + _SPECIAL for i in encoding.ids], [start for start, _ in encoding.offsets]))
        return _rows(cleaned, found, self.context_length, (PAD, START, END), strict, warn)

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


@dataclasses.dataclass(frozen=True)
class ClipTokenizer:
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
            raise ValueError(f"a tokenizer's cleaning is ftfy or nfc, not {self.cleaning!r}")

    @classmethod
    def read(cls, path: str | Path, context_length: int = 77, padding: int = 0) -> "ClipTokenizer":
        """From a folder with `vocab.json` and `merges.txt`, or from OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

        Raises ValueError where the files are missing or are not CLIP's.
        """
        path = Path(path)
        try:
            if path.is_dir():
                numbers = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
                lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
                merges = [tuple(line.split()) for line in lines if line.strip()]
                vocabulary = sorted(numbers, key=numbers.get)
            else:
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    lines = file.read().split("\n")
                merges = [tuple(line.split()) for line in lines[1 : _CLIP_VOCABULARY - 512 - 2 + 1]]
                letters = list(byte_letters().values())
                vocabulary = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_CLIP_ENDS]
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{path} holds no vocabulary of CLIP's ({error}); give a folder with vocab.json and merges.txt, or "
                "bpe_simple_vocab_16e6.txt.gz"
            ) from error
        if len(vocabulary) < 514 or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"the vocabulary in {path} is not CLIP's: {len(vocabulary)} tokens, {len(merges)} merges")
        return cls(tuple(vocabulary), tuple(merges), context_length, padding)

    @property
    def vocabulary_size(self) -> int:
        """How many rows an embedding table needs."""
        return len(self.vocabulary)

    def token_rows(self) -> dict[str, int]:
        """The row of an embedding table that each token has."""
        return {token: number for number, token in enumerate(self.vocabulary)}

    @functools.cached_property
    def _backend(self):
        from tokenizers import models

        return models.BPE(self.token_rows(), list(self.merges), end_of_word_suffix=_WORD_END)

    @functools.cached_property
    def _splitter(self):
        from tokenizers import Regex, pre_tokenizers

        if self.cleaning == "nfc":  # the library's own regular expressions know another Unicode than Python's
            split = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        import regex

        return regex.compile(_CLIP_WORDS, regex.IGNORECASE)

    def _words(self, caption: str) -> list[tuple[str, int]]:
        """The pieces of a cleaned caption in the letters of its bytes, and where each begins."""
        if self.cleaning == "nfc":
            return [(piece, start) for piece, (start, _) in self._splitter.pre_tokenize_str(caption)]
        letters = byte_letters()
        return [
            ("".join(letters[byte] for byte in word[0].encode()), word.start())
            for word in self._splitter.finditer(caption)
        ]

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def _ends(self) -> tuple[int, int]:
        return len(self.vocabulary) - 2, len(self.vocabulary) - 1

    def encode(self, captions: Sequence[str], strict: bool = False, warn: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Captions to tokens and mask, as `Tokenizer.encode` does."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        cleaned = [self._clean(caption) for caption in captions]
        if not all(cleaned):
            raise ValueError("the prompt is empty; say what the picture should show")
        return self._rows(cleaned, strict, warn)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask `[1, context_length]` of the empty caption, against which Karlo's networks are guided."""
        return self._rows([""], False, False)

    def _clean(self, caption: str) -> str:
        if self.cleaning == "nfc":
            return self._normalizer.normalize_str(_text(caption)).strip()
        import ftfy

        return " ".join(html.unescape(html.unescape(ftfy.fix_text(_text(caption)))).split()).lower()

    @functools.cached_property
    def _normalizer(self):
        from tokenizers import Regex, normalizers

        return normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )

    def _rows(self, cleaned: list[str], strict: bool, warn: bool) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for caption in cleaned:
            ids, starts = [], []
            for letters, start in self._words(caption):
                tokens = self._backend.tokenize(letters)
                ids.extend(token.id for token in tokens)
                starts.extend([start] * len(tokens))
            found.append((ids, starts))
        return _rows(cleaned, found, self.context_length, (self.padding, *self._ends), strict, warn)

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


def tokenizer_from_json(text: str) -> Tokenizer | ClipTokenizer:
    """The tokenizer that a stage's folder records."""
    return (ClipTokenizer if json.loads(text).get("kind") == "clip" else Tokenizer).from_json(text)


_CLIP_VOCABULARY = 49_408
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"


@functools.cache
def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _rows(
    cleaned: list[str],
    found: list[tuple[list[int], list[int]]],
    context_length: int,
    special: tuple[int, int, int],
    strict: bool,
    warn: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of captions, and where each begins in its caption, as rows with padding, start and end, and their mask."""
    padding, start, end = special
    tokens = np.full((len(cleaned), context_length), padding, np.int32)
    mask = np.zeros(tokens.shape, bool)
    room = context_length - 2
    for row, (caption, (ids, starts)) in enumerate(zip(cleaned, found, strict=True)):
        if len(ids) > room:
            first = min(starts[room], len(caption) - 1)
            begin = first if caption[first].isspace() else caption.rfind(" ", 0, first + 1) + 1
            cut = caption[begin:].strip()
            text = f"the prompt is longer than {context_length} tokens; this part is cut: {cut!r}"
            if strict:
                raise ValueError(text)
            if warn:
                warnings.warn(text, stacklevel=3)
            ids = ids[:room]
        tokens[row, : len(ids) + 2] = [start, *ids, end]
        mask[row, : len(ids) + 2] = True
    return tokens, mask
