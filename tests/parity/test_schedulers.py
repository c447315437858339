"""Single steps against diffusers' schedulers, at the same times with the same noise.

UnCLIPScheduler (Karlo), DDPMScheduler, DDIMScheduler, DDIMInverseScheduler and DPMSolverMultistepScheduler; and its
thresholding and its schedule that ends in pure noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import (
    Process,
    betas,
    ddim_inverse_step,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    dynamic_threshold,
    zero_terminal_snr,
)
from tests.parity.reference import reference_path

REFERENCES = reference_path("schedulers")
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


@pytest.fixture(scope="module")
def references():
    with np.load(REFERENCES) as file:
        return dict(file)


def _compare(references, name, process, step):
    output, x_t, noise, result = (references[f"{name}/{key}"] for key in ("output", "x_t", "noise", "result"))
    np.testing.assert_array_equal(process.timestep_map, references[f"{name}/timesteps"])
    steps = jax.jit(jax.vmap(lambda output, x_t, i, noise: step(output, x_t, i, process, noise)))
    ours = steps(output, x_t, jnp.asarray(references[f"{name}/i"]), noise)
    np.testing.assert_allclose(ours, result, atol=1e-5)
    assert np.abs(result - x_t).max() > 0.1
    # As published, their tables are products in float32, which shows at both ends of the chain.
    published, i = references[f"{name}/published"], references[f"{name}/i"]
    inner = (i > 1) & (i < process.steps - 1)
    np.testing.assert_allclose(ours, published, atol=3e-3)
    np.testing.assert_allclose(ours[inner], published[inner], atol=1e-5)


@pytest.mark.parametrize(
    "name, process",
    [
        ("unclip_decoder", Process(respacing="25")),
        ("unclip_prior", Process(prediction="x0", variance="fixed_small", clip=5.0, respacing="25")),
        ("unclip_upsampler", Process(variance="fixed_small", respacing="7")),
    ],
)
def test_ancestral_steps_are_unclip_schedulers(references, name, process):
    _compare(references, name, process, ddpm_step)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("schedule, variance", [("linear", "fixed_small"), ("squaredcos_cap_v2", "fixed_large")])
def test_ancestral_steps_are_ddpm_schedulers(references, prediction, schedule, variance):
    process = Process(schedule=SCHEDULES[schedule], prediction=PREDICTIONS[prediction], variance=variance)
    if variance == "fixed_large":
        # At the second step ours is beta, as theirs; at the first neither adds noise.
        np.testing.assert_allclose(np.exp(process.fixed_large_log_variance[1:]), process.betas[1:])
    _compare(references, f"ddpm/{prediction}/{schedule}", process, ddpm_step)


def test_learned_range_is_ddpm_schedulers(references):
    _compare(references, "ddpm_learned", Process(schedule="linear", respacing="ddim50"), ddpm_step)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_are_ddim_schedulers(references, prediction, eta):
    process = Process("linear", prediction=PREDICTIONS[prediction], variance="fixed_small", respacing="ddim25")
    _compare(references, f"ddim/{prediction}/{eta}", process, lambda *arguments: ddim_step(*arguments, eta=eta))


@pytest.mark.parametrize("name", ["epsilon/8", "sample/8", "v_prediction/8", "sample/20"])
def test_dpm_solver_steps_are_dpm_solver_multistep_schedulers(references, name):
    prediction, _, steps = name.partition("/")
    process = Process(prediction=PREDICTIONS[prediction], variance="fixed_small", clip=None, respacing=steps)
    timesteps, output, x_t, result, published = (
        references[f"dpmpp/{name}/{key}"] for key in ("timesteps", "output", "x_t", "result", "published")
    )
    np.testing.assert_array_equal(process.timestep_map, timesteps)

    @jax.jit
    def steps_of(output, x_t):
        i = jnp.arange(process.steps)[::-1]  # the chain starts at its last step
        x_0 = jax.vmap(lambda output, x_t, i: process.predict(output, x_t, i).x_0)(output, x_t, i)
        previous = jnp.concatenate([x_0[:1], x_0[:-1]])
        step = jax.vmap(lambda *arguments: dpmpp_2m_step(*arguments, process))
        return step(x_0, previous, x_t, i)

    ours = np.asarray(steps_of(output, x_t))
    # Where all is noise, epsilon and v say little of x_0 and it is huge: the error is held against the largest value.
    largest = np.maximum(1, np.abs(result).max(axis=(1, 2, 3, 4), keepdims=True))
    np.testing.assert_allclose(ours / largest, result / largest, atol=1e-5)
    np.testing.assert_allclose((ours / largest)[1:], (published / largest)[1:], atol=2e-3)
    assert np.abs(result - x_t).max() > 0.1


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_inverse_steps_are_ddim_inverse_schedulers(references, prediction):
    process = Process("linear", prediction=PREDICTIONS[prediction], variance="fixed_small", respacing="ddim25")
    timesteps, output, x_t, result, i = (
        references[f"ddim_inverse/{prediction}/{key}"] for key in ("timesteps", "output", "x_t", "result", "i")
    )
    np.testing.assert_array_equal(process.timestep_map, timesteps)
    step = jax.jit(jax.vmap(lambda output, x_t, i: ddim_inverse_step(output, x_t, i, process)))
    ours = np.asarray(step(output, x_t, i))
    largest = np.maximum(1, np.abs(result).max(axis=(1, 2, 3, 4), keepdims=True))
    np.testing.assert_allclose(ours / largest, result / largest, atol=1e-5)
    assert np.abs(result - x_t).max() > 0.1


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_schedule_that_ends_in_noise_is_diffusers(references, schedule):
    ours = zero_terminal_snr(np.cumprod(1 - betas(SCHEDULES[schedule], 1000)))
    np.testing.assert_allclose(ours, references[f"zero_snr/{schedule}"], atol=1e-12)
    assert ours[-1] == 0


def test_dynamic_thresholding_is_diffusers(references):
    ours = dynamic_threshold(jnp.asarray(references["threshold/input"]), 0.9)
    np.testing.assert_allclose(ours, references["threshold/result"], atol=1e-6)
    assert np.abs(ours).max() <= 1
