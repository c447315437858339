"""What the tokenizers share: the letters of bytes, and captions' ids as rows of one length."""

import functools
import warnings

import numpy as np


def check_text(caption: str) -> str:
    """The caption; ValueError where it holds what is no Unicode text, such as bytes of another encoding."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        shown = caption.encode(errors="backslashreplace").decode()
        raise ValueError(f"the prompt is not valid Unicode text: {shown!r}; write it in UTF-8") from None
    return caption


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
    end token, and a UserWarning names the words that were cut (unless `warn` is False); with `strict` that is a
    ValueError.
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
                raise ValueError(text)
            if warn:
                warnings.warn(text, stacklevel=3)
            ids = ids[:room]
        filled = [*before, *ids, *after]
        tokens[row, : len(filled)] = filled
        mask[row, : len(filled)] = True
    return tokens, mask
