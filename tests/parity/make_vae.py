"""Writes references/vae.npz: a tiny VAE in PyTorch, its loss as in pytorch/examples (vae/main.py), and the gradients.

Runs in an environment of its own with torch, never in the test suite:

    python -m tests.parity.make_vae
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.reference import to_write

BATCH, PIXELS, HIDDEN, LATENTS = 5, 16, 7, 3


def tiny_vae() -> nn.ModuleDict:
    """One hidden layer each way, by our names; the encoder's input is in [-1, 1]."""
    torch.manual_seed(0)
    sizes = {
        "encoder.hidden_0": (PIXELS, HIDDEN),
        "mean": (HIDDEN, LATENTS),
        "log_variance": (HIDDEN, LATENTS),
        "decoder.hidden_0": (LATENTS, HIDDEN),
        "decoder.out": (HIDDEN, PIXELS),
    }
    return nn.ModuleDict({name.replace(".", "/"): nn.Linear(*size) for name, size in sizes.items()})


def main():
    net = tiny_vae()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(BATCH, PIXELS, generator=generator)
    noise = torch.randn(BATCH, LATENTS, generator=generator)

    hidden = F.relu(net["encoder/hidden_0"](2 * pixels - 1))
    mean, log_variance = net["mean"](hidden), net["log_variance"](hidden)
    latent = mean + torch.exp(0.5 * log_variance) * noise
    shown = torch.sigmoid(net["decoder/out"](F.relu(net["decoder/hidden_0"](latent))))
    cross_entropy = F.binary_cross_entropy(shown, pixels, reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
    loss = cross_entropy + divergence
    loss.backward()

    values = {"loss": loss, "cross_entropy": cross_entropy, "divergence": divergence}
    arrays = {f"output/{name}": value.detach().numpy() for name, value in values.items()}
    arrays |= {"input/pixels": pixels.numpy(), "input/noise": noise.numpy()}
    for name, layer in net.items():
        for kind, tensor in (("weights", lambda p: p.detach()), ("gradients", lambda p: p.grad)):
            arrays[f"{kind}/{name}/kernel"] = tensor(layer.weight).numpy().T
            arrays[f"{kind}/{name}/bias"] = tensor(layer.bias).numpy()
    path = to_write("vae")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
