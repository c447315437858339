"""A repository of Hugging Face as a local folder: only the files that a conversion reads, through `huggingface_hub`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dalle2_jax.weights.tensors import PICKLES, WeightsError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT = (".json", ".txt")


def local_folder(source: str) -> Path:
    """The folder `source`, or that of a repository such as kakaobrain/karlo-v1-alpha, fetched if it is not there yet.

    Raises:
        WeightsError: if it is neither, or cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not REPOSITORY.fullmatch(source):
        what = "is a file" if path.exists() else "is not there"
        raise WeightsError(f"{source} {what}; name a folder, or a repository such as kakaobrain/karlo-v1-alpha")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"there is no folder {source}; to fetch a repository, pip install huggingface_hub, or 'dalle2-jax[weights]'"
        ) from error
    try:
        wanted = needed(HfApi().list_repo_files(source))
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # whatever lies between here and there
        with contextlib.suppress(Exception):  # without network, what was fetched before
            return Path(snapshot_download(source, local_files_only=True))
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"there is no folder {source}, and the repository could not be fetched "
            f"({reason[0] if reason else type(error).__name__}); fetch it by other means and name its folder"
        ) from error


def _kin(path: PurePosixPath) -> tuple[PurePosixPath, bool]:
    """Files that hold the same in two formats: those of a folder, open_clip's apart from transformers'."""
    return path.parent, path.name.startswith("open_clip")


def needed(files: Sequence[str]) -> list[str]:
    """The settings and vocabularies of a repository, and each folder's weights in the best format there is.

    Half-precision copies (`*.fp16.*`), ONNX and the like are left out; pickles where there are safetensors.
    """
    paths = [PurePosixPath(name) for name in files]
    plain = [path for path in paths if "." not in path.stem.replace("safetensors", "").strip(".")]
    safe = {_kin(path) for path in plain if path.suffix == ".safetensors"}
    kept = []
    for path in paths:
        text = path.suffix in TEXT
        weights = path in plain and path.suffix == ".safetensors"
        pickle = path in plain and path.suffix in PICKLES and _kin(path) not in safe
        if text or weights or pickle:
            kept.append(str(path))
    return kept
