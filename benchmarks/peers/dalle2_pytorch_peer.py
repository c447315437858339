"""One case of dalle2-pytorch, measured in its own process.

    python -m benchmarks.peers.dalle2_pytorch_peer --case prior-2

Its own training losses and samplers, at the sizes that the case has for it; embeddings and states of captions are
given, as it allows.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.peers.torch_step import count, measure_training, precision, start_report, start_torch, wait
from benchmarks.worker import Report, ordered_case

from dalle2_pytorch import Decoder, DiffusionPrior, DiffusionPriorNetwork, Unet  # isort: skip

Case = dict[str, Any]


def prior_network(case: Case) -> DiffusionPrior:
    """Its prior is as wide as its embeddings."""
    options = dict(case["dalle2_pytorch"])
    dim = options.pop("dim", case["width"])
    network = DiffusionPriorNetwork(
        dim=dim,
        depth=case["depth"],
        dim_head=case["width"] // case["heads"],
        heads=case["heads"],
        max_text_len=case["text_length"],
        **options,
    )
    return DiffusionPrior(net=network, image_embed_dim=dim, timesteps=1000, cond_drop_prob=0.1)


def decoder_unet(case: Case) -> Unet:
    return Unet(
        dim_mults=case["multipliers"],
        image_embed_dim=case["embedding"],
        text_embed_dim=case["embedding"],
        cond_on_text_encodings=True,
        max_text_len=case["text_length"],
        channels=3,
        **case["dalle2_pytorch"],
    )


def upsampler_unet(case: Case) -> Unet:
    return Unet(dim_mults=case["multipliers"], image_embed_dim=case["embedding"], channels=3, **case["dalle2_pytorch"])


def small_unet(case: Case) -> Unet:
    """Stands before an upsampler that is trained alone, since its cascade cannot begin with one."""
    return Unet(dim=8, dim_mults=(1,), image_embed_dim=case["embedding"], cond_dim=8, attn_heads=1, attn_dim_head=8)


def train(case: Case, report: Report) -> None:
    """Forward and training of one network."""
    orders = report.orders
    batch, device = case["batch"], orders.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=device)

    timesteps = torch.full((batch,), 500, device=device)
    if case["kind"] == "prior":
        prior = prior_network(case).to(device)
        size = prior.image_embed_dim
        image, conditioning = (
            random(size),
            {"text_embed": random(size), "text_encodings": random(case["text_length"], size)},
        )
        if orders.compile:
            prior.net.forward = torch.compile(prior.net.forward)
        # It scales the embeddings where they stand.
        measure_training(
            report,
            [prior],
            lambda: prior.net(image, timesteps, **conditioning),
            lambda: prior(image_embed=image.clone(), **conditioning),
        )
        return
    image = random(case["embedding"])
    images = torch.rand(batch, 3, case["size"], case["size"], device=device)
    if case["kind"] == "decoder":
        cascade = Decoder(unet=(decoder_unet(case),), image_sizes=(case["size"],), timesteps=1000).to(device)
        conditioning = {"text_encodings": random(case["text_length"], case["embedding"])}
        given, seen, number = conditioning, {}, 1
    else:
        sizes = case["low_size"], case["size"]
        cascade = Decoder(unet=(small_unet(case), upsampler_unet(case)), image_sizes=sizes, timesteps=1000).to(device)
        given, seen, number = {}, {"lowres_cond_img": random(3, case["size"], case["size"])}, 2
    network = cascade.unets[number - 1]
    if orders.compile:
        network.forward = torch.compile(network.forward)
    x_t = random(3, case["size"], case["size"])
    measure_training(
        report,
        [network],
        lambda: network(x_t, timesteps, image_embed=image, **given, **seen),
        lambda: cascade(images, image_embed=image, unet_number=number, **given),
    )


def generate(case: Case, report: Report) -> None:
    """Prior and cascade from the caption's states to an image, with as many steps of its own sampler (DDIM)."""
    orders = report.orders
    batch, device, steps, scales = case["batch"], orders.device, case["steps"], case["guidance"]
    prior = prior_network(case["prior"]).to(device).eval()
    cascade = Decoder(
        unet=(decoder_unet(case["decoder"]), upsampler_unet(case["upsampler"])),
        image_sizes=(case["decoder"]["size"], case["upsampler"]["size"]),
        timesteps=1000,
        sample_timesteps=steps[1:],
    )
    cascade = cascade.to(device).eval()
    size, length = case["prior"]["embedding"], case["prior"]["text_length"]
    text, states = torch.randn(batch, size, device=device), torch.randn(batch, length, size, device=device)
    if orders.compile:
        for network in (prior.net, *cascade.unets):
            network.forward = torch.compile(network.forward)

    def draw() -> None:
        with torch.no_grad(), precision(orders):
            conditioning = {"text_embed": text, "text_encodings": states}
            image = prior.p_sample_loop((batch, size), text_cond=conditioning, cond_scale=scales[0], timesteps=steps[0])
            images = cascade.sample(
                image_embed=image, text_encodings=states, cond_scale=(scales[1], 1.0), one_unet_in_gpu_at_time=False
            )
        images.cpu()
        wait(orders)

    report.add(parameters=count([prior, *cascade.unets]))
    report.measure("generate", draw)


def main() -> None:
    """Measures what the orders say and prints it."""
    orders = start_torch()
    case = ordered_case(orders)
    if case["kind"] == "clip" or (case["kind"] != "generate" and case["dalle2_pytorch"] is None):
        sys.exit(f"dalle2-pytorch has no network of the shape of {orders.case}")
    if case["kind"] == "generate" and case["prior"]["dalle2_pytorch"] is None:
        sys.exit(
            f"dalle2-pytorch has no networks of the shape of {orders.case}: its prior is as wide as its embeddings"
        )
    os.environ.setdefault("TQDM_DISABLE", "1")
    report = start_report("dalle2-pytorch", orders, {"dalle2-pytorch": version("dalle2-pytorch")})
    (generate if case["kind"] == "generate" else train)(case, report)


if __name__ == "__main__":
    main()
