"""Losses, bounds and steps against guided-diffusion's GaussianDiffusion, from the same inputs and network outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import (
    Process,
    ddim_step,
    ddpm_step,
    diffusion_loss,
    loss_history,
    timestep_probabilities,
    update_history,
    variational_bound,
)
from dalle2_jax.diffusion.loss import vlb_term
from tests.parity.reference import reference_path

REFERENCES = reference_path("diffusion")
CASES = [
    ("cosine", "epsilon", "learned_range", "1000"),
    ("cosine", "epsilon", "learned_range", "10,10,3,2,2"),
    ("linear", "epsilon", "learned_range", "ddim25"),
    ("cosine", "x0", "fixed_small", "64"),
    ("linear", "epsilon", "fixed_large", "250"),
    ("linear", "x0", "learned_range", "1000"),
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    schedule, prediction, variance, respacing = request.param
    process = Process(schedule, prediction=prediction, variance=variance, respacing=respacing)
    prefix = "/".join(request.param) + "/"
    with np.load(REFERENCES) as file:
        return process, {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}


def test_training_losses(case):
    process, reference = case
    seen = []

    def denoiser(x_t, t):
        seen.append((x_t, t))
        return jnp.asarray(reference["output"])

    def loss(kind):
        arguments = (jax.random.key(0), denoiser, jnp.asarray(reference["x_0"]), process, kind)
        return diffusion_loss(*arguments, timesteps=reference["i"], noise=reference["noise"])

    kind = "hybrid" if process.variance == "learned_range" else "simple"
    (total, terms), (vlb, _) = loss(kind), loss("vlb")
    np.testing.assert_allclose(seen[0][0], reference["x_t"], atol=1e-6)
    np.testing.assert_array_equal(seen[0][1], reference["timesteps"])
    np.testing.assert_allclose(terms["mse"], reference["mse"], rtol=1e-5)
    np.testing.assert_allclose(vlb, reference["vlb"], rtol=1e-4)
    np.testing.assert_allclose(total, reference["loss"], rtol=1e-4)


def test_terms_of_the_bound(case):
    process, reference = case
    term = jax.jit(vlb_term, static_argnames="process")
    arguments = [jnp.asarray(reference[key]) for key in ("output", "x_0", "x_t", "i")]
    np.testing.assert_allclose(term(*arguments, process=process), reference["clamped_term"], rtol=1e-4)
    short = dataclasses.replace(process, respacing="1")  # the prior's term depends on the last step alone
    if process.timestep_map[-1] == 999:
        output = jnp.asarray(reference["output"])
        bound = variational_bound(jax.random.key(0), lambda x, t: output, arguments[1], short)
        np.testing.assert_allclose(bound["prior"], reference["prior"], rtol=1e-3, atol=1e-8)


def test_moments_and_steps(case):
    process, reference = case
    noise = reference["step_noise"]

    @jax.jit
    def everything(output, x_t, i):
        steps = {
            "ddpm": ddpm_step(output, x_t, i, process, noise),
            "ddim": ddim_step(output, x_t, i, process, noise),
            "ddim_noisy": ddim_step(output, x_t, i, process, noise, eta=0.6),
        }
        return process.predict(output, x_t, i), steps

    model, steps = everything(reference["output"], reference["x_t"], reference["i"])
    np.testing.assert_allclose(model.mean, reference["mean"], atol=1e-5)
    np.testing.assert_allclose(model.x_0, reference["predicted_x_0"], atol=1e-5)
    np.testing.assert_allclose(model.log_variance, reference["log_variance"], rtol=1e-5, atol=1e-7)
    for name, step in steps.items():
        np.testing.assert_allclose(step, reference[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_whole_bound(variance):
    with np.load(REFERENCES) as file:
        reference = {key.rpartition("/")[2]: file[key] for key in file if key.startswith(f"bound/{variance}/")}
    process = Process(variance=variance, respacing="12")

    def denoiser(x, t):
        prediction = 0.9 * x + 0.1 * jnp.tanh(x)
        return jnp.concatenate([prediction, jnp.sin(3 * x)], axis=-1) if variance == "learned_range" else prediction

    bound = jax.jit(
        lambda *arguments: variational_bound(jax.random.key(0), denoiser, arguments[0], process, arguments[1])
    )
    found = bound(reference["x_0"], reference["noise"])
    for name in ("total", "prior", "terms", "mse"):
        np.testing.assert_allclose(found[name], reference[name], rtol=3e-4, atol=1e-6, err_msg=name)


def test_importance_sampling_of_timesteps():
    with np.load(REFERENCES) as file:
        reference = {key.rpartition("/")[2]: file[key] for key in file if key.startswith("resampler/")}
    update, history = jax.jit(update_history), loss_history(6)
    for i, losses, probabilities in zip(
        reference["timesteps"], reference["losses"], reference["probabilities"], strict=True
    ):
        history = update(history, i, losses)
        np.testing.assert_allclose(timestep_probabilities(history), probabilities, rtol=1e-5)
    np.testing.assert_allclose(history.losses, reference["history"], rtol=1e-6)
    assert np.ptp(reference["probabilities"][-1]) > 0.1
