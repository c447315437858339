"""Writes references/prior.npz: a tiny prior of Hugging Face diffusers (Karlo's), its inputs and its outputs.

Runs in an environment of its own with torch and diffusers, never in the test suite:

    python -m tests.parity.make_prior
"""

import numpy as np
import torch
from diffusers import PriorTransformer

from tests.parity.reference import to_write

EMBEDDING_SIZE, CONTEXT_LENGTH, TIMESTEPS = 16, 9, (0, 37, 999)


def tiny_prior() -> PriorTransformer:
    model = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        embedding_dim=EMBEDDING_SIZE,
        num_embeddings=CONTEXT_LENGTH,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # positions, query, biases and norms too, which start at zero and one
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def main():
    model = tiny_prior()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "noised_image_embedding": torch.randn(3, EMBEDDING_SIZE, generator=generator),
        "text_embedding": torch.randn(3, EMBEDDING_SIZE, generator=generator),
        "text_states": torch.randn(3, CONTEXT_LENGTH, EMBEDDING_SIZE, generator=generator),
        "timesteps": torch.tensor(TIMESTEPS),
        "text_mask": torch.arange(CONTEXT_LENGTH)[None] < torch.tensor([9, 5, 1])[:, None],
    }

    def predict(mask):
        return model(
            inputs["noised_image_embedding"],
            timestep=inputs["timesteps"],
            proj_embedding=inputs["text_embedding"],
            encoder_hidden_states=inputs["text_states"],
            attention_mask=mask,
        ).predicted_image_embedding.numpy()

    arrays = {f"weights/{name}": parameter.numpy() for name, parameter in model.named_parameters()}
    arrays |= {f"input/{name}": value.numpy() for name, value in inputs.items()}
    # diffusers drops the causal mask too where it is given no mask, so "unpadded" is a mask of ones.
    unpadded = torch.ones_like(inputs["text_mask"])
    arrays |= {"output/padded": predict(inputs["text_mask"]), "output/unpadded": predict(unpadded)}
    path = to_write("prior")
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
