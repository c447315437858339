"""Files of the user's: read with a bound, and written whole or not at all, through no link."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dalle2_jax.errors import InputError


def read_bytes(path: str | Path, at_most: int) -> bytes:
    """What is in a file.

    Raises:
        InputError: for what is no file, as a folder or a device without an end; and for more than `at_most` bytes.
        OSError: where it cannot be read.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is no file")
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise InputError(f"{path} has more than {at_most >> 20} MiB, which is more than is read")
    return content


def _without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes to would be waited for.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def numbered(path: Path) -> Iterator[Path]:
    """The path, and then with numbers from 2 before its suffix: image.png, image-2.png, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once the block ends well; else nothing changes.

    It has a name of its own until then. A link at `path` is replaced, and not what it leads to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """`written_whole` of a text, which is on the disk before it takes its place."""
    with written_whole(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def check_new_folder(folder: Path) -> None:
    """Raises InputError if there is anything of that name."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; name a folder to make")


@contextlib.contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, `FOLDER.partial`, which is called `folder` once the block ends well; else it is removed.

    Raises:
        InputError: if there is anything of either name: nothing of it is touched.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise InputError(
            f"{partial} is there: a command is writing it, or was killed; if none is running, remove it"
        ) from error
    try:
        yield partial
        if os.path.lexists(folder):
            raise InputError(f"{folder} has been made by another command meanwhile; name another folder")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
