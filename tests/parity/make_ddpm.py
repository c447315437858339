"""Writes references/ddpm.npz: diffusers' UNet2DModel built as google/ddpm-cifar10-32, small, and bits per dimension by
improved-diffusion's calc_bpd_loop.

Runs in an environment of its own with torch and diffusers and a checkout of openai/improved-diffusion, never in the
test suite:

    python -m tests.parity.make_ddpm --improved PATH

Weights and noise follow from names (drawn_weights); a reference holds the names and shapes of the tensors instead. The
bounds are computed in float64, so that they carry no rounding of their own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import to_write

CLASSES = 3  # and one row more, for none
SIZE = 16


def unet() -> tuple[UNet2DModel, dict[str, list[int]]]:
    """The network with its drawn weights, and their shapes by name."""
    model = UNet2DModel(
        sample_size=SIZE,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
        num_class_embeds=CLASSES + 1,
    )
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in draw(shapes).items()}, strict=True)
    return model.eval(), shapes


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def channels_last(images: torch.Tensor) -> np.ndarray:
    return np.moveaxis(images.numpy(), 1, -1).astype(np.float32)


def bound(model: Callable[..., torch.Tensor], images: np.ndarray, variance: str, steps: int) -> dict[str, np.ndarray]:
    """calc_bpd_loop over `steps` of the 1000 timesteps of the linear schedule, with clamped x_0."""
    from improved_diffusion import gaussian_diffusion
    from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
    from improved_diffusion.respace import SpacedDiffusion, space_timesteps

    def gather(table: np.ndarray, t: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Theirs, without its cast to float32."""
        return torch.from_numpy(table)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    gaussian_diffusion._extract_into_tensor = gather
    process = SpacedDiffusion(
        use_timesteps=space_timesteps(1000, str(steps)),
        betas=gaussian_diffusion.get_named_beta_schedule("linear", 1000),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType[variance.upper()],
        loss_type=LossType.MSE,
    )
    asked = iter(range(steps - 1, -1, -1))  # it goes from the last step to the first

    def named_noise(x: torch.Tensor) -> torch.Tensor:
        return channels_first(noise(f"bound/{next(asked)}", images.shape)).double()

    own, torch.randn_like = torch.randn_like, named_noise
    try:
        found = process.calc_bpd_loop(model, channels_first(images).double(), clip_denoised=True)
    finally:
        torch.randn_like = own
    return {
        "total": found["total_bpd"].numpy(),
        "prior": found["prior_bpd"].numpy(),
        "terms": found["vb"].flip(1).numpy().astype(np.float32),
        "mse": found["mse"].flip(1).numpy().astype(np.float32),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--improved", required=True, help="a checkout of openai/improved-diffusion")
    sys.path.insert(0, parser.parse_args().improved)
    torch.set_num_threads(1)
    random = np.random.default_rng(0)

    model, shapes = unet()
    inputs: dict[str, Any] = {
        "x_t": random.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32),
        "timesteps": np.array([0, 7, 999], np.int32),
        "labels": np.array([2, CLASSES, 0], np.int32),
        "images": random.integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8),
        "small_images": random.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8),
    }
    output = model(
        channels_first(inputs["x_t"]),
        torch.from_numpy(inputs["timesteps"]),
        class_labels=torch.from_numpy(inputs["labels"]).long(),
    ).sample
    arrays = {"shapes": np.array(json.dumps(shapes)), "output": channels_last(output)}
    arrays |= {f"input/{name}": value for name, value in inputs.items()}

    model, labels = model.double(), torch.tensor([1, 2])
    bounds = {
        "network/fixed_large": bound(
            lambda x, t: model(x, t, class_labels=labels).sample, inputs["images"] / 127.5 - 1, "fixed_large", 20
        )
    }
    for variance in ("fixed_large", "fixed_small"):
        small = inputs["small_images"] / 127.5 - 1
        bounds[f"function/{variance}"] = bound(lambda x, t: 0.9 * x + 0.1 * torch.tanh(x), small, variance, 1000)
    arrays |= {f"{name}/{key}": value for name, found in bounds.items() for key, value in found.items()}
    path = to_write("ddpm")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, output std {output.std():.3f}")
    for name, found in bounds.items():
        print(name, found["total"], found["prior"])


if __name__ == "__main__":
    main()
