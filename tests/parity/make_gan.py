"""Writes references/gan.npz: two tiny GANs in PyTorch, their losses as binary cross-entropies, and the gradients.

One is convolutional, with the layers of pytorch/examples (dcgan/main.py) but GroupNorm, the other dense with maxout.
Kernels are written in our layout; that of a transposed convolution is also turned by half a turn.

Runs in an environment of its own with torch, never in the test suite:

    python -m tests.parity.make_gan
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.reference import to_write

BATCH, LATENTS, CHANNELS, GROUPS, PIECES = 4, 5, 3, 2, 3


class Norm(nn.GroupNorm):
    """With affine parameters that are not one and zero."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)
        nn.init.normal_(self.weight, 1.0, 0.3)
        nn.init.normal_(self.bias, 0.0, 0.3)


class Maxout(nn.Linear):
    """The largest of `PIECES` linear units each."""

    def __init__(self, inputs: int, units: int):
        super().__init__(inputs, units * PIECES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).unflatten(1, (-1, PIECES)).amax(2)


def transposed(inputs: int, outputs: int, stride: int, padding: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)


def convolution(inputs: int, outputs: int, stride: int, padding: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride, padding, bias=False)


def convolutional() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """For images of 16 pixels, by our names."""
    generator = {"up_0": transposed(LATENTS, 8, 1, 0), "norm_0": Norm(8), "up_1": transposed(8, 4, 2, 1)}
    generator |= {"norm_1": Norm(4), "out": transposed(4, CHANNELS, 2, 1)}
    discriminator = {"down_0": convolution(CHANNELS, 4, 2, 1), "down_1": convolution(4, 8, 2, 1), "norm_1": Norm(8)}
    return nn.ModuleDict(generator), nn.ModuleDict({**discriminator, "out": convolution(8, 1, 1, 0)})


def dense() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """For images of 4 pixels, by our names."""
    pixels = CHANNELS * 4 * 4
    generator = {"hidden_0": nn.Linear(LATENTS, 7), "hidden_1": nn.Linear(7, 6), "out": nn.Linear(6, pixels)}
    discriminator = {"hidden_0": Maxout(pixels, 6), "hidden_1": Maxout(6, 4), "out": nn.Linear(4, 1)}
    return nn.ModuleDict(generator), nn.ModuleDict(discriminator)


def generate_convolutional(net: nn.ModuleDict, noise: torch.Tensor) -> torch.Tensor:
    x = noise[:, :, None, None]
    for number in range(2):
        x = F.relu(net[f"norm_{number}"](net[f"up_{number}"](x)))
    return torch.tanh(net["out"](x))


def discriminate_convolutional(net: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    x = F.leaky_relu(net["down_0"](images), 0.2)
    return net["out"](F.leaky_relu(net["norm_1"](net["down_1"](x)), 0.2)).flatten()


def generate_dense(net: nn.ModuleDict, noise: torch.Tensor) -> torch.Tensor:
    pixels = torch.sigmoid(net["out"](F.relu(net["hidden_1"](F.relu(net["hidden_0"](noise))))))
    return 2 * pixels.unflatten(1, (4, 4, CHANNELS)).movedim(3, 1) - 1


def discriminate_dense(net: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    pixels = (images.movedim(1, 3).flatten(1) + 1) / 2
    return net["out"](net["hidden_1"](net["hidden_0"](pixels)))[:, 0]


def ours(layer: nn.Module, name: str, value: torch.Tensor) -> tuple[str, np.ndarray]:
    """A layer's weight or bias, or the gradient by it, by our name and in our layout."""
    value = value.detach().numpy()
    if name == "bias":
        return name, value
    if isinstance(layer, nn.GroupNorm):
        return "scale", value
    if isinstance(layer, nn.ConvTranspose2d):
        return "kernel", value.transpose(2, 3, 0, 1)[::-1, ::-1]
    return "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def tree(net: nn.ModuleDict, of: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for layer_name, layer in net.items():
        for name, parameter in layer.named_parameters():
            name, value = ours(layer, name, of(parameter))
            found[f"{layer_name}/{name}"] = value
    return found


def record(name: str, players, generate, discriminate, size: int) -> dict[str, np.ndarray]:
    generator, discriminator = players
    drawn = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(BATCH, CHANNELS, size, size, generator=drawn) - 1
    noise = torch.randn(BATCH, LATENTS, generator=drawn)
    one, zero = torch.ones(BATCH), torch.zeros(BATCH)
    cross_entropy = F.binary_cross_entropy_with_logits

    made = generate(generator, noise)
    logits = {"real": discriminate(discriminator, images), "fake": discriminate(discriminator, made.detach())}
    losses = {"discriminator": (cross_entropy(logits["real"], one) + cross_entropy(logits["fake"], zero)) / 2}
    losses["discriminator"].backward()
    gradients = {"discriminator": tree(discriminator, lambda p: p.grad.clone())}
    for objective in ("non_saturating", "minimax"):
        generator.zero_grad()
        logit = discriminate(discriminator, generate(generator, noise))
        loss = cross_entropy(logit, one) if objective == "non_saturating" else -cross_entropy(logit, zero)
        loss.backward()
        losses[objective] = loss
        gradients[objective] = tree(generator, lambda p: p.grad.clone())

    arrays = {"input/images": images.movedim(1, 3).numpy(), "input/noise": noise.numpy()}
    arrays["output/made"] = made.detach().movedim(1, 3).numpy()
    arrays |= {f"output/{key}": value.detach().numpy() for key, value in (logits | losses).items()}
    for player, net in (("generator", generator), ("discriminator", discriminator)):
        arrays |= {f"weights/{player}/{key}": value for key, value in tree(net, lambda p: p).items()}
    for of, values in gradients.items():
        arrays |= {f"gradients/{of}/{key}": value for key, value in values.items()}
    return {f"{name}/{key}": value for key, value in arrays.items()}


def main():
    torch.manual_seed(0)
    arrays = record("convolutional", convolutional(), generate_convolutional, discriminate_convolutional, 16)
    arrays |= record("dense", dense(), generate_dense, discriminate_dense, 4)
    path = to_write("gan")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
