"""Where the references are: committed beside this file, or made anew in a folder that PARITY_REFERENCES names.

`make parity` makes them anew with the peers' own code and runs the tests on those; what a reference needs that is not
at hand there (a checkout) is read from the committed one.
"""

import os
from pathlib import Path

COMMITTED = Path(__file__).parent / "references"


def reference_path(name: str) -> Path:
    """The file to compare with."""
    live = to_write(name)
    return live if live.is_file() else COMMITTED / f"{name}.npz"


def to_write(name: str) -> Path:
    """The file to make."""
    folder = Path(os.environ.get("PARITY_REFERENCES") or COMMITTED)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.npz"
