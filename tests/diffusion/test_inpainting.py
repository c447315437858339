"""Painting around known pixels: RePaint's schedule, the exact conditional of a gaussian, and what is known stays."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import (
    REPLACEMENT,
    Process,
    Resampling,
    Sampling,
    ddim_step,
    ddpm_step,
    repaint,
    sample,
    sample_repaint,
    with_known_x_0,
)

# What get_schedule_jump of andreas128/RePaint gives, of which `t_T=250, jump_length=10, jump_n_sample=10` is the
# paper's: (steps, jump length, jump samples): (how many levels, how many evaluations, the levels' hash).
SCHEDULES = {
    (250, 10, 10): (4571, 2410, "abdd8671348e58fc"),
    (27, 10, 2): (68, 47, "3e30df2ba4ed57bd"),
    (20, 10, 3): (61, 40, "a0c538b74ed6a21f"),
    (21, 10, 3): (102, 61, "811c9299771b72d4"),
}
SHORT = "11 10 9 8 7 6 7 8 9 8 7 6 7 8 9 8 7 6 5 4 3 4 5 6 5 4 3 4 5 6 5 4 3 2 1 0 1 2 3 2 1 0 1 2 3 2 1 0 -1"


def test_the_schedule_is_repaints():
    assert " ".join(map(str, Resampling(3, 3).levels(12))) == SHORT
    for (steps, length, samples), (levels, evaluations, digest) in SCHEDULES.items():
        found = Resampling(length, samples).levels(steps)
        assert len(found) == levels and len(Resampling(length, samples).moves(steps)[0]) == evaluations
        assert hashlib.sha256(" ".join(map(str, found)).encode()).hexdigest()[:16] == digest
    # A chain no longer than a jump, and replacement alone, go straight down.
    assert Resampling().levels(7) == Resampling(3, 1).levels(7) == [6, 5, 4, 3, 2, 1, 0, -1]


def test_steps_up_are_taken_at_once():
    starts, evaluated = Resampling(3, 2).moves(7)
    assert starts.tolist() == [6, 5, 4, 3, 5, 4, 3, 2, 1, 0, 2, 1, 0]
    assert evaluated.tolist() == [6, 5, 4, 6, 5, 4, 3, 2, 1, 3, 2, 1, 0]


@pytest.mark.parametrize("wrong", [{"jump_length": 0}, {"jump_samples": 0}, {"jump_samples": 1.5}])
def test_no_such_jumps(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is {wrong[name]}; it must be a whole number of 1 or more"):
        Resampling(**wrong)


# Three pixels of one channel, normally distributed; the last is known.
MEAN = np.array([0.3, -0.5, 0.2])
COVARIANCE = np.array([[1.0, 0.5, 0.8], [0.5, 0.7, 0.3], [0.8, 0.3, 0.9]])
VALUE = 1.4
MASK = np.array([False, False, True]).reshape(1, 1, 3, 1)
PROCESS = Process(schedule="cosine", timesteps=200, prediction="x0", variance="fixed_small", clip=None)


def exact(process: Process, prediction: str):
    """E[x_0 | x_t] of the gaussian, told as the network of a process would tell it."""

    def denoiser(x_t, t):
        x = x_t.reshape(-1, 3)
        abar = jnp.asarray(process.alphas_cumprod.astype(np.float32))[t[0]]
        covariance = jnp.asarray(COVARIANCE, jnp.float32)
        gain = abar**0.5 * covariance @ jnp.linalg.inv(abar * covariance + (1 - abar) * jnp.eye(3))
        mean = jnp.asarray(MEAN, jnp.float32)[None]
        x_0 = mean + (x - abar**0.5 * mean) @ gain.T
        epsilon = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
        told = {"x0": x_0, "epsilon": epsilon, "v": abar**0.5 * epsilon - (1 - abar) ** 0.5 * x_0}
        return told[prediction].reshape(x_t.shape)

    return denoiser


def conditional() -> tuple[np.ndarray, np.ndarray]:
    gain = COVARIANCE[:2, 2] / COVARIANCE[2, 2]
    return MEAN[:2] + gain * (VALUE - MEAN[2]), COVARIANCE[:2, :2] - np.outer(gain, COVARIANCE[2, :2])


def painted(resampling, step=ddpm_step, prediction="x0", count=2048) -> tuple[float, float]:
    """How far mean and covariance of the painted pixels are from what they are given the known one."""
    process = Process(
        schedule="cosine", timesteps=200, prediction=prediction, variance="fixed_small", clip=None, respacing="40"
    )
    denoiser = exact(PROCESS, prediction)
    known = np.where(MASK, VALUE, np.nan).repeat(count, 0)

    @jax.jit
    def run(key):
        x_T = jax.random.normal(key, (count, 1, 3, 1))
        return repaint(key, denoiser, x_T, process, jnp.asarray(known), MASK, step, resampling)

    found = np.asarray(run(jax.random.key(1))).reshape(count, 3)
    assert (found[:, 2] == np.float32(VALUE)).all()
    mean, covariance = conditional()
    away = np.abs(found[:, :2].mean(0) - mean).max(), np.abs(np.cov(found[:, :2].T) - covariance).max()
    return float(away[0]), float(away[1])


STEPS = {
    "x0": functools.partial(ddim_step, eta=0.0),
    "epsilon": functools.partial(ddim_step, eta=0.7),
    "v": ddpm_step,
}


def test_replacement_alone_is_far_from_the_conditional():
    mean, _ = painted(REPLACEMENT)
    assert mean > 0.35


@pytest.mark.parametrize("prediction", STEPS)
def test_resampling_paints_the_conditional(prediction):
    """Up to RePaint's own bias, of any step and of whatever the network predicts."""
    mean, covariance = painted(Resampling(5, 10), STEPS[prediction], prediction)
    assert mean < 0.17 and covariance < 0.15


