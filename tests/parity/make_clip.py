"""Writes references/clip.npz: a tiny CLIP of Hugging Face transformers with random weights, its inputs and its outputs.

Runs in an environment of its own with torch and transformers, never in the test suite:

    python -m tests.parity.make_clip
"""

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from tests.parity.reference import to_write

IMAGE_SIZE, PATCH_SIZE, VOCABULARY_SIZE, CONTEXT_LENGTH = 16, 4, 40, 10
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LENGTHS = (10, 7, 4)


def tiny_clip() -> CLIPModel:
    config = CLIPConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": CONTEXT_LENGTH,
            "hidden_act": "quick_gelu",
            "bos_token_id": VOCABULARY_SIZE - 2,
            "eos_token_id": VOCABULARY_SIZE - 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "hidden_act": "quick_gelu",
        },
        projection_dim=20,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start at zero and one
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def main():
    model = tiny_clip()
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    tokens = random.integers(1, VOCABULARY_SIZE - 2, (3, CONTEXT_LENGTH))
    tokens[:, 0] = VOCABULARY_SIZE - 2
    for row, length in enumerate(LENGTHS):
        tokens[row, length - 1] = VOCABULARY_SIZE - 1
        tokens[row, length:] = 0
    pixels = ((images.astype(np.float64) + 1) / 2 - np.array(MEAN)) / np.array(STD)
    output = model(
        input_ids=torch.from_numpy(tokens),
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)),
        return_loss=True,
    )
    arrays = {f"weights/{name}": parameter.numpy() for name, parameter in model.named_parameters()}
    arrays |= {"input/pictures": images, "input/tokens": tokens.astype(np.int32), "input/lengths": np.array(LENGTHS)}
    arrays |= {
        "output/image_embedding": output.image_embeds.numpy(),
        "output/text_embedding": output.text_embeds.numpy(),
        "output/text_states": output.text_model_output.last_hidden_state.numpy(),
        "output/logits_per_image": output.logits_per_image.numpy(),
        "output/loss": output.loss.numpy(),
    }
    path = to_write("clip")
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
