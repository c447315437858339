"""Preparing a TFDS builder of our own: once, by one process at a time, quietly, and whole or not at all."""

import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def prepare_builder(make: Callable[[], object], data_dir: str, message: str):
    """The builder that `make` returns, its data set under `data_dir` prepared; `message` is said where that takes work.

    What an interrupted preparation left behind is removed.
    """
    root = Path(data_dir).expanduser()

    def made() -> tuple[object, Path]:
        builder = make()
        return builder, Path(builder.data_dir)

    with _quiet():
        builder, folder = made()
    if (folder / "dataset_info.json").exists():  # also where nobody may write
        return builder
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root), _quiet():
        builder, folder = made()
        if not (folder / "dataset_info.json").exists():
            for left in (folder, *folder.parent.glob(f"{folder.name}.incomplete*")):
                shutil.rmtree(left, ignore_errors=True)
            print(message, file=sys.stderr, flush=True)
            builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _alone(folder: Path):
    """Lets one process at a time prepare under `folder`, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder / ".prepare.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS from speaking of downloads and custom configs."""
    from tensorflow_datasets.core.utils import tqdm_utils

    shown, logger = getattr(tqdm_utils, "_active", True), logging.getLogger("absl")
    level = logger.level
    tqdm_utils.display_progress_bar(False)
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm_utils.display_progress_bar(shown)
        logger.setLevel(level)
