"""One case of transformers, measured in its own process.

    python -m benchmarks.peers.transformers_peer --case clip-b16

Its CLIPModel at the case's sizes, with its own loss, CLIP's over the batch, on images and tokens of noise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.peers.torch_step import compiled, measure_training, start_report, start_torch
from benchmarks.worker import Report, ordered_case

import transformers  # isort: skip
from transformers import CLIPConfig, CLIPModel  # isort: skip

Case = dict[str, Any]


def clip_network(case: Case) -> CLIPModel:
    """CLIP at the case's sizes."""
    text = {
        "vocab_size": case["vocabulary"],
        "hidden_size": case["text_width"],
        "intermediate_size": 4 * case["text_width"],
        "num_hidden_layers": case["text_depth"],
        "num_attention_heads": case["text_heads"],
        "max_position_embeddings": case["text_length"],
        "hidden_act": case["activation"],
        "bos_token_id": case["vocabulary"] - 2,
        "eos_token_id": case["vocabulary"] - 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": case["width"],
        "intermediate_size": 4 * case["width"],
        "num_hidden_layers": case["depth"],
        "num_attention_heads": case["heads"],
        "image_size": case["size"],
        "patch_size": case["patch"],
        "hidden_act": case["activation"],
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=case["embedding"]))


def train(case: Case, report: Report) -> None:
    """Forward and training of CLIP."""
    orders = report.orders
    network = clip_network(case).to(orders.device)
    call = compiled(network, orders)
    shape = case["batch"], case["text_length"]
    tokens = torch.randint(1, case["vocabulary"] - 2, shape, device=orders.device)
    tokens[:, -1] = case["vocabulary"] - 1  # a caption ends with its only token of that kind
    images = torch.randn(case["batch"], 3, case["size"], case["size"], device=orders.device)
    conditioning = {"input_ids": tokens, "pixel_values": images}
    measure_training(
        report, [network], lambda: call(**conditioning), lambda: call(**conditioning, return_loss=True).loss
    )


def main() -> None:
    """Measures what the orders say and prints it."""
    orders = start_torch()
    case = ordered_case(orders)
    if case["kind"] != "clip":
        sys.exit(f"transformers has no network of the shape of {orders.case}")
    train(case, start_report("transformers", orders, {"transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
