"""The tensors of a checkpoint that others wrote, by name, read one at a time.

safetensors files are mapped into memory and need no torch. PyTorch's own files (`.pt`, `.ckpt`, `.bin`, ...) are
pickles: they are read by torch alone, and only with `weights_only=True`, which makes tensors and runs no code.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import InputError

PICKLES = (".pt", ".pth", ".th", ".ckpt", ".bin")
FLOATS = ("float64", "float32", "float16", "bfloat16")


class WeightsError(InputError):
    """Weights that are not what they should be; its message says which file, which tensor, and what to do."""


@dataclass(frozen=True)
class Tensors:
    """Names, shapes and dtypes of a checkpoint's tensors; `read(name)` gives one as a numpy array.

    where: the file or folder, for messages.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]

    def renamed(self, rename: Callable[[str], str | None]) -> Tensors:
        """The tensors under other names; those for which `rename` gives None are left out."""
        names = {new: old for old in self.shapes if (new := rename(old)) is not None}
        return Tensors(
            self.where,
            {new: self.shapes[old] for new, old in names.items()},
            {new: self.dtypes[old] for new, old in names.items()},
            lambda name: self.read(names[name]),
        )

    def below(self, prefix: str) -> Tensors:
        """The tensors whose names begin with `prefix`, without it."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def joined(parts: Iterable[tuple[str, Tensors]]) -> Tensors:
    """Several checkpoints as one, each under a prefix of its own."""
    parts = list(parts)
    names = [prefix + name for prefix, part in parts for name in part.shapes]
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise WeightsError(f"the tensor {twice} is in more than one of {', '.join(part.where for _, part in parts)}")
    shapes = {prefix + name: shape for prefix, part in parts for name, shape in part.shapes.items()}
    dtypes = {prefix + name: dtype for prefix, part in parts for name, dtype in part.dtypes.items()}
    readers = {prefix + name: (part, name) for prefix, part in parts for name in part.shapes}

    def read(name: str) -> np.ndarray:
        part, own = readers[name]
        return part.read(own)

    return Tensors(", ".join(part.where for _, part in parts), shapes, dtypes, read)


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a file, by its ending.

    Raises:
        WeightsError: if there is no such file, it is cut short or tampered with, it is a pickle and torch is not
            installed, or a pickle holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.name.endswith(".safetensors.index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise WeightsError(f"{path} is no weights file that is known here; give .safetensors or {', '.join(PICKLES)}")


def _open_safetensors(path: Path) -> Tensors:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise WeightsError(
            "reading weights needs safetensors; pip install safetensors, or 'dalle2-jax[weights]'"
        ) from error
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)

    try:
        file = safe_open(path, framework="np")
        facts = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}); download it again") from error
    shapes = {name: tuple(fact.get_shape()) for name, fact in facts.items()}
    dtypes = {name: _DTYPES.get(fact.get_dtype(), fact.get_dtype()) for name, fact in facts.items()}
    return Tensors(str(path), shapes, dtypes, file.get_tensor)


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def _open_shards(path: Path) -> Tensors:
    """An index that says which of several files has which tensor."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in files.items():
            by_file.setdefault(file, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: it has no weight_map; download it again") from error
    parts, outside = [], [file for file in by_file if Path(file).name != file]
    if outside:
        raise WeightsError(f"{path} points out of its folder, to {outside[0]}; it has been tampered with")
    for file, names in by_file.items():
        part = open_tensors(path.parent / file)
        if set(part.shapes) != set(names):
            odd = sorted(set(part.shapes) ^ set(names))[0]
            raise WeightsError(f"{path} and {file} do not agree on the tensor {odd}; download both again")
        parts.append(("", part))
    return Tensors(str(path), *_fields(joined(parts)))


def _fields(tensors: Tensors) -> tuple[Any, ...]:
    return tensors.shapes, tensors.dtypes, tensors.read


def _open_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{path} is a PyTorch file, which only torch can read; pip install torch, or get the weights as safetensors"
        ) from error
    import pickle

    try:
        mapped = zipfile.is_zipfile(path)  # torch maps no file of its older format
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, which could run code, and is not opened; get the weights as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read by torch ({reason}); download it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, torch.Tensor) and content.ndim and len(content) == 2:
        content = list(content)
    if isinstance(content, list | tuple):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise WeightsError(f"{path} is not a dictionary of tensors; give a file of a network's state_dict")
    shapes = {name: tuple(value.shape) for name, value in content.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in content.items()}

    def read(name: str) -> np.ndarray:
        value = content[name].detach()
        if value.dtype == torch.bfloat16:
            import ml_dtypes

            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    return Tensors(str(path), shapes, dtypes, read)
