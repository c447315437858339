"""What the tokenizers share: the letters of bytes, and captions' ids as rows of one length."""

import dataclasses
import functools
import importlib
import warnings
from types import ModuleType

import numpy as np

from dalle2_jax.errors import CaptionTruncated, InputError


def check_text(caption: str) -> str:
    """The caption; InputError where it holds what is no Unicode text, such as bytes of another encoding."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        shown = caption.encode(errors="backslashreplace").decode()
        raise InputError(f"the prompt is not valid Unicode text: {shown!r}; write it in UTF-8") from None
    return caption


def optional(name: str) -> ModuleType:
    """A library that only public weights' tokenizers need; InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"this run's tokenizer needs {name}; pip install {name}, or 'dalle2-jax[weights]'") from error


class Published:
    """A tokenizer whose tokens, `vocabulary`, stand in the order of their numbers: what CLIP's and GLIDE's share.

    They are dataclasses that also have `_backend`, the pair encoding, and `_words`, which cuts a caption into pieces in
    the letters of their bytes, each with where it begins.
    """

    @property
    def vocabulary_size(self) -> int:
        """How many rows an embedding table needs."""
        return len(self.vocabulary)

    def token_rows(self) -> dict[str, int]:
        """The row of an embedding table that each token has."""
        return {token: number for number, token in enumerate(self.vocabulary)}

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _found(self, captions: list[str]) -> list[tuple[list[int], list[int]]]:
        """The ids of captions, and where each begins in its caption."""
        found = []
        for caption in captions:
            ids, starts = [], []
            for letters, start in self._words(caption):
                tokens = self._backend.tokenize(letters)
                ids.extend(token.id for token in tokens)
                starts.extend([start] * len(tokens))
            found.append((ids, starts))
        return found


@functools.cache
def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def rows(
    cleaned: list[str],
    found: list[tuple[list[int], list[int]]],
    context_length: int,
    padding: int,
    ends: tuple[int, ...],
    strict: bool,
    warn: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [batch, context_length] and their mask, of captions' ids and where each begins in its caption.

    ends: the tokens before and after a caption; () where there are none. A caption that is too long is cut, keeps its
    end token, and a CaptionTruncated warning names the words that were cut (unless `warn` is False); with `strict` that
    is an InputError.
    """
    before, after = ends[:1], ends[1:]
    tokens = np.full((len(cleaned), context_length), padding, np.int32)
    mask = np.zeros(tokens.shape, bool)
    room = context_length - len(ends)
    for row, (caption, (ids, starts)) in enumerate(zip(cleaned, found, strict=True)):
        if len(ids) > room:
            first = min(starts[room], len(caption) - 1)
            begin = first if caption[first].isspace() else caption.rfind(" ", 0, first + 1) + 1
            cut = caption[begin:].strip()
            text = f"the prompt is longer than {context_length} tokens; this part is cut: {cut!r}"
            if strict:
                raise InputError(text)
            if warn:
                warnings.warn(text, CaptionTruncated, stacklevel=3)
            ids = ids[:room]
        filled = [*before, *ids, *after]
        tokens[row, : len(filled)] = filled
        mask[row, : len(filled)] = True
    return tokens, mask
