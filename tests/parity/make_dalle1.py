"""Writes references/dalle1.npz: ru-dalle's row and column masks, and a tiny DALL-E 1 of torch's attention layers.

The network is written here from the paper: pre-norm layers of `torch.nn.MultiheadAttention`, the first with ru-dalle's
row mask, the second with its column mask, the third with the paper's convolution, over a start token, a caption with
padding and 4x4 codes; its logits, its loss by 1/8 and 7/8, and the gradients.

Runs in an environment of its own with torch and a checkout of ai-forever/ru-dalle, never in the test suite:

    python -m tests.parity.make_dalle1 --rudalle PATH
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.reference import to_write

BATCH, TEXT, GRID, WINDOW = 2, 3, 4, 3
WIDTH, HEADS, VOCABULARY, CODEBOOK = 8, 2, 11, 7


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.into, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=~seen, need_weights=False)[0]
        return x + self.out(F.gelu(self.into(self.norms[1](x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding, self.code_embedding = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CODEBOOK, WIDTH)
        for name, shape in {
            "start_of_text": (WIDTH,),
            "positions": (TEXT, WIDTH),
            "padding": (TEXT, WIDTH),
            "rows": (GRID, WIDTH),
            "columns": (GRID, WIDTH),
        }.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.final_norm = nn.LayerNorm(WIDTH)
        self.text_out, self.image_out = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, CODEBOOK)

    def forward(self, tokens, real, codes, masks):
        text = self.token_embedding(tokens) + self.positions
        text = torch.where(real[:, :, None], text, self.padding)
        place = (self.rows[:, None] + self.columns[None]).reshape(GRID**2, WIDTH)
        image = self.code_embedding(codes.flatten(1)) + place
        x = torch.cat([self.start_of_text.expand(BATCH, 1, WIDTH), text, image[:, :-1]], dim=1)
        for layer, seen in zip(self.layers, masks, strict=True):
            x = layer(x, seen[:-1, :-1])
        x = self.final_norm(x)
        return self.text_out(x[:, :TEXT]), self.image_out(x[:, TEXT:])


def convolution(text: int) -> torch.Tensor:
    """The window around each code, in raster order, up to the code itself; and all of the text before."""
    seen = torch.tril(torch.ones(text + GRID**2, text + GRID**2, dtype=torch.bool))
    for query in range(GRID**2):
        for key in range(query + 1):
            near = any(abs(query - key - GRID * above) <= WINDOW // 2 for above in range(WINDOW // 2 + 1))
            seen[text + query, text + key] = near
    return seen


def by_our_names(net: Net, tensor) -> dict[str, np.ndarray]:
    """Weights, or with `tensor` gradients, in our shapes: kernels input first, and the layers stacked."""

    def linear(layer):
        return {"kernel": tensor(layer.weight).T, "bias": tensor(layer.bias)}

    def norm(layer):
        return {"scale": tensor(layer.weight), "bias": tensor(layer.bias)}

    def attention(layer):
        kernel = tensor(layer.in_proj_weight).reshape(3, HEADS, WIDTH // HEADS, WIDTH)
        bias = tensor(layer.in_proj_bias).reshape(3, HEADS, WIDTH // HEADS)
        qkv = {"kernel": kernel.transpose(3, 1, 0, 2), "bias": bias.transpose(1, 0, 2)}
        return {"qkv": qkv, "out": linear(layer.out_proj)}

    def flat(tree, path=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{path}{name}/")
            else:
                yield f"{path}{name}", value

    blocks = [
        dict(
            flat(
                {
                    "attention_norm": norm(layer.norms[0]),
                    "attention": attention(layer.attention),
                    "mlp_norm": norm(layer.norms[1]),
                    "mlp_in": linear(layer.into),
                    "mlp_out": linear(layer.out),
                }
            )
        )
        for layer in net.layers
    ]
    found = {f"transformer/blocks/{name}": np.stack([block[name] for block in blocks]) for name in blocks[0]}
    for name in ("start_of_text", "positions", "padding", "rows", "columns"):
        found[name] = tensor(getattr(net, name))
    for name in ("token_embedding", "code_embedding"):
        found[f"{name}/embedding"] = tensor(getattr(net, name).weight)
    rest = {"final_norm": norm(net.final_norm), "text_out": linear(net.text_out), "image_out": linear(net.image_out)}
    return found | dict(flat(rest))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rudalle", required=True)
    path = Path(parser.parse_args().rudalle) / "rudalle" / "dalle" / "image_attention.py"
    spec = importlib.util.spec_from_file_location("image_attention", path)
    spec.loader.exec_module(theirs := importlib.util.module_from_spec(spec))
    made = {"row": theirs.get_row_mask, "column": theirs.get_col_mask}
    arrays = {
        f"masks/{kind}/{grid}": np.packbits(make(3, grid, is_bool_mask=True).numpy())
        for kind, make in made.items()
        for grid in (4, 16)
    }

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.4)
    tokens, codes = torch.randint(VOCABULARY, (BATCH, TEXT)), torch.randint(CODEBOOK, (BATCH, GRID, GRID))
    real = torch.arange(TEXT)[None] < torch.tensor([[2], [3]])
    masks = [*(make(TEXT + 1, GRID, is_bool_mask=True) for make in made.values()), convolution(TEXT + 1)]
    text, image = net(tokens, real, codes, masks)
    text_loss = F.cross_entropy(text[real], tokens[real])
    image_loss = F.cross_entropy(image.flatten(0, 1), codes.flatten())
    loss = (text_loss + 7 * image_loss) / 8
    loss.backward()

    arrays |= {"input/tokens": tokens.numpy().astype(np.int32), "input/codes": codes.numpy().astype(np.int32)}
    arrays |= {"input/mask": real.numpy()}
    outputs = {"text": text, "image": image, "loss": loss, "text_loss": text_loss, "image_loss": image_loss}
    arrays |= {f"output/{name}": value.detach().numpy() for name, value in outputs.items()}
    for kind, tensor in (("weights", lambda p: p.detach()), ("gradients", lambda p: p.grad)):
        named = by_our_names(net, lambda p, tensor=tensor: tensor(p).numpy())
        arrays |= {f"{kind}/{name}": value for name, value in named.items()}
    path = to_write("dalle1")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
