"""Make references/diffusion.npz: losses, bounds and steps of guided-diffusion's GaussianDiffusion on random inputs.

Needs torch and a checkout of github.com/openai/guided-diffusion, which the tests do not:
`PYTHONPATH=guided-diffusion python -m tests.parity.make_diffusion`. It runs in float64, so that the references carry no
rounding of their own. Arrays are stored as float32 [batch, height, width, channels].
"""

import numpy as np
import torch
from guided_diffusion import gaussian_diffusion
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

from tests.parity.reference import to_write

STEPS = 1000
SHAPE = (4, 3, 4, 4)
MEANS = {"epsilon": ModelMeanType.EPSILON, "x0": ModelMeanType.START_X}
VARIANCES = {
    "fixed_small": ModelVarType.FIXED_SMALL,
    "fixed_large": ModelVarType.FIXED_LARGE,
    "learned_range": ModelVarType.LEARNED_RANGE,
}
CASES = [
    ("cosine", "epsilon", "learned_range", "1000"),
    ("cosine", "epsilon", "learned_range", "10,10,3,2,2"),
    ("linear", "epsilon", "learned_range", "ddim25"),
    ("cosine", "x0", "fixed_small", "64"),
    ("linear", "epsilon", "fixed_large", "250"),
    ("linear", "x0", "learned_range", "1000"),
]


def gather(table: np.ndarray, t: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """guided-diffusion's own, without its cast to float32."""
    return torch.from_numpy(table)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


gaussian_diffusion._extract_into_tensor = gather
np.int = int  # its resampler is older than numpy's leave of the name


def process(schedule: str, mean: str, variance: str, spacing: str, loss: LossType) -> SpacedDiffusion:
    return SpacedDiffusion(
        use_timesteps=space_timesteps(STEPS, spacing),
        betas=get_named_beta_schedule(schedule, STEPS),
        model_mean_type=MEANS[mean],
        model_var_type=VARIANCES[variance],
        loss_type=loss,
        rescale_timesteps=False,
    )


def record(references: dict, case: tuple[str, str, str, str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hybrid, bound = process(*case, LossType.RESCALED_MSE), process(*case, LossType.RESCALED_KL)
    x_0 = (torch.randint(0, 256, SHAPE, generator=generator) / 127.5 - 1).double()
    noise, prediction = torch.randn((2, *SHAPE), generator=generator).double()
    if case[1] == "x0":
        prediction = x_0 + 0.3 * prediction
    output = prediction
    if case[2] == "learned_range":
        output = torch.cat([prediction, 3 * torch.rand(SHAPE, generator=generator).double() - 1.5], dim=1)
    t = torch.tensor([0, 1, hybrid.num_timesteps // 2, hybrid.num_timesteps - 1])
    shown = []

    def model(x, timesteps):
        shown.append(timesteps)
        return output

    stored = {"x_0": x_0, "noise": noise, "output": output, "i": t}
    terms = hybrid.training_losses(model, x_0, t, noise=noise)
    stored.update(loss=terms["loss"], mse=terms["mse"], timesteps=shown[0])
    stored["vlb"] = bound.training_losses(model, x_0, t, noise=noise)["loss"]
    stored["prior"] = bound._prior_bpd(x_0)
    stored["x_t"] = x_t = hybrid.q_sample(x_0, t, noise)
    stored["clamped_term"] = hybrid._vb_terms_bpd(model, x_0, x_t, t)["output"]
    moments = hybrid.p_mean_variance(model, x_t, t)
    stored.update(mean=moments["mean"], log_variance=moments["log_variance"], predicted_x_0=moments["pred_xstart"])
    torch.manual_seed(seed)
    stored["step_noise"] = torch.randn_like(x_t)
    for name, step in {
        "ddpm": lambda: hybrid.p_sample(model, x_t, t),
        "ddim": lambda: hybrid.ddim_sample(model, x_t, t),
        "ddim_noisy": lambda: hybrid.ddim_sample(model, x_t, t, eta=0.6),
    }.items():
        torch.manual_seed(seed)
        stored[name] = step()["sample"]
    for key, value in stored.items():
        array = value.numpy()
        array = np.moveaxis(array, 1, -1) if array.ndim == 4 else array
        references["/".join((*case, key))] = array.astype(np.int32 if array.dtype == np.int64 else np.float32)


def record_bound(references: dict, variance: str) -> None:
    """The whole bound of a small denoiser, with the noise of every step."""
    bound = process("cosine", "epsilon", variance, "12", LossType.RESCALED_KL)
    generator = torch.Generator().manual_seed(50)
    x_0 = (torch.randint(0, 256, SHAPE, generator=generator) / 127.5 - 1).double()

    def model(x, timesteps):
        prediction = 0.9 * x + 0.1 * torch.tanh(x)
        if variance != "learned_range":
            return prediction
        return torch.cat([prediction, torch.sin(3 * x)], dim=1)

    noises = []
    draw = torch.randn_like

    def remember(x):
        noises.append(draw(x))
        return noises[-1]

    torch.manual_seed(51)
    torch.randn_like = remember
    try:
        found = bound.calc_bpd_loop(model, x_0, clip_denoised=True)
    finally:
        torch.randn_like = draw
    name = f"bound/{variance}"
    references[f"{name}/x_0"] = np.moveaxis(x_0.numpy(), 1, -1).astype(np.float32)
    # It goes from the last step to the first; so are its noises, and its terms.
    references[f"{name}/noise"] = np.moveaxis(torch.stack(noises[::-1]).numpy(), 2, -1).astype(np.float32)
    references[f"{name}/terms"] = found["vb"].flip(1).numpy().astype(np.float32)
    references[f"{name}/mse"] = found["mse"].flip(1).numpy().astype(np.float32)
    for key, ours in (("total_bpd", "total"), ("prior_bpd", "prior")):
        references[f"{name}/{ours}"] = found[key].numpy().astype(np.float32)


def record_resampler(references: dict) -> None:
    """Timesteps drawn by their losses: what is known after a stream of losses, and the weights."""
    sampler = LossSecondMomentResampler(process("cosine", "epsilon", "fixed_small", "6", LossType.MSE))
    rng = np.random.default_rng(60)
    timesteps = rng.integers(0, 6, (40, 8))
    losses = rng.random((40, 8)) * (1 + timesteps)
    known = []
    for row, values in zip(timesteps, losses, strict=True):
        sampler.update_with_all_losses(row.tolist(), values.tolist())
        weights = sampler.weights()
        known.append(weights / weights.sum())
    references["resampler/timesteps"] = timesteps.astype(np.int32)
    references["resampler/losses"] = losses.astype(np.float32)
    references["resampler/probabilities"] = np.stack(known).astype(np.float32)
    history = sampler._loss_history
    references["resampler/history"] = history.astype(np.float32)


def main() -> None:
    references = {}
    for seed, case in enumerate(CASES):
        record(references, case, seed)
    for variance in ("fixed_small", "learned_range"):
        record_bound(references, variance)
    record_resampler(references)
    path = to_write("diffusion")
    np.savez_compressed(path, **references)
    print(f"{path.name}: {len(references)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
