"""Writes references/unet_*.npz: small U-Nets of guided-diffusion and GLIDE on drawn weights, inputs and outputs.

Runs in an environment of its own with torch and checkouts of openai/guided-diffusion and openai/glide-text2im, never in
the test suite:

    python -m tests.parity.make_unet --guided PATH --glide PATH

The weights are those of drawn_weights.draw; a reference holds the names and shapes of the tensors instead.
"""

import argparse
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch

from tests.parity.drawn_weights import draw
from tests.parity.reference import to_write


def prepare(model: torch.nn.Module) -> dict[str, list[int]]:
    """Gives the model its drawn weights; returns the shapes by name."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in draw(shapes).items()}, strict=True)
    model.eval()
    return shapes


def write(name: str, shapes: dict, inputs: dict, output: torch.Tensor) -> None:
    """Images are stored [batch, height, width, channels]."""
    path = to_write(f"unet_{name}")
    arrays = {f"input/{key}": value for key, value in inputs.items()}
    output = output.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(path, shapes=np.array(json.dumps(shapes)), output=output, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, output std {output.std():.3f}")


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def guided(random: np.random.Generator) -> None:
    """ADM's choices, the paper's upsampler without attention, and the plain variant that resamples by convolutions."""
    from guided_diffusion.unet import SuperResModel, UNetModel

    timesteps = np.array([3, 720], np.int32)
    x_t = random.normal(size=(2, 16, 16, 3)).astype(np.float32)
    common = {"image_size": 16, "model_channels": 32, "out_channels": 6, "num_head_channels": 16}
    adm = {"channel_mult": (1, 2), "num_res_blocks": 2, "attention_resolutions": (2,)}
    networks = {
        "adm": UNetModel(in_channels=3, use_scale_shift_norm=True, resblock_updown=True, **adm, **common),
        "plain": UNetModel(
            in_channels=3, channel_mult=(1, 1, 2), num_res_blocks=1, attention_resolutions=(1, 4), **common
        ),
    }
    for name, model in networks.items():
        shapes = prepare(model)
        output = model(nchw(x_t), torch.from_numpy(timesteps))
        write(name, shapes, {"x_t": x_t, "timesteps": timesteps}, output)

    upsampler = SuperResModel(
        16, 3, 32, 3, 1, attention_resolutions=(), channel_mult=(1, 1, 2), num_head_channels=16, resblock_updown=True
    )
    upsampler.middle_block[1] = torch.nn.Identity()  # the paper and Karlo attend nowhere
    shapes = prepare(upsampler)
    low = random.normal(size=(2, 4, 4, 3)).astype(np.float32)
    output = upsampler(nchw(x_t), torch.from_numpy(timesteps), low_res=nchw(low))
    write("upsampler", shapes, {"x_t": x_t, "timesteps": timesteps, "low_resolution": low}, output)


def glide(random: np.random.Generator) -> None:
    """GLIDE with its text transformer; one caption is shorter than the context, one empty."""
    from glide_text2im.text2im_model import Text2ImUNet

    model = Text2ImUNet(
        text_ctx=8,
        xf_width=48,
        xf_layers=2,
        xf_heads=3,
        xf_final_ln=True,
        tokenizer=SimpleNamespace(n_vocab=40),
        xf_padding=True,
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2, 4),
        channel_mult=(1, 2, 2),
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    shapes = prepare(model)
    x_t = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    timesteps = np.array([0, 431, 999], np.int32)
    tokens = random.integers(0, 40, (3, 8)).astype(np.int32)
    mask = np.arange(8)[None, :] < np.array([[8], [5], [0]])
    output = model(nchw(x_t), torch.from_numpy(timesteps), tokens=torch.from_numpy(tokens), mask=torch.from_numpy(mask))
    write("glide", shapes, {"x_t": x_t, "timesteps": timesteps, "tokens": tokens, "mask": mask}, output)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided", required=True, help="a checkout of openai/guided-diffusion")
    parser.add_argument("--glide", required=True, help="a checkout of openai/glide-text2im")
    arguments = parser.parse_args()
    sys.path[:0] = [arguments.guided, arguments.glide]
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    guided(random)
    glide(random)


if __name__ == "__main__":
    main()
