"""What a user can mend: input errors, warnings, and the nearest of the names there are."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used: a config, caption, image, checkpoint, file or shape.

    The message is one sentence that names the thing and says what to do. The command lines print it and exit with 2.
    Any other exception is a fault of this package and shows its traceback.
    """


class CaptionTruncated(UserWarning):
    """A caption is longer than the tokenizer's context, and its end is cut."""


class StageMismatch(UserWarning):
    """A stage was trained on another CLIP than the one that is there now."""


def sentence_for_user(error: BaseException) -> str | None:
    """What to tell the user of an error that they can mend; None for a fault of ours, whose traceback has to be shown.

    Files that cannot be opened or written are the user's too, where the error names them.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}"
    return None


def nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar of the `known` names; None if none is as similar as `cutoff` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
