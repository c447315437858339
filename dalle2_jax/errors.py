"""What a user can mend: input errors, warnings, and the nearest of the names there are."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


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


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raises InputError, naming the range, unless a field holds a number in it: finite, and whole if it is to be."""
    bounds = [
        (at_least, "{} or more", operator.ge),
        (above, "above {}", operator.gt),
        (at_most, "at most {}", operator.le),
        (below, "below {}", operator.lt),
    ]
    bounds = [bound for bound in bounds if bound[0] is not None]
    kind = numbers.Integral if whole else numbers.Real
    is_number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and all(holds(value, end) for end, _, holds in bounds):
        return
    wanted = [] if is_number else ["a whole number" if whole else "a finite number"]
    wanted += [" and ".join(words.format(end) for end, words, _ in bounds)] if bounds else []
    raise InputError(f"{name} is {value!r}; it must be {', '.join(wanted)}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar of the `known` names; None if none is as similar as `cutoff` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
