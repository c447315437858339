"""Writes references/open_clip.npz: a small CLIP of open_clip on drawn weights, its config, inputs and outputs.

Runs in an environment of its own with torch and open_clip, never in the test suite:

    python -m tests.parity.make_open_clip
"""

import json

import numpy as np
import torch

from tests.parity import torchvision_shim  # noqa: F401
from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import to_write

# As H/14 and bigG/14: exact GELU, heads of another width in the image encoder, an MLP that is not four times as wide.
CONFIG = {
    "embed_dim": 20,
    "vision_cfg": {
        "image_size": 16,
        "layers": 3,
        "width": 32,
        "head_width": 8,
        "mlp_ratio": 4.9231,
        "patch_size": 4,
    },
    "text_cfg": {"context_length": 10, "vocab_size": 600, "width": 24, "heads": 3, "layers": 2},
}
LENGTHS = (10, 7, 4)


@torch.no_grad()
def main() -> None:
    from open_clip.model import CLIP

    model = CLIP(**CONFIG).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in draw(shapes).items()}, strict=True)
    pixels = torch.from_numpy(noise("open_clip/pixels", (3, 3, 16, 16)))
    tokens = np.random.RandomState(0).randint(1, 598, (3, 10))
    tokens[:, 0] = 598
    for row, length in enumerate(LENGTHS):
        tokens[row, length - 1] = 599
        tokens[row, length:] = 0
    image = model.encode_image(pixels, normalize=True)
    text = model.encode_text(torch.from_numpy(tokens), normalize=True)
    path = to_write("open_clip")
    np.savez_compressed(
        path,
        config=np.array(json.dumps(CONFIG)),
        shapes=np.array(json.dumps(shapes)),
        tokens=tokens.astype(np.int32),
        mask=np.arange(10)[None] < np.asarray(LENGTHS)[:, None],
        image_embedding=image.numpy(),
        text_embedding=text.numpy(),
    )
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
