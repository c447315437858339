"""A folder of Hugging Face: `config.json`, a weights file, perhaps a vocabulary; or parts that are such."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle2_jax.tokenizer import ClipTokenizer
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


def read_tokenizer(folder: Path) -> ClipTokenizer:
    """The tokenizer of a folder with `vocab.json`, `merges.txt` and what transformers says of them, if it does."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    length = settings.get("model_max_length") or 77
    tokenizer = ClipTokenizer.read(folder, context_length=length if length < 10**6 else 77)
    pad = settings.get("pad_token") or "<|endoftext|>"
    pad = pad if isinstance(pad, str) else pad.get("content")
    rows = tokenizer.token_rows()
    if pad not in rows:
        raise WeightsError(f"{folder / 'tokenizer_config.json'} pads with {pad!r}, which the vocabulary does not have")
    return replace(tokenizer, padding=rows[pad])
