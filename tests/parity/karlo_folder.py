"""A folder as diffusers writes it (`save_pretrained`), of the small networks of Karlo's shape in karlo.npz."""

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dalle2_jax.tokenizer import byte_letters
from tests.parity.drawn_weights import draw
from tests.parity.reference import reference_path

TEXT2IMG = ("text_encoder", "prior", "text_proj", "decoder", "super_res_first", "super_res_last")
VARIATION = ("text_encoder", "image_encoder", "text_proj", "decoder", "super_res_first", "super_res_last")


def read_reference() -> dict[str, np.ndarray]:
    """What make_karlo.py wrote."""
    with np.load(reference_path("karlo")) as file:
        return dict(file)


def write_vocabulary(folder: Path, size: int) -> None:
    """A small vocabulary in the layout of CLIP's."""
    letters = list(byte_letters().values())
    merges = [pair for pair in itertools.product(letters[:20], letters[:20])][: size - 514]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocabulary = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9, "pad_token": "!"}))


def write_folder(folder: Path, reference: dict, parts: tuple[str, ...], pipeline: str) -> Path:
    """What `save_pretrained` writes of a pipeline."""
    configs, shapes = (json.loads(str(reference[name])) for name in ("configs", "shapes"))
    for name in parts:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(configs[name]))
        tensors = draw({f"{name}/{key}": tuple(shape) for key, shape in shapes[name].items()})
        file = "model" if name.endswith("_encoder") else "diffusion_pytorch_model"
        tensors = {key.removeprefix(f"{name}/"): value for key, value in tensors.items()}
        save_file(tensors, folder / name / f"{file}.safetensors")
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        (folder / name).mkdir()
        (folder / name / "scheduler_config.json").write_text(json.dumps(configs[name]))
    write_vocabulary(folder / "tokenizer", configs["text_encoder"]["vocab_size"])
    index = {"_class_name": pipeline, **{name: ["diffusers", ""] for name in parts}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