SHAPE = (3, 2, 2, 2)
KNOWN = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE), jnp.float32)
SOME = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 2, 2, 1)) < 0.5)
X_T = jax.random.normal(jax.random.key(2), SHAPE)


def towards(level):
    """A denoiser by formula with variance channels."""
    return lambda x_t, t: jnp.concatenate(
        [0.2 * x_t + level + t.astype(jnp.float32)[:, None, None, None] / 1e3, x_t], axis=-1
    )


def test_an_image_alone_is_the_image_in_a_batch():
    keys, settings = jax.random.split(jax.random.key(0), 3), Sampling(sampler="ddpm", steps="6", variance="fixed_small")

    def run(rows):
        arrays = keys[rows], towards(0.1), X_T[rows], Process(), settings, KNOWN[rows], SOME[rows]
        return sample_repaint(*arrays, Resampling(2, 2))

    together = run(slice(None))
    np.testing.assert_allclose(run(slice(1, 2))[0], together[1], atol=1e-6)
    np.testing.assert_array_equal(jnp.where(SOME, together, 0), jnp.where(SOME, KNOWN, 0))
    assert np.abs(together - run(slice(0, 1))).max() > 0.01


def test_solvers_that_look_back_cannot_jump():
    with pytest.raises(ValueError, match="the sampler dpmpp_2m cannot go back in its chain"):
        sample_repaint(
            jax.random.key(0), towards(0), X_T, Process(), Sampling(sampler="dpmpp_2m", steps="4"), KNOWN, SOME
        )


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_the_predicted_image_is_known(prediction, variance):
    """As GLIDE's `denoised_fn` has it; what the network says elsewhere, and of the variance, stays."""
    process = Process(prediction=prediction, variance=variance, respacing="10")
    learned = variance == "learned_range"

    def told(x_t, t):
        return towards(0.3)(x_t, t)[..., : 4 if learned else 2]

    changed = with_known_x_0(told, KNOWN, SOME, process)
    for i in (0, 4, 9):
        t = jnp.full(3, process.timestep_map[i])
        before, after = (process.predict(f(X_T, t), X_T, jnp.asarray(i)) for f in (told, changed))
        expected = jnp.where(SOME, KNOWN, before.x_0)
        np.testing.assert_allclose(after.x_0, expected, atol=1e-5 if i < 9 else 5e-3)
        np.testing.assert_array_equal(after.log_variance, before.log_variance)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_every_sampler_ends_at_what_is_known(sampler):
    process = Process(prediction="epsilon")
    found = sample(
        jax.random.key(0),
        with_known_x_0(towards(0.1), KNOWN, SOME, process),
        X_T,
        process,
        Sampling(sampler=sampler, steps="8"),
    )
    np.testing.assert_allclose(jnp.where(SOME, found, 0), jnp.where(SOME, KNOWN, 0), atol=1e-4)
