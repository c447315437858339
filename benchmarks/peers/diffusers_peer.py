"""One case of diffusers, measured in its own process: `python -m benchmarks.peers.diffusers_peer --case prior-2`.

The networks are those of its UnCLIPPipeline (Karlo), at the case's sizes. diffusers has no training loss for them: the
mean squared error of the prediction is taken, on images and embeddings that its scheduler has noised.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.peers.torch_step import compiled, count, measure_training, start_report, start_torch, wait
from benchmarks.worker import Report, ordered_case

import diffusers  # isort: skip
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # isort: skip
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # isort: skip

Case = dict[str, Any]
PLAIN, CROSS = "Resnet{}sampleBlock2D", "SimpleCrossAttn{}Block2D"


def prior_network(case: Case) -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=case["heads"],
        attention_head_dim=case["width"] // case["heads"],
        embedding_dim=case["embedding"],
        num_layers=case["depth"],
        num_embeddings=case["text_length"],
    )


def channels_of(case: Case) -> tuple[int, ...]:
    return tuple(case["channels"] * multiplier for multiplier in case["multipliers"])


def decoder_networks(case: Case) -> tuple[UNet2DConditionModel, UnCLIPTextProjModel]:
    """The decoder's U-Net, and the projections of caption and image embedding that go before it."""
    channels = channels_of(case)
    attends = [case["size"] // 2**level in case["attends"] for level in range(len(channels))]
    down = [CROSS.format("Down") if there else PLAIN.format("Down") for there in attends]
    up = [CROSS.format("Up") if there else PLAIN.format("Up") for there in reversed(attends)]
    network = UNet2DConditionModel(
        sample_size=case["size"],
        in_channels=3,
        out_channels=6,
        layers_per_block=case["depth"],
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=case["text_width"],
        attention_head_dim=case["head_channels"],
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    projections = UnCLIPTextProjModel(
        clip_embeddings_dim=case["embedding"],
        time_embed_dim=4 * case["channels"],
        cross_attention_dim=case["text_width"],
    )
    return network, projections


def upsampler_network(case: Case) -> UNet2DModel:
    levels = len(case["multipliers"])
    return UNet2DModel(
        sample_size=case["size"],
        in_channels=6,
        out_channels=3,
        layers_per_block=case["depth"],
        block_out_channels=channels_of(case),
        down_block_types=(PLAIN.format("Down"),) * levels,
        up_block_types=(PLAIN.format("Up"),) * levels,
        add_attention=False,
    )


def schedulers() -> tuple[UnCLIPScheduler, UnCLIPScheduler, UnCLIPScheduler]:
    """Karlo's three: of the prior, the decoder, the upsampler."""
    return (
        UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )


def train(case: Case, report: Report) -> None:
    """Forward and training of one network."""
    orders = report.orders
    batch, device, scheduler = case["batch"], orders.device, schedulers()[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=device)

    def noised(x_0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps, the noise, and what it makes of x_0."""
        timesteps = torch.randint(0, 1000, (batch,), device=device)
        noise = torch.randn_like(x_0)
        return timesteps, noise, scheduler.add_noise(x_0, noise, timesteps)

    if case["kind"] == "prior":
        network = prior_network(case).to(device)
        call = compiled(network, orders)
        x_0, text, states = (
            random(case["embedding"]),
            random(case["embedding"]),
            random(case["text_length"], case["embedding"]),
        )

        def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return call(x_t, timestep=timesteps, proj_embedding=text, encoder_hidden_states=states)[0]

        modules, of_noise = [network], False
    elif case["kind"] == "decoder":
        network, projections = (module.to(device) for module in decoder_networks(case))
        call = compiled(network, orders)
        x_0, text, states = (
            random(3, case["size"], case["size"]),
            random(case["embedding"]),
            random(case["text_length"], case["embedding"]),
        )
        image = random(case["embedding"])

        def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            context, condition = projections(
                image_embeddings=image,
                prompt_embeds=text,
                text_encoder_hidden_states=states,
                do_classifier_free_guidance=False,
            )
            return call(x_t, timesteps, encoder_hidden_states=context, class_labels=condition)[0][:, :3]

        modules, of_noise = [network, projections], True
    else:
        network = upsampler_network(case).to(device)
        call = compiled(network, orders)
        x_0, low = random(3, case["size"], case["size"]), random(3, case["low_size"], case["low_size"])

        def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            resized = torch.nn.functional.interpolate(low, size=x_t.shape[-2:], mode="bilinear")
            return call(torch.cat([x_t, resized], dim=1), timesteps)[0]

        modules, of_noise = [network], True

    def loss() -> torch.Tensor:
        timesteps, noise, x_t = noised(x_0)
        return torch.nn.functional.mse_loss(predict(x_t, timesteps).float(), noise if of_noise else x_0)

    middle = torch.full((batch,), 500, device=device)
    measure_training(report, modules, lambda: predict(x_0, middle), loss)


class Captions(torch.nn.Module):
    """In place of the text encoder: states drawn once, so that the measured path starts at them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        shape = case["batch"], case["prior"]["text_length"], case["prior"]["embedding"]
        self.register_buffer("text_embeds", torch.randn(shape[0], shape[2]))
        self.register_buffer("last_hidden_state", torch.randn(*shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.text_embeds.dtype

    @property
    def device(self) -> torch.device:
        return self.text_embeds.device

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(text_embeds=self.text_embeds, last_hidden_state=self.last_hidden_state)


class Tokens:
    """A tokenizer of captions that nobody reads."""

    def __init__(self, length: int) -> None:
        self.length = self.model_max_length = length

    def __call__(self, captions: Any, **settings: Any) -> SimpleNamespace:
        tokens = torch.ones(len(captions) if isinstance(captions, list) else 1, self.length, dtype=torch.long)
        return SimpleNamespace(input_ids=tokens, attention_mask=tokens)


def generate(case: Case, report: Report) -> None:
    """The whole pipeline from the caption's states to an image, weights in the dtype of the computation."""
    orders = report.orders
    decoder, projections = decoder_networks(case["decoder"])
    first = upsampler_network(case["upsampler"])
    # Karlo's last step has a network of its own.
    last = upsampler_network(case["upsampler"]) if case["upsampler"]["size"] >= 256 else first
    of_prior, of_decoder, of_upsampler = schedulers()
    pipe = UnCLIPPipeline(
        tokenizer=Tokens(case["prior"]["text_length"]),
        text_encoder=Captions(case),
        prior=prior_network(case["prior"]),
        text_proj=projections,
        decoder=decoder,
        super_res_first=first,
        super_res_last=last,
        prior_scheduler=of_prior,
        decoder_scheduler=of_decoder,
        super_res_scheduler=of_upsampler,
    )
    pipe.set_progress_bar_config(disable=True)
    networks = {id(module): module for module in (pipe.prior, decoder, projections, first, last)}
    pipe.to(orders.device, torch.bfloat16 if orders.dtype == "bfloat16" else torch.float32)
    for module in networks.values():
        module.eval()
    if orders.compile:
        pipe.prior, pipe.decoder = compiled(pipe.prior, orders), compiled(decoder, orders)
        pipe.super_res_first = compiled(first, orders)
        pipe.super_res_last = pipe.super_res_first if last is first else compiled(last, orders)
    steps, scales = case["steps"], case["guidance"]

    def draw() -> None:
        pipe(
            ["a caption"] * case["batch"],
            prior_num_inference_steps=steps[0],
            decoder_num_inference_steps=steps[1],
            super_res_num_inference_steps=steps[2],
            prior_guidance_scale=scales[0],
            decoder_guidance_scale=scales[1],
            output_type="np",
        )
        wait(orders)

    report.add(parameters=count(networks.values()))
    report.measure("generate", draw)


def main() -> None:
    """Measures what the orders say and prints it."""
    orders = start_torch()
    case = ordered_case(orders)
    report = start_report("diffusers", orders, {"diffusers": diffusers.__version__})
    (generate if case["kind"] == "generate" else train)(case, report)


if __name__ == "__main__":
    main()
