"""The process against its definitions: marginals by induction, posteriors by Bayes, predictions by algebra."""

import dataclasses
import json
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import rebuild, to_json
from dalle2_jax.diffusion import Process

SHAPES = [(3, 4, 4, 2), (3, 5)]


def _draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for shape in shapes]


def test_process_is_a_plain_value():
    process = Process(schedule="linear", timesteps=100, prediction="v", variance="fixed_small", clip=None)
    same = Process(**json.loads(json.dumps(dataclasses.asdict(process.respaced("10")))))
    tables = [same.betas, same.posterior_log_variance, same.sqrt_recipm1_alphas_cumprod, same.timestep_map]
    assert all(isinstance(table, np.ndarray) for table in tables) and same.betas.dtype == np.float64
    assert same.betas is tables[0], "tables are computed once"
    assert same == process.respaced("10") and hash(same) == hash(process.respaced("10")), (
        "tables are no part of the value"
    )
    assert same != process and same.respaced(None) == process
    assert pickle.loads(pickle.dumps(same)) == same
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.timesteps = 5


def test_process_is_a_static_argument_compiled_once():
    traces = []

    @partial(jax.jit, static_argnames="process")
    def noised(x, process):
        traces.append(process)
        return process.q_sample(x, jnp.zeros(x.shape[0], jnp.int32), x)

    x = jnp.ones((2, 3))
    first = noised(x, Process())
    np.testing.assert_array_equal(first, noised(x, Process()))
    noised(x, Process(timesteps=10))
    assert len(traces) == 2
    # Tables that were first asked for under a trace must hold no tracers.
    assert isinstance(Process().respaced("5").betas, np.ndarray)
    assert isinstance(traces[0].sqrt_alphas_cumprod, np.ndarray)


