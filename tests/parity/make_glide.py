"""Writes references/glide.npz: GLIDE's base network, its upsampler and their inpainting twins, small, on drawn weights.

Runs in an environment of its own with torch and a checkout of openai/glide-text2im, never in the test suite:

    python -m tests.parity.make_glide --glide PATH
"""

import argparse
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch

from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import to_write

COMMON = {
    "text_ctx": 8,
    "xf_width": 48,
    "xf_layers": 2,
    "xf_heads": 3,
    "xf_final_ln": True,
    "tokenizer": SimpleNamespace(n_vocab=40),
    "xf_padding": True,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
TIMESTEPS = (0, 431, 999)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--glide", required=True)
    sys.path.insert(0, parser.parse_args().glide)
    from glide_text2im import text2im_model as models

    tokens = np.random.RandomState(0).randint(0, 40, (3, 8))
    mask = np.arange(8)[None, :] < np.array([[8], [5], [0]])
    x, low, seen = (torch.from_numpy(noise(f"glide/{name}", (3, 3, 16, 16))) for name in ("x", "low", "seen"))
    low = low[:, :, ::4, ::4].contiguous()
    known = torch.from_numpy(noise("glide/known", (3, 1, 16, 16)) > 0).float()
    caption = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
    painting = {"inpaint_image": seen, "inpaint_mask": known}
    networks = {
        "base": (models.Text2ImUNet, {}),
        "upsample": (models.SuperResText2ImUNet, {"low_res": low}),
        "base_inpaint": (models.InpaintText2ImUNet, painting),
        "upsample_inpaint": (models.SuperResInpaintText2ImUnet, {"low_res": low, **painting}),
    }
    arrays = {"tokens": tokens.astype(np.int32), "mask": mask}
    shapes = {}
    for name, (kind, named) in networks.items():
        model = kind(**COMMON).eval()
        shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
        weights = draw({f"{name}/{key}": tuple(shape) for key, shape in shapes[name].items()})
        state = {key.removeprefix(f"{name}/"): torch.from_numpy(value) for key, value in weights.items()}
        model.load_state_dict(state, strict=True)
        arrays[name] = model(x, torch.tensor(TIMESTEPS), **caption, **named).permute(0, 2, 3, 1).numpy()
    path = to_write("glide")
    np.savez_compressed(path, shapes=np.array(json.dumps(shapes)), **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
