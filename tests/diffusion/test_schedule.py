"""Schedules and respacing against published step lists and closed forms."""

import math

import numpy as np
import pytest

from dalle2_jax.diffusion import Process, betas, cosine_betas, linear_betas, respace

FAST27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
FAST27 += [400, 500, 599, 600, 799, 800, 997]


def test_published_step_lists():
    assert list(respace("fast27", 1000)) == FAST27
    assert list(respace("10,10,3,2,2", 1000)) == FAST27[:-1] + [999]
    assert list(respace("7", 1000)) == [0, 166, 333, 500, 666, 832, 999]
    assert list(respace("25", 1000))[:8] == [0, 42, 83, 125, 166, 208, 250, 291]
    assert list(respace("25", 1000))[-2:] == [957, 999]
    assert list(respace("ddim25", 1000)) == list(range(0, 1000, 40))
    assert respace("1000", 1000) == tuple(range(1000))


def test_steps_that_begin_later():
    assert respace("from20:50", 1000) == tuple(20 + step for step in respace("50", 980))
    assert respace("from990:10", 1000) == tuple(range(990, 1000)) and respace("from25:1", 1000) == (999,)


def test_one_step_starts_from_noise():
    assert respace("1", 1000) == (999,)


@pytest.mark.parametrize("timesteps", [37, 100, 1000])
def test_steps_ascend_without_repetition(timesteps):
    for count in range(1, timesteps + 1):
        steps = respace(str(count), timesteps)
        assert len(steps) == count and list(steps) == sorted(set(steps)) and steps[-1] == timesteps - 1
    uneven = respace("4,1,7", timesteps)
    assert len(uneven) == 12 and list(uneven) == sorted(set(uneven))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "from25",
        "from25:2,3",
        "from:25",
        "from990:11",
        "from1000:1",
        "0",
        "-3",
        "2.5",
        "ten",
        "10,,3",
        "10,0",
        "1001",
        "600,600",
        "ddim",
        "ddim7.",
        "ddim10,10",
        "ddim999",
        25,
        None,
    ],
)
def test_bad_specs_are_named(spec):
    with pytest.raises(ValueError, match="respacing") as error:
        respace(spec, 1000)
    assert repr(spec) in str(error.value) and "fast27" in str(error.value) and "\n" not in str(error.value)


def test_published_values_of_the_schedules():
    cosine, linear = np.cumprod(1 - cosine_betas(1000)), np.cumprod(1 - linear_betas(1000))
    np.testing.assert_allclose(cosine_betas(1000)[0], 4.1284225e-5, rtol=1e-7)
    np.testing.assert_allclose(cosine[[0, 500, 999]], [0.99995872, 0.49228517, 2.4288e-9], rtol=2e-5)
    np.testing.assert_allclose(linear[[500, 999]], [0.07779666, 4.03583e-5], rtol=1e-6)
    np.testing.assert_allclose(linear_betas(1000)[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    assert cosine_betas(1000).dtype == linear_betas(1000).dtype == np.float64


def test_cosine_follows_the_closed_form_until_the_cap():
    abar = np.cumprod(1 - cosine_betas(500))
    expected = np.array([math.cos((t / 500 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1, 501)])
    expected /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], expected[:-1], rtol=1e-9)
    assert cosine_betas(500)[-1] == 0.999


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [1, 2, 10, 4000])
def test_betas_are_variances_at_any_length(name, timesteps):
    values = betas(name, timesteps)
    assert values.shape == (timesteps,) and np.all(values > 0) and np.all(values < 1)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'sqrt'.*cosine.*linear"):
        betas("sqrt", 1000)


@pytest.mark.parametrize("spec", ["fast27", "25", "ddim50", "1"])
def test_respaced_chain_has_the_marginals_of_the_whole(spec):
    """Skipping steps changes the betas and no abar: prod(1 - beta') is abar at the kept timesteps."""
    whole = Process()
    kept = whole.respaced(spec)
    assert kept.timestep_map.dtype == np.int32 and kept.steps == len(respace(spec, 1000))
    np.testing.assert_allclose(np.cumprod(1 - kept.betas), whole.alphas_cumprod[kept.timestep_map], rtol=1e-6)
    np.testing.assert_allclose(whole.betas, cosine_betas(1000), rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 12, 100, 900])
def test_steps_evenly_spaced_in_log_snr(name, count):
    abar = np.cumprod(1 - betas(name, 1000))
    kept = np.asarray(respace(f"logsnr{count}", 1000, abar))
    assert len(kept) == count and (np.diff(kept) > 0).all() and kept[-1] < 1000
    half_log_snr = 0.5 * np.log(abar / (1 - abar))
    # Never under noise that hides all but a sixtieth of the image's deviation, and as far as that.
    assert half_log_snr[kept[-1]] >= -5.1 and (kept[-1] == 999 or half_log_snr[kept[-1] + 1] < -5.1)
    if count in (2, 12):
        assert kept[0] == 0
        lengths = -np.diff(half_log_snr[kept])
        np.testing.assert_allclose(lengths, lengths.mean(), rtol=0.25)


def test_log_snr_steps_are_refused_where_there_are_too_few():
    abar = np.cumprod(1 - betas("cosine", 1000))
    for spec in ("logsnr1000", "logsnr0", "logsnr", "logsnr3,4"):
        with pytest.raises(ValueError, match=f"respacing '{spec}'"):
            respace(spec, 1000, abar)
    with pytest.raises(ValueError, match="give its alphas_cumprod"):
        respace("logsnr12", 1000)