@pytest.mark.parametrize(
    "field, value",
    [
        ("schedule", "sigmoid"),
        ("prediction", "eps"),
        ("variance", "learned"),
        ("timesteps", 0),
        ("timesteps", 10.0),
        ("clip", -1.0),
        ("clip", "1"),
        ("respacing", "0"),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        Process(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("respacing", [None, "fast27"])
def test_q_sample_is_the_marginal_of_single_noising_steps(respacing):
    """DDPM Eq. 2 step by step gives Eq. 4: mean weight and variance by induction in float64."""
    process = Process(respacing=respacing)
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(process.betas):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if i % 5 == 0 or i == process.steps - 1:
            at = jnp.asarray([i], jnp.int32)
            one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
            np.testing.assert_allclose(process.q_sample(one, at, zero)[0, 0], mean, rtol=2e-6)
            np.testing.assert_allclose(process.q_sample(zero, at, one)[0, 0], np.sqrt(variance), rtol=2e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", [None, "10,10,3,2,2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_by_bayes(schedule, respacing, shape):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, in float64."""
    process = Process(schedule=schedule, respacing=respacing)
    steps = np.array([1, process.steps // 2, process.steps - 1])
    x_0, x_t = _draw(0, shape, shape)
    mean, variance, log_variance = process.q_posterior(x_0, x_t, jnp.asarray(steps, jnp.int32))
    assert mean.shape == variance.shape == log_variance.shape == shape
    for row, i in enumerate(steps):
        abar = np.cumprod(1 - process.betas)
        alpha, prior_variance = 1 - process.betas[i], 1 - abar[i - 1]
        precision = alpha / process.betas[i] + 1 / prior_variance
        weighted = np.sqrt(alpha) / process.betas[i] * np.asarray(x_t[row], np.float64)
        weighted += np.sqrt(abar[i - 1]) / prior_variance * np.asarray(x_0[row], np.float64)
        np.testing.assert_allclose(mean[row], weighted / precision, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance[row], np.full(shape[1:], 1 / precision), rtol=1e-5)
        np.testing.assert_allclose(log_variance[row], np.full(shape[1:], -np.log(precision)), rtol=1e-5)


def test_posterior_at_the_first_step_is_x_0():
    process = Process()
    x_0, x_t = _draw(1, (2, 3), (2, 3))
    mean, variance, log_variance = process.q_posterior(x_0, x_t, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(mean, x_0, rtol=1e-6)
    np.testing.assert_array_equal(variance, np.zeros((2, 3)))
    np.testing.assert_allclose(log_variance, np.full((2, 3), np.log(process.posterior_variance[1])), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_perfect_prediction_gives_back_x_0_and_the_noise(prediction, shape, clip):
    process = Process(prediction=prediction, variance="fixed_small", clip=clip)
    x_0, noise = _draw(2, shape, shape)
    i = jnp.asarray([0, 400, 900], jnp.int32)
    x_t = process.q_sample(x_0, i, noise)
    model = process.predict(process.target(x_0, noise, i), x_t, i)
    np.testing.assert_allclose(model.x_0, x_0, atol=1e-5)
    np.testing.assert_allclose(model.epsilon, noise, atol=5e-5)
    np.testing.assert_allclose(model.mean, process.q_posterior(x_0, x_t, i)[0], atol=1e-5)


def test_v_is_the_velocity_of_the_papers_angle():
    """Salimans & Ho 2022, App. D: with abar = cos^2, v = d x_t / d angle."""
    process = Process(prediction="v")
    x_0, noise = _draw(3, (1, 4), (1, 4))
    angle = np.arccos(process.sqrt_alphas_cumprod[300])
    nudged = [np.cos(angle + d) * np.asarray(x_0) + np.sin(angle + d) * np.asarray(noise) for d in (-1e-5, 1e-5)]
    v = process.target(x_0, noise, jnp.asarray([300], jnp.int32))
    np.testing.assert_allclose(v, (nudged[1] - nudged[0]) / 2e-5, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_clip_bounds_x_0_and_epsilon_follows(prediction):
    process = Process(prediction=prediction, variance="fixed_small", clip=0.5)
    output, x_t = _draw(4, (3, 6), (3, 6))
    i = jnp.asarray([100, 500, 999], jnp.int32)
    free = dataclasses.replace(process, clip=None).predict(3 * output, x_t, i)
    model = process.predict(3 * output, x_t, i)
    assert np.abs(free.x_0).max() > 0.5
    np.testing.assert_array_equal(model.x_0, np.clip(free.x_0, -0.5, 0.5))
    np.testing.assert_allclose(process.q_sample(model.x_0, i, model.epsilon), x_t, atol=1e-6)
    np.testing.assert_allclose(
        process.q_sample(free.x_0, i, free.epsilon), x_t, atol=2e-2 if prediction == "epsilon" else 1e-6
    )


def test_fixed_variances():
    i = jnp.asarray([0, 1, 500], jnp.int32)
    x = jnp.zeros((3, 2))
    small, large = Process(variance="fixed_small"), Process(variance="fixed_large")
    beta, tilde = small.betas, small.posterior_variance
    for process, expected in ((small, [tilde[1], tilde[1], tilde[500]]), (large, [tilde[1], beta[1], beta[500]])):
        variance = np.exp(process.predict(x, x, i).log_variance)
        np.testing.assert_allclose(variance, np.tile(np.array(expected)[:, None], (1, 2)), rtol=1e-5)


def test_learned_range_interpolates_the_logarithms():
    """IDDPM Eq. 15: -1 is beta~, 1 is beta, 0 their geometric mean; beta~_0 := beta~_1."""
    process = Process()
    beta, tilde = process.betas[[0, 1, 500]], process.posterior_variance[[1, 1, 500]]
    i, x = jnp.asarray([0, 1, 500], jnp.int32), jnp.zeros((3, 2))
    for v, expected in ((-1.0, tilde), (1.0, beta), (0.0, np.sqrt(beta * tilde))):
        output = jnp.concatenate([x, jnp.full_like(x, v)], axis=-1)
        variance = np.exp(process.predict(output, x, i).log_variance)
        np.testing.assert_allclose(variance, np.tile(expected[:, None], (1, 2)), rtol=1e-5)


@pytest.mark.parametrize("variance, channels", [("learned_range", 3), ("fixed_small", 6)])
def test_wrong_channel_count_is_refused(variance, channels):
    with pytest.raises(ValueError, match=f"{variance}.*{9 - channels} channels"):
        Process(variance=variance).predict(
            jnp.zeros((1, 4, 4, channels)), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32)
        )


@pytest.mark.parametrize("timesteps, respacing", [(1, None), (1000, "1")])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_a_chain_of_one_step_is_finite(timesteps, respacing, variance):
    process = Process(timesteps=timesteps, respacing=respacing, variance=variance)
    output = jnp.ones((2, 6 if variance == "learned_range" else 3))
    model = process.predict(output, jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    assert all(np.isfinite(leaf).all() for leaf in model)


def test_everything_is_float32_for_bfloat16_in_and_a_scalar_step_equals_a_batch_of_it():
    process = Process()
    output, x_t = (x.astype(jnp.bfloat16) for x in _draw(5, (2, 4), (2, 2)))
    model = process.predict(output, x_t, 7)
    batch = process.predict(output, x_t, jnp.full((2,), 7, jnp.int32))
    for one, other in zip(model, batch, strict=True):
        assert one.dtype == jnp.float32 and one.shape == x_t.shape
        np.testing.assert_array_equal(one, other)


def test_betas_of_ones_own():
    """DDPM's linear schedule given as numbers is the named one; another one's tables are those of its betas."""
    named = Process(schedule="linear", timesteps=100)
    own = Process(schedule=np.linspace(10 * 1e-4, 10 * 0.02, 100))
    assert own.timesteps == 100 and hash(own) == hash(dataclasses.replace(own))
    np.testing.assert_allclose(own.alphas_cumprod, named.alphas_cumprod, rtol=1e-12)
    betas = (0.1, 0.2, 0.4)
    process = Process(schedule=betas, prediction="x0", variance="fixed_small")
    np.testing.assert_allclose(process.alphas_cumprod, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.6])
    np.testing.assert_allclose(process.betas, betas)
    assert list(process.respaced("2").timestep_map) == [0, 2]
    assert rebuild(json.loads(json.dumps(to_json(process)))) == process
    for wrong, sentence in (
        ({"schedule": (0.1, 1.5)}, "must be numbers between 0 and 1"),
        ({"schedule": ()}, "at least one"),
        ({"schedule": betas, "timesteps": 7}, "timesteps is 7 but schedule has 3 betas; leave timesteps out"),
        ({"schedule": "cubic"}, "Process.schedule is 'cubic'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Process(**wrong)
