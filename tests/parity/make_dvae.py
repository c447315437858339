"""Writes references/dvae.npz: DALL-E's discrete VAE by OpenAI's own code, small, on drawn weights.

Runs in an environment of its own with torch and a checkout of openai/DALL-E, never in the test suite:

    python -m tests.parity.make_dvae --dalle PATH

Below `pickled/` there are files that `torch.save` wrote of whole modules, in both containers, with what they compute.
The likelihood, which the checkout does not have, is PyTorch's sigmoid of a Laplace variable.
"""

import argparse
import importlib
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import distributions

from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import to_write

CODES, CHANNELS, SIZE, BATCH, TEMPERATURE, KL_WEIGHT = 24, 3, 16, 2, 0.7, 1.5
NETWORK = {"vocab_size": CODES, "n_hid": 8, "n_blk_per_group": 2}
PICKLED = {"vocab_size": 6, "n_hid": 4, "n_blk_per_group": 1}
GRADIENTS = ("encoder.blocks.input.w", "encoder.blocks.output.conv.b", "decoder.blocks.input.w")


def import_dall_e(checkout: Path) -> types.SimpleNamespace:
    """Its networks and pixels; its package also imports what downloads the weights."""
    package = types.ModuleType("dall_e")
    package.__path__ = [str(checkout / "dall_e")]
    sys.modules["dall_e"] = package
    encoder, decoder, utils = (importlib.import_module(f"dall_e.{name}") for name in ("encoder", "decoder", "utils"))
    return types.SimpleNamespace(encoder=encoder.Encoder, decoder=decoder.Decoder, utils=utils)


def build(dall_e: types.SimpleNamespace, sizes: dict[str, int], code_width: int, prefix: str, steps: int = 0):
    """Encoder and decoder with drawn weights, which with `steps` are multiples of 1 / steps; and their shapes."""
    nets = {"encoder": dall_e.encoder(**sizes), "decoder": dall_e.decoder(**sizes, n_init=code_width)}
    shapes = {f"{part}.{name}": list(x.shape) for part, net in nets.items() for name, x in net.state_dict().items()}
    weights = draw({prefix + name: tuple(shape) for name, shape in shapes.items()})
    for part, net in nets.items():
        own = {name: weights[f"{prefix}{part}.{name}"] for name in net.state_dict()}
        own = {name: np.round(x * steps) / steps if steps else x for name, x in own.items()}
        net.load_state_dict({name: torch.from_numpy(x) for name, x in own.items()}, strict=True)
    return nets, shapes


def log_likelihood(outputs: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    mean, log_scale = outputs.double().chunk(2, dim=1)
    laplace = distributions.Laplace(mean, log_scale.exp())
    density = distributions.TransformedDistribution(laplace, distributions.SigmoidTransform())
    return density.log_prob(mapped.double()).sum((1, 2, 3))


def kl(logits: torch.Tensor) -> torch.Tensor:
    q = distributions.Categorical(logits=logits.double().movedim(1, -1))
    uniform = distributions.Categorical(logits=torch.zeros_like(q.logits))
    return distributions.kl_divergence(q, uniform).sum((1, 2))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().movedim(1, -1).numpy()


def network(dall_e: types.SimpleNamespace) -> dict[str, np.ndarray]:
    nets, shapes = build(dall_e, NETWORK, 16, "dvae/")
    # Of another colour in each cell of the grid, so that its codes differ.
    random = np.random.RandomState(22)
    colours = random.choice([20, 230], (BATCH, 2, 2, CHANNELS)).repeat(SIZE // 2, 1).repeat(SIZE // 2, 2)
    pixels = (colours + random.randint(-20, 21, colours.shape)).astype(np.uint8)
    images = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    mapped = dall_e.utils.map_pixels(images)
    given = torch.from_numpy(noise("dvae/codes", (BATCH, CODES, 2, 2))).softmax(1)

    logits = nets["encoder"](mapped)
    codes = logits.argmax(1)
    one_hot = torch.nn.functional.one_hot(codes, CODES).movedim(-1, 1).float()
    hard, soft = nets["decoder"](one_hot), nets["decoder"](given)
    shown = dall_e.utils.unmap_pixels(torch.sigmoid(hard[:, :CHANNELS]))
    # Relaxed codes without noise, so that the loss follows from the weights alone.
    relaxed = nets["decoder"]((logits / TEMPERATURE).softmax(1))
    reconstruction, divergence = -log_likelihood(relaxed, mapped), kl(logits)
    loss = (reconstruction + KL_WEIGHT * divergence).mean()
    loss.backward()
    found = {"logits": nhwc(logits), "hard": nhwc(hard), "soft": nhwc(soft), "shown": nhwc(shown), "codes": codes}
    found |= {"reconstruction": reconstruction.detach(), "kl": divergence.detach(), "loss": loss.detach()}
    for name in GRADIENTS:
        part, own = name.split(".", 1)
        found[f"gradient/{name}"] = nets[part].get_parameter(own).grad
    return {"shapes": np.array(json.dumps(shapes)), "pixels": pixels, "given": nhwc(given), **found}


@torch.no_grad()
def pickled(dall_e: types.SimpleNamespace) -> dict[str, np.ndarray]:
    # The older container keeps the source of each class and where it lay, which belong in no reference.
    torch.serialization.get_source_lines_and_file = lambda *_: ([""], 0, "")
    nets, shapes = build(dall_e, PICKLED, 4, "pickled/", steps=16)
    mapped = torch.from_numpy(noise("dvae/pickled", (1, CHANNELS, 8, 8))).sigmoid() * 0.8 + 0.1
    logits = nets["encoder"](mapped)
    outputs = nets["decoder"](torch.nn.functional.one_hot(logits.argmax(1), 6).movedim(-1, 1).float())
    found = {"shapes": np.array(json.dumps(shapes)), "logits": nhwc(logits), "outputs": nhwc(outputs)}
    for container in ("zip", "legacy"):
        for part, net in nets.items():
            file = io.BytesIO()
            torch.save(net, file, _use_new_zipfile_serialization=container == "zip")
            found[f"{container}/{part}"] = np.frombuffer(file.getvalue(), np.uint8)
    return {f"pickled/{name}": value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dalle", type=Path, required=True)
    dall_e = import_dall_e(parser.parse_args().dalle)
    arrays = {name: np.asarray(value) for name, value in {**network(dall_e), **pickled(dall_e)}.items()}
    path = to_write("dvae")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
