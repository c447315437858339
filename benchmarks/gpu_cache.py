"""Compiled programs from one call of `benchmarks.gpu` to the next: a folder, and as much of it as one file holds.

OUT/cache stays where it is. OUT/cache.tar.gz has its smallest files, up to a limit: what tuning found out about each
kernel first, whole programs as far as they fit. A call that finds the file but no folder starts with what is in it, so
that the file alone has to travel to another machine.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path


def folder_of(out: Path) -> Path:
    """The folder of the compiled programs."""
    return out / "cache"


def archive_of(out: Path) -> Path:
    """The file with the part of them that fits."""
    return out / "cache.tar.gz"


def unpack(out: Path) -> None:
    """Makes the folder, from the file if there is one; a folder that is there stays as it is."""
    if folder_of(out).exists():
        return
    folder_of(out).mkdir()
    if archive_of(out).exists():
        with tarfile.open(archive_of(out)) as archive:
            archive.extractall(folder_of(out), filter="data")


def pack(out: Path, limit: int) -> None:
    """Writes the file anew, with at most `limit` bytes of the folder's files."""
    folder, archive = folder_of(out), archive_of(out)
    if not limit:
        archive.unlink(missing_ok=True)
        return
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz", compresslevel=1) as packed:
        for path, size in sorted(files(folder), key=lambda found: (found[1], found[0])):
            limit -= size
            if limit < 0:
                break
            packed.add(path, arcname=path.relative_to(folder))
    os.replace(partial, archive)


def files(folder: Path) -> list[tuple[Path, int]]:
    """The folder's files, all the way down, and their bytes."""
    return [(path, path.stat().st_size) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def sizes(out: Path) -> str:
    """A sentence for the page."""
    whole = sum(size for _, size in files(folder_of(out)))
    archive = archive_of(out)
    part = f", of which `cache.tar.gz` has {archive.stat().st_size / 2**20:.1f} MiB" if archive.exists() else ""
    return f"Compiled programs take {whole / 2**20:.1f} MiB in `cache`{part}; another call starts with them."
