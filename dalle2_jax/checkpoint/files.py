"""Small files that are either whole or not there, and the list of checksums that proves a checkpoint whole.

orbax loads an array file with a flipped bit without a word, so each finished checkpoint carries a file CHECKSUMS: one
line `<blake2b> <path>` a file, and a last line over the lines before it. It is written after everything else, so a
checkpoint without it was never finished.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.errors import CheckpointError

CHECKSUMS = "CHECKSUMS"

_CHUNK = 2**22


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` beside `path`, flushes it to the disk and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The JSON in `path`; CheckpointError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
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
    """{path: checksum} of a checkpoint; CheckpointError if the list itself is damaged."""
    path = directory / CHECKSUMS
    try:
        lines = path.read_bytes().decode().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its {CHECKSUMS} cannot be read ({error})") from error
    if not lines or lines[-1] != _seal("".join(lines[:-1])):
        raise CheckpointError(f"its {CHECKSUMS} is damaged")
    return {name: checksum for checksum, name in (line.rstrip("\n").split(" ", 1) for line in lines[:-1])}


def verify(directory: Path, only: tuple[str, ...] | None = None) -> None:
    """Compares every file of a checkpoint with its checksum; `only` names the top-level parts to look at.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or changed.
    """
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
