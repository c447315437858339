"""Sampling as data: which chain it makes of a trained process, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.diffusion import Process, Sampling, dynamic_threshold, sample

LEARNED = Process()
FIXED = Process(prediction="x0", variance="fixed_small", clip=None, x0_error=(0.0, 0.5, 1.0))


def test_the_chain():
    assert Sampling(steps="7").process(LEARNED) == LEARNED.respaced("7")
    assert Sampling(steps="7", variance="fixed_large").process(LEARNED).variance == "fixed_large"
    assert Sampling(variance="analytic").process(FIXED).variance == "analytic"
    assert Sampling(threshold="none").process(LEARNED).clip is None
    static = Sampling(threshold="static").process(dataclasses.replace(LEARNED, clip=2.0, dynamic_percentile=0.9))
    assert (static.clip, static.dynamic_percentile) == (2.0, None)
    dynamic = Sampling(threshold="dynamic", percentile=0.9).process(LEARNED)
    assert (dynamic.clip, dynamic.dynamic_percentile) == (1.0, 0.9)


def test_the_guided_interval_is_in_timesteps():
    assert Sampling().interval(LEARNED) is None
    assert Sampling(guidance_interval=(0.25, 0.5)).interval(LEARNED) == (250.0, 500.0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sampler": "euler"}, "no sampler 'euler'; the samplers are ddim, ddpm, dpmpp_2m"),
        ({"candidates": 0}, "candidates is 0"),
        ({"variance": "large"}, "no variance 'large'"),
        ({"threshold": "soft"}, "no threshold 'soft'; the thresholds are none, static, dynamic"),
        ({"guidance_interval": (0.5, 0.2)}, "two shares from 0 to 1, the smaller first"),
        ({"guidance_interval": (0.5,)}, "two shares from 0 to 1, the smaller first"),
        ({"eta": 9.0}, "eta is 9.0; it must lie in 0 to 1"),
        ({"steps": 20}, "steps is 20; it is written as text, such as '20'"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**fields)


def test_what_a_process_cannot_have_is_refused():
    with pytest.raises(ValueError, match="the network has learned no variance"):
        Sampling(variance="learned_range").process(FIXED)
    with pytest.raises(ValueError, match="needs the network's measured error"):
        Sampling(variance="analytic").process(LEARNED)
    for threshold in ("static", "dynamic"):
        with pytest.raises(ValueError, match="scales x_0 back to the process' clamp, and this one has none"):
            Sampling(threshold=threshold).process(FIXED)
    with pytest.raises(ValueError, match="asks for 2000 steps"):
        Sampling(steps="2000").process(LEARNED)
    with pytest.raises(ValueError, match="set Process.prediction to v or x0"):
        Process(zero_terminal_snr=True)
    for changes in ({"dynamic_percentile": 1.5}, {"dynamic_percentile": 0.9, "clip": None}):
        with pytest.raises(ValueError, match="must be a share of 1"):
            dataclasses.replace(LEARNED, **changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_chain_without_signal_at_its_end_starts_there(schedule):
    """Lin et al. 2023, Sec. 3.3: pure noise belongs to the last timestep alone."""
    process = Process(schedule=schedule, prediction="v", variance="fixed_small", zero_terminal_snr=True)
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        for steps in ("1", "2", "20"):
            kept = Sampling(sampler=sampler, steps=steps).process(process).timestep_map
            assert kept[-1] == (999 if steps != "1" or sampler == "dpmpp_2m" else kept[-1]) and len(kept) == int(steps)
            assert (np.diff(kept) > 0).all()
    for steps in ("ddim25", "fast27"):
        with pytest.raises(ValueError, match="only the last one is pure noise; give a plain number of steps"):
            Sampling(steps=steps).process(process)
    with pytest.raises(ValueError, match="with one timestep leaves no signal"):
        dataclasses.replace(process, timesteps=1)


def test_a_learned_variance_is_set_aside_for_another():
    """The network's output keeps its variance channels; under a fixed variance they play no part."""

    def denoiser(x_t, t):
        return jnp.concatenate([0.5 * x_t, jnp.sin(50 * x_t)], axis=-1)

    keys, x_T = jax.random.split(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    drawn = sample(keys, denoiser, x_T, LEARNED, Sampling(sampler="ddpm", steps="5", variance="fixed_small"))
    plain = dataclasses.replace(LEARNED, variance="fixed_small")
    expected = sample(keys, lambda x, t: 0.5 * x, x_T, plain, Sampling(sampler="ddpm", steps="5"))
    np.testing.assert_array_equal(drawn, expected)


def test_dynamic_thresholds():
    """Imagen Sec. 2.3, by hand: an example's own percentile, where it is beyond the limit, is brought to the limit."""
    x = jnp.asarray([[0.5, -0.2, 0.1, 0.0], [4.0, -2.0, 1.0, 0.5]])
    found = dynamic_threshold(x, 1.0)
    np.testing.assert_allclose(found, [[0.5, -0.2, 0.1, 0.0], [1.0, -0.5, 0.25, 0.125]], atol=1e-6)
    # The median of (0.5, 1, 2, 4) is 1.5: beyond it values are clamped.
    np.testing.assert_allclose(dynamic_threshold(x, 0.5)[1], [1.0, -1.0, 1 / 1.5, 0.5 / 1.5], atol=1e-6)
    np.testing.assert_allclose(dynamic_threshold(x, 0.5, 3.0), jnp.clip(x, -3, 3), atol=1e-6)


def test_the_dynamic_threshold_is_used_in_every_step():
    process = dataclasses.replace(FIXED, clip=1.0)
    seen = Sampling(threshold="dynamic", percentile=1.0).process(process)
    output, x_t = jnp.asarray([[3.0, -6.0, 1.5]]), jnp.zeros((1, 3))
    model = seen.predict(output, x_t, jnp.int32(10))
    np.testing.assert_allclose(model.x_0, [[0.5, -1.0, 0.25]], atol=1e-6)
    np.testing.assert_allclose(model.epsilon, seen.epsilon_from_x_0(model.x_0, x_t, jnp.int32(10)))
