"""Writes references/encoder_decoder.npz: a tiny `torch.nn.Transformer`, with its norms after and before, on tokens.

Its final norms are in both. Runs in an environment of its own with torch, never in the test suite:

    python -m tests.parity.make_encoder_decoder
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.reference import to_write

WIDTH, DEPTH, HEADS, HIDDEN, VOCABULARY, SMOOTHING = 8, 2, 2, 10, 9, 0.1
PAD, START, END = 0, 1, 2
SOURCE = torch.tensor([[4, 7, 3, 5, END], [8, 3, END, PAD, PAD]])
TARGET = torch.tensor([[START, 5, 5, 8, 6, END], [START, 3, END, PAD, PAD, PAD]])


def position_encoding(length: int) -> torch.Tensor:
    """As in PyTorch's tutorial of the Transformer."""
    position = torch.arange(length).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
    encoding = torch.zeros(length, WIDTH)
    encoding[:, 0::2], encoding[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
    return encoding


def make(norm_first: bool) -> tuple[nn.Transformer, nn.Embedding]:
    """The same random weights in both, also where PyTorch starts from zeros and ones."""
    sizes = {"num_encoder_layers": DEPTH, "num_decoder_layers": DEPTH, "dim_feedforward": HIDDEN}
    net = nn.Transformer(WIDTH, HEADS, **sizes, batch_first=True, norm_first=norm_first).eval()
    table = nn.Embedding(VOCABULARY, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*net.named_parameters(), *table.named_parameters()]:
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.2 if weight.ndim == 1 else WIDTH**-0.5
            weight.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return net, table


def watch(net: nn.Transformer) -> dict[str, list[torch.Tensor]]:
    """What every attention of the next forward pass weighs with, by where it is."""
    found = {"encoder": [], "decoder": [], "cross": []}

    def ask(module, args, kwargs):
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def listen(to):
        return lambda module, args, output: found[to].append(output[1])

    for name, layers in (("encoder", net.encoder.layers), ("decoder", net.decoder.layers)):
        for layer in layers:
            for part, to in (("self_attn", name), ("multihead_attn", "cross")):
                if hasattr(layer, part):
                    getattr(layer, part).register_forward_pre_hook(ask, with_kwargs=True)
                    getattr(layer, part).register_forward_hook(listen(to))
    return found


def by_our_names(net: nn.Transformer, table: nn.Embedding, value) -> dict[str, np.ndarray]:
    """{path: array} in our layout; value: of a parameter, such as its gradient, as numpy."""

    def dense(layer):
        return {"kernel": value(layer.weight).T, "bias": value(layer.bias)}

    def norm(layer):
        return {"scale": value(layer.weight), "bias": value(layer.bias)}

    def attention(module, cross):
        size = WIDTH // HEADS
        kernel = value(module.in_proj_weight).reshape(3, HEADS, size, WIDTH).transpose(3, 1, 0, 2)
        bias = value(module.in_proj_bias).reshape(3, HEADS, size).transpose(1, 0, 2)
        if cross:
            query = {"kernel": kernel[:, :, 0], "bias": bias[:, 0]}
            inputs = {"query": query, "key_value": {"kernel": kernel[:, :, 1:], "bias": bias[:, 1:]}}
        else:
            inputs = {"qkv": {"kernel": kernel, "bias": bias}}
        return {**inputs, "out": dense(module.out_proj)}

    def block(layer, decoder):
        parts = {
            "attention": attention(layer.self_attn, False),
            "attention_norm": norm(layer.norm1),
            "mlp_in": dense(layer.linear1),
            "mlp_out": dense(layer.linear2),
            "mlp_norm": norm(layer.norm3 if decoder else layer.norm2),
        }
        if decoder:
            parts["cross_attention"] = attention(layer.multihead_attn, True)
            parts["cross_attention_norm"] = norm(layer.norm2)
        return flat(parts)

    def flat(tree, before=""):
        leaves = {}
        for name, part in tree.items():
            leaves |= flat(part, f"{before}{name}/") if isinstance(part, dict) else {f"{before}{name}": part}
        return leaves

    found = {"token_embedding/embedding": value(table.weight)}
    for name, stack in (("encoder", net.encoder), ("decoder", net.decoder)):
        layers = [block(layer, name == "decoder") for layer in stack.layers]
        found |= {f"{name}_blocks/{path}": np.stack([layer[path] for layer in layers]) for path in layers[0]}
        found |= flat({f"{name}_norm": norm(stack.norm)})
    return found


def main():
    arrays = {"input/source": SOURCE.numpy(), "input/target": TARGET.numpy()}
    for kind in ("norm_last", "norm_first"):
        net, table = make(kind == "norm_first")
        weights = watch(net)
        inputs, labels = TARGET[:, :-1], TARGET[:, 1:]
        source, target = (
            table(tokens) * math.sqrt(WIDTH) + position_encoding(tokens.shape[1]) for tokens in (SOURCE, inputs)
        )
        later = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).triu(1)
        hidden = {"src": SOURCE == PAD, "tgt": inputs == PAD, "memory": SOURCE == PAD}
        masks = {f"{name}_key_padding_mask": mask for name, mask in hidden.items()}
        logits = net(source, target, tgt_mask=later, **masks) @ table.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)
        loss.backward()
        arrays |= {f"{kind}/output/logits": logits.detach().numpy(), f"{kind}/output/loss": loss.detach().numpy()}
        arrays |= {f"{kind}/maps/{name}": torch.stack(maps).detach().numpy() for name, maps in weights.items()}
        gradients = by_our_names(net, table, lambda weight: weight.grad.numpy())
        arrays |= {f"{kind}/gradients/{path}": gradient for path, gradient in gradients.items()}
        # The same in both.
        values = by_our_names(net, table, lambda weight: weight.detach().numpy())
        arrays |= {f"weights/{path}": value for path, value in values.items()}
    path = to_write("encoder_decoder")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
