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
    traced = jax.jit(lambda sampling: sampling.interval(LEARNED))
    for low, high in ((0.25, 0.5), (0.3, 0.7), (0.1, 0.29), (0.0, 1.0)):
        sampling = Sampling(guidance_interval=(low, high))
        assert tuple(traced(sampling)) == (round(1000 * low), round(1000 * high))
        if high < 1:
            assert sampling.interval(LEARNED) == (round(1000 * low), round(1000 * high))
    # A boundary between two timesteps: the first that is guided is the one above it.
    assert Sampling(guidance_interval=(0.2504, 0.5006)).interval(LEARNED) == (251, 501)


def test_steps_are_a_number_or_text():
    assert Sampling(steps=20) == Sampling(steps="20") and Sampling(steps=20).steps == "20"


def test_what_is_turned_is_traced():
    """One program for all guidance scales, intervals and etas; what it does not take compiles anew."""
    traces = []

    @jax.jit
    def scale_of(sampling):
        traces.append(sampling)
        return sampling.guidance_scale * jnp.ones(1), sampling.eta, sampling.guidance_interval

    for scale in (2.0, 3.0, 7.5):
        found, eta, interval = scale_of(Sampling(guidance_scale=scale, eta=scale / 10).turned())
        assert (float(found[0]), interval) == (scale, (0.0, 1.0)) and float(eta) == pytest.approx(scale / 10)
    assert len(traces) == 1
    scale_of(Sampling(guidance_scale=2.0, steps=7).turned())
    assert len(traces) == 2
    assert Sampling(guidance_scale=1.0).turned().guidance_scale is None
    assert not Sampling(guidance_scale=1).is_guided and Sampling(guidance_scale=0.0).is_guided


@pytest.mark.parametrize("clamped", [True, False])
def test_ddim_under_a_clamp_by_formula(clamped):
    """DDIM Eq. 12 in float64: the direction by the clamped x_0, or by the network's own epsilon as in diffusers."""
    process = dataclasses.replace(LEARNED, variance="fixed_small", clip=1.0)
    random = np.random.default_rng(0)
    x = x_T = random.normal(size=(2, 5))
    weights = random.normal(size=(5, 5))
    settings = {"sampler": "ddim", "steps": 4, "eta": 0.0, "clamped_epsilon": clamped}
    chain = Sampling(**settings).process(process)
    abar = np.append(1.0, np.cumprod(1 - process.betas)[chain.timestep_map])  # before the first step nothing is noise
    touched = False
    for step in (4, 3, 2, 1):
        epsilon = x @ weights
        x_0 = (x - np.sqrt(1 - abar[step]) * epsilon) / np.sqrt(abar[step])
        touched |= bool((np.abs(x_0) > 1).any())
        x_0 = x_0.clip(-1, 1)
        if clamped:
            epsilon = (x - np.sqrt(abar[step]) * x_0) / np.sqrt(1 - abar[step])
        x = np.sqrt(abar[step - 1]) * x_0 + np.sqrt(1 - abar[step - 1]) * epsilon
    assert touched
    weights = jnp.asarray(weights, jnp.float32)
    x_T = jnp.asarray(x_T, jnp.float32)
    found = sample(jax.random.key(0), lambda x, t: x @ weights, x_T, process, Sampling(**settings))
    np.testing.assert_allclose(found, x, atol=2e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_the_path_of_a_sample(sampler):
    """It is x after each step: what the sampler gives whose last steps are left out starts there."""
    x_T = jax.random.normal(jax.random.key(1), (2, 3))
    process = dataclasses.replace(FIXED, prediction="epsilon")
    settings = Sampling(sampler=sampler, steps=5)

    def call(**options):
        return sample(jax.random.key(0), lambda x, t: 0.3 * x, x_T, process, settings, **options)

    x_0, path = call(return_path=True)
    np.testing.assert_array_equal(x_0, call())
    assert path.shape == (5, 2, 3)
    np.testing.assert_array_equal(path[-1], x_0)
    if sampler == "ddim":  # one step by hand, DDIM Eq. 12
        chain = settings.process(process)
        abar, before = chain.alphas_cumprod[-1], chain.alphas_cumprod[-2]
        x_0 = (x_T - np.sqrt(1 - abar) * 0.3 * x_T) / np.sqrt(abar)
        np.testing.assert_allclose(path[0], np.sqrt(before) * x_0 + np.sqrt(1 - before) * 0.3 * x_T, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sampler": "euler"}, "no sampler 'euler'; the samplers are ddim, ddpm, dpmpp_2m"),
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": 10**9}, "candidates is 1000000000; it must be 1 or more and at most 65536"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a finite number"),
        ({"percentile": float("nan")}, "percentile is nan; it must be a finite number, above 0 and at most 1"),
        ({"percentile": 0.0}, "percentile is 0.0; it must be above 0 and at most 1"),
        ({"variance": "large"}, "no variance 'large'"),
        ({"threshold": "soft"}, "no threshold 'soft'; the thresholds are none, static, dynamic"),
        ({"guidance_interval": (0.5, 0.2)}, "two shares from 0 to 1, the smaller first"),
        ({"guidance_interval": (0.5,)}, "two shares from 0 to 1, the smaller first"),
        ({"eta": 9.0}, "eta is 9.0; it must lie in 0 to 1"),
        ({"steps": 2.5}, "steps is 2.5; it is a number, or text such as '10,10,3,2,2'"),
        ({"steps": True}, "steps is True; it is a number, or text"),
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
            assert kept[-1] == 999 and len(kept) == int(steps)
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
