"""The parser of the command lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Options and other arguments in any order: `generate RUN --count 2 "a red circle"`; after `--` none is an option.

    Where it has commands, the order within each is free.
    """

    _is_parsing = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        if self._is_parsing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True  # the method below calls this one
        try:
            found, rest = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if not action.option_strings or action.nargs is not None or value is action.default:
                continue
            # argparse takes the "--" out of "--seed=--" too.
            if isinstance(value, list) and (not value or [] in value):
                self.error(f"argument {'/'.join(action.option_strings)}: -- is no value")
        return found, rest
