"""JSON of a run's folder, and the list of checksums that proves a checkpoint whole.

orbax loads an array file with a flipped bit without a word, so each finished checkpoint carries a file CHECKSUMS: one
line `<blake2b> <path>` a file, and a last line over the lines before it. It is written after everything else, so a
checkpoint without it was never finished.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.files import read_bytes, write_atomically

CHECKSUMS = "CHECKSUMS"

LARGEST_JSON = 2**26  # bytes, as of a list of checksums

_CHUNK = 2**22


def read_json(path: Path) -> Any:
    """The JSON in `path`; CheckpointError if it is missing, no JSON, or larger than any that is written here."""
    try:
        return json.loads(read_bytes(path, LARGEST_JSON).decode())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged (it is nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def digest(path: Path) -> str:
    """The blake2b checksum of one file, as hexadecimal."""
    result = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()


def write_checksums(directory: Path) -> None:
    """Lists every file below `directory` with its checksum; what is added later is not covered."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = "".join(f"{digest(path)} {path.relative_to(directory).as_posix()}\n" for path in files)
    write_atomically(directory / CHECKSUMS, lines + _seal(lines))


def _seal(lines: str) -> str:
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest() + "\n"


def read_checksums(directory: Path) -> dict[str, str]:
    """{path: checksum} of a checkpoint; CheckpointError if the list is damaged or names a file outside of it."""
    path = directory / CHECKSUMS
    try:
        lines = read_bytes(path, LARGEST_JSON).decode().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"its {CHECKSUMS} cannot be read ({error})") from error
    if not lines or lines[-1] != _seal("".join(lines[:-1])):
        raise CheckpointError(f"its {CHECKSUMS} is damaged")
    found = {}
    for line in lines[:-1]:
        checksum, _, name = line.rstrip("\n").partition(" ")
        inside = PurePosixPath(name)
        if not inside.parts or inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"its {CHECKSUMS} names {name!r}, which is no file of the checkpoint")
        found[name] = checksum
    return found


def verify(directory: Path, only: tuple[str, ...] | None = None) -> None:
    """Compares every file of a checkpoint with its checksum; `only` names the top-level parts to look at.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or changed, or that is no plain file: a
            checkpoint has none of them, and behind a link or a device there may be anything.
    """
    for folder, folders, files in os.walk(directory):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"its {path.relative_to(directory)} is a link or no plain file")
    for name, checksum in read_checksums(directory).items():
        if only is not None and "/" in name and name.split("/", 1)[0] not in only:
            continue
        try:
            same = digest(directory / name) == checksum
        except FileNotFoundError as error:
            raise CheckpointError(f"its file {name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"its file {name} cannot be read ({error})") from error
        if not same:
            raise CheckpointError(f"its file {name} has changed since it was written")
