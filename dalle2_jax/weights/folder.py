"""A folder in the layout of diffusers: a model's parts below it, each with `config.json` and a weights file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle2_jax.weights.tensors import Tensors, WeightsError, open_tensors

NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; WeightsError where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"there is no {path}; is it the folder of another model?") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no settings; download it again")
    return value


def open_part(folder: Path) -> Tensors:
    """The tensors of a part: safetensors before PyTorch's own format.

    Raises:
        WeightsError: naming what was looked for, where there is none.
    """
    for ending in ENDINGS:
        for name in NAMES:
            if (path := folder / f"{name}{ending}").is_file():
                return open_tensors(path)
    raise WeightsError(f"there are no weights in {folder}; looked for {' or '.join(NAMES)} with {', '.join(ENDINGS)}")
