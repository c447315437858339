"""Writes references/karlo_original.npz: Karlo's own networks, small, on drawn weights, with inputs and outputs.

Runs in an environment of its own with torch and a checkout of kakaobrain/karlo, never in the test suite:

    python -m tests.parity.make_karlo_original --karlo PATH

The names of the tensors are those of Karlo's own checkpoints, and so are the prefixes.
"""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import to_write

WIDTH, HEADS, CLIP, CONTEXT, XF_WIDTH = 24, 2, 16, 9, 20
TIMESTEPS = (0, 37, 999)
LENGTHS = (9, 5, 3)


def networks(checkout: Path) -> dict[str, torch.nn.Module]:
    """Karlo's modules by the prefix that their tensors have in its files."""
    # Its package imports Lightning and OmegaConf at once; the networks need neither.
    for name in ("karlo", "karlo.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    unet, xf = (importlib.import_module(f"karlo.modules.{name}") for name in ("unet", "xf"))
    enlarging = {
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "channel_mult": (1, 2),
        "resblock_updown": True,
        "use_middle_attention": False,
    }
    return {
        "prior/model.": xf.PriorTransformer(CONTEXT, WIDTH, 2, HEADS, True, CLIP),
        "decoder/model.": unet.PLMImUNet(
            text_ctx=CONTEXT,
            xf_width=XF_WIDTH,
            clip_emb_mult=4,
            clip_emb_type="image",
            clip_emb_drop=0.1,
            in_channels=3,
            model_channels=32,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_head_channels=8,
            clip_dim=CLIP,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        "upsampler/model_first_steps.": unet.SuperResUNetModel(**enlarging),
        "upsampler/model_last_step.": unet.SuperResUNetModel(**enlarging),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--karlo", type=Path, required=True)
    built = networks(parser.parse_args().karlo)
    shapes = {}
    for prefix, network in built.items():
        own = {f"{prefix}{name}": list(value.shape) for name, value in network.state_dict().items()}
        weights = draw({name: tuple(shape) for name, shape in own.items()})
        state = {name.removeprefix(prefix): torch.from_numpy(value) for name, value in weights.items()}
        network.load_state_dict(state, strict=True)
        network.eval()
        shapes |= own

    def drawn(name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(noise(f"original/{name}", shape))

    timesteps = torch.tensor(TIMESTEPS)
    mask = torch.arange(CONTEXT)[None] < torch.tensor(LENGTHS)[:, None]
    causal = torch.full((CONTEXT + 4, CONTEXT + 4), float("-inf")).triu_(1)[None]
    text, states = drawn("text", 3, CLIP), drawn("states", 3, CONTEXT, CLIP)
    z, x, low = drawn("z", 3, CLIP), drawn("x", 3, 3, 16, 16), drawn("low", 3, 3, 16, 16)
    found = {"mask": mask}
    for name, one in (("padded", mask), ("unpadded", torch.ones_like(mask))):
        found[f"prior_{name}"] = built["prior/model."](
            z, timesteps, text_emb=text, text_enc=states, mask=one, causal_mask=causal
        )
        decoded = built["decoder/model."](x, timesteps, txt_feat=text, txt_feat_seq=states, mask=one, y=z)
        found[f"decoder_{name}"] = decoded.permute(0, 2, 3, 1)
    for name in ("first_steps", "last_step"):
        enlarged = built[f"upsampler/model_{name}."](x, timesteps, low_res=low)
        found[name] = enlarged.permute(0, 2, 3, 1)
    path = to_write("karlo_original")
    arrays = {name: value.numpy() for name, value in found.items()}
    np.savez_compressed(path, shapes=np.array(json.dumps(shapes)), **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
