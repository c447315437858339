"""Make references/schedulers.npz: single sampling steps of diffusers' schedulers on random inputs.

Needs torch and diffusers (0.42), which the tests do not: `python -m tests.parity.make_schedulers`. Images go in
and come out as diffusers' [batch, channels, height, width] and are stored as [batch, height, width, channels].
"""

import copy

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UnCLIPScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from tests.parity.reference import to_write

STEPS = 1000
SHAPE = (2, 3, 4, 4)
KARLO = {"beta_schedule": "squaredcos_cap_v2"}


def inputs(seed: int, shape: tuple[int, ...], extra_channels: bool = False) -> list[torch.Tensor]:
    """(network output, x_t), standard normal; variance channels in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    output, x_t = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if extra_channels:
        output = torch.cat([output, 2 * torch.rand(shape, generator=generator) - 1], dim=1)
    return [output, x_t]


def channels_last(array: torch.Tensor | np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def noise_of(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that a scheduler draws from a generator with this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def record(references, name, scheduler, shape, indices, extra_channels=False, scale=1.0, **options) -> None:
    """Store a scheduler's steps at `indices` of its ascending timesteps, with everything that went into them.

    "result" is made with float64 tables, "published" with the scheduler as it comes.
    """
    timesteps = scheduler.timesteps.flip(0)
    references[f"{name}/timesteps"] = timesteps.numpy().astype(np.int32)
    references[f"{name}/i"] = np.asarray(indices, np.int32)
    exact = in_float64(copy.deepcopy(scheduler))
    stored = {"output": [], "x_t": [], "noise": [], "result": [], "published": []}
    for seed, i in enumerate(indices):
        output, x_t = inputs(100 + seed, shape, extra_channels)
        output = scale * output
        if isinstance(scheduler, UnCLIPScheduler):
            options["prev_timestep"] = int(timesteps[i - 1]) if i else -1
        values = [output, x_t, noise_of(seed, shape)]
        for which in (exact, scheduler):
            generator = torch.Generator().manual_seed(seed)
            values.append(which.step(output, int(timesteps[i]), x_t, generator=generator, **options).prev_sample)
        for key, value in zip(stored, values, strict=True):
            stored[key].append(channels_last(value))
    references.update({f"{name}/{key}": np.stack(values).astype(np.float32) for key, values in stored.items()})


def in_float64(scheduler):
    """The same scheduler with tables of float64.

    The published float32 products cost up to 3e-3 in the first and last steps, where differences of them are divided.
    """
    betas = scheduler.betas.double()
    if scheduler.config.beta_schedule == "linear":
        betas = torch.linspace(scheduler.config.beta_start, scheduler.config.beta_end, STEPS, dtype=torch.float64)
    else:
        abar = torch.cos((torch.arange(STEPS + 1, dtype=torch.float64) / STEPS + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    return scheduler


def record_dpm_solver(references: dict[str, np.ndarray], name: str, prediction: str) -> None:
    """A whole chain of DPM-Solver++(2M) over evenly spread timesteps, with random network outputs."""
    timesteps = [int(t) for t in np.rint(np.linspace(0, STEPS - 1, int(name.rpartition("/")[2])))]
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
    exact = in_float64(copy.deepcopy(scheduler))
    abar = exact.alphas_cumprod.numpy()[timesteps[::-1]]
    for which, sigmas in (("published", None), ("result", np.sqrt((1 - abar) / abar))):
        solver = copy.deepcopy(scheduler)
        solver.set_timesteps(timesteps=timesteps[::-1])
        if sigmas is not None:
            solver.sigmas = torch.from_numpy(np.append(sigmas, 0.0))
        stored = {"output": [], "x_t": [], which: []}
        for seed, timestep in enumerate(solver.timesteps):
            output, x_t = inputs(300 + seed, SHAPE)
            stored["output"].append(channels_last(output))
            stored["x_t"].append(channels_last(x_t))
            stored[which].append(channels_last(solver.step(output.double(), timestep, x_t.double()).prev_sample))
        references.update({f"{name}/{key}": np.stack(value).astype(np.float32) for key, value in stored.items()})
    references[f"{name}/timesteps"] = np.asarray(timesteps, np.int32)


def record_inverse(references: dict[str, np.ndarray], prediction: str) -> None:
    """Steps of DDIM backwards, from one timestep of the chain to the next."""
    scheduler = DDIMInverseScheduler(beta_schedule="linear", prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(25)
    exact = in_float64(scheduler)
    name, chain = f"ddim_inverse/{prediction}", scheduler.timesteps
    references[f"{name}/timesteps"] = chain.numpy().astype(np.int32)
    stored: dict[str, list] = {"output": [], "x_t": [], "result": []}
    indices = [0, 1, 12, 23]
    for seed, i in enumerate(indices):
        output, x_t = inputs(400 + seed, SHAPE)
        values = output, x_t, exact.step(output.double(), int(chain[i + 1]), x_t.double()).prev_sample
        for key, value in zip(stored, values, strict=True):
            stored[key].append(channels_last(value))
    references.update({f"{name}/{key}": np.stack(value).astype(np.float32) for key, value in stored.items()})
    references[f"{name}/i"] = np.asarray(indices, np.int32)


def record_small(references: dict[str, np.ndarray]) -> None:
    """A schedule whose end is pure noise, and dynamic thresholding."""
    for schedule in ("linear", "squaredcos_cap_v2"):
        exact = in_float64(DDIMScheduler(beta_schedule=schedule))
        betas = rescale_zero_terminal_snr(exact.betas)
        references[f"zero_snr/{schedule}"] = torch.cumprod(1 - betas, dim=0).numpy()
    thresholding = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    sample = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(7))
    sample = sample * torch.tensor([0.1, 0.7, 1.5, 9.0])[:, None, None, None]
    references["threshold/input"] = channels_last(sample)
    references["threshold/result"] = channels_last(thresholding._threshold_sample(sample))


def main() -> None:
    references = {}

    # Karlo's decoder and prior, at the step counts of its pipeline, and its upsamplers' seven steps.
    decoder = UnCLIPScheduler(variance_type="learned_range", **KARLO)
    decoder.set_timesteps(25)
    record(references, "unclip_decoder", decoder, SHAPE, [0, 1, 12, 24], extra_channels=True)
    prior = UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0, **KARLO)
    prior.set_timesteps(25)
    record(references, "unclip_prior", prior, (2, 24), [0, 1, 12, 24], scale=4.0)
    upsampler = UnCLIPScheduler(variance_type="fixed_small_log", **KARLO)
    upsampler.set_timesteps(7)
    record(references, "unclip_upsampler", upsampler, SHAPE, [0, 1, 3, 6])

    for prediction in ("epsilon", "sample", "v_prediction"):
        for schedule, variance in (("linear", "fixed_small"), ("squaredcos_cap_v2", "fixed_large")):
            ddpm = DDPMScheduler(beta_schedule=schedule, variance_type=variance, prediction_type=prediction)
            ddpm.set_timesteps(timesteps=list(range(STEPS - 1, -1, -1)))
            record(references, f"ddpm/{prediction}/{schedule}", ddpm, SHAPE, [0, 1, 500, 900, 999])
        for eta in (0.0, 0.7):
            ddim = DDIMScheduler(beta_schedule="linear", prediction_type=prediction, timestep_spacing="leading")
            ddim.set_timesteps(25)
            name = f"ddim/{prediction}/{eta}"
            record(references, name, ddim, SHAPE, [0, 1, 12, 24], eta=eta, use_clipped_model_output=True)

    learned = DDPMScheduler(beta_schedule="linear", variance_type="learned_range")
    learned.set_timesteps(50)
    record(references, "ddpm_learned", learned, SHAPE, [0, 1, 25, 49], extra_channels=True)

    for prediction in ("epsilon", "sample", "v_prediction"):
        record_dpm_solver(references, f"dpmpp/{prediction}/8", prediction)
        record_inverse(references, prediction)
    record_dpm_solver(references, "dpmpp/sample/20", "sample")
    record_small(references)

    path = to_write("schedulers")
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **references)
    print(f"{path.name}: {len(references)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
