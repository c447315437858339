"""Single steps against diffusers' UnCLIPScheduler (Karlo), DDPMScheduler and DDIMScheduler: same times, same noise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, ddim_step, ddpm_step

REFERENCES = Path(__file__).parent / "references" / "schedulers.npz"
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
