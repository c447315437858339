"""Rates, decay, clipping, accumulation and the average, each against its formula."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.errors import InputError
from train.config.optimizer import Optimizer, by_part, decay_mask, in_turn, learning_rate_schedule
from train.step.optimizer import accumulated_gradient, update_ema


def test_warm_up_then_constant():
    schedule = learning_rate_schedule(Optimizer(learning_rate=0.5, warmup_steps=4), 100)
    np.testing.assert_allclose([schedule(n) for n in range(6)], [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_warm_up_then_cosine_to_zero():
    schedule = learning_rate_schedule(Optimizer(learning_rate=2.0, warmup_steps=10, schedule="cosine"), 110)
    np.testing.assert_allclose(schedule(9), 2.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(10 + 25), 1.0 + np.cos(np.pi / 4), rtol=1e-6)
    np.testing.assert_allclose(schedule(60), 1.0, rtol=1e-6)
    np.testing.assert_allclose([schedule(110), schedule(500)], 0.0, atol=1e-7)


def test_warm_up_then_exponential_down_to_a_floor():
    """As in goodfeli/adversarial: the rate is divided by 1.000004 a step."""
    settings = {"learning_rate": 0.1, "warmup_steps": 4, "schedule": "exponential"}
    schedule = learning_rate_schedule(Optimizer(**settings, decay_rate=1 / 1.000004, least_learning_rate=1e-3), 100)
    steps = np.array([0, 3, 4, 1_000, 500_000, 3_000_000])
    expected = np.maximum(0.1 * 1.000004 ** -np.maximum(steps - 4.0, 0), 1e-3) * [0.25, 1, 1, 1, 1, 1]
    np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="decay_rate is 1.1; it must be above 0 and at most 1"):
        Optimizer(decay_rate=1.1)
    with pytest.raises(ValueError, match="schedule is 'linear'; it must be one of constant, cosine, inverse_sqrt"):
        Optimizer(schedule="linear")


def test_the_rule_of_the_transformer():
    """d^-0.5 min(step^-0.5, step warmup^-1.5), steps from 1 (Vaswani et al. 2017, Sec. 5.3)."""
    width, warmup = 512, 4000
    settings = Optimizer(learning_rate=(width * warmup) ** -0.5, warmup_steps=warmup, schedule="inverse_sqrt")
    schedule = learning_rate_schedule(settings, 100_000)
    for step in (1, 2, 3999, 4000, 4001, 16_000, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(step - 1), expected, rtol=1e-5)
    cold = learning_rate_schedule(Optimizer(learning_rate=0.5, warmup_steps=0, schedule="inverse_sqrt"), 10)
    np.testing.assert_allclose([cold(0), cold(3)], [0.5, 0.25], rtol=1e-6)


def test_no_warm_up():
    assert float(learning_rate_schedule(Optimizer(learning_rate=0.5, warmup_steps=0), 10)(0)) == 0.5


PARAMS = {
    "blocks": {"dense": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones((2, 3))}},
    "tokens": {"embedding": jnp.ones((5, 3))},
    "query": jnp.ones((1, 3)),
}


def test_only_matrices_decay():
    """Biases and scales of a scanned stack have two axes and still do not."""
    assert decay_mask(PARAMS) == {
        "blocks": {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "tokens": {"embedding": True},
        "query": False,
    }
    optimizer = Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5).gradient_transformation(10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    changes, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(changes["blocks"]["dense"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(changes["blocks"]["dense"]["bias"], 0.0)
    np.testing.assert_array_equal(changes["query"], 0.0)


def test_the_first_moment_in_bfloat16():
    """Rounded to 8 bits where it is kept; the step and the second moment are float32."""
    settings = Optimizer(learning_rate=0.1, warmup_steps=0, epsilon=0.5, gradient_clip=0.0, moment_dtype="bfloat16")
    optimizer, params = settings.gradient_transformation(10), {"w": jnp.zeros(2)}
    first, second = np.array([0.3, -0.7]), np.array([0.1, -0.9])
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.asarray(first, jnp.float32)}, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    assert [str(leaf.dtype) for leaf in moments] == ["bfloat16", "float32"]
    np.testing.assert_allclose(np.asarray(moments[0], np.float32), 0.1 * first, rtol=2**-8)
    changes, _ = optimizer.update({"w": jnp.asarray(second, jnp.float32)}, state, params)
    m = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    v = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    np.testing.assert_allclose(changes["w"], -0.1 * m / (np.sqrt(v) + 0.5), rtol=2**-7)
    with pytest.raises(ValueError, match="moment_dtype is 'int8'; it must be None, float32 or bfloat16"):
        Optimizer(moment_dtype="int8")


def test_one_step_of_adamw_with_clipping():
    """Written out: the clipped gradient g gives m_hat = g and v_hat = g^2 at the first step."""
    settings = Optimizer(learning_rate=0.1, warmup_steps=0, epsilon=0.5, gradient_clip=1.0, weight_decay=0.0)
    optimizer = settings.gradient_transformation(10)
    params, gradient = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    clipped = np.array([0.6, 0.8])
    np.testing.assert_allclose(changes["w"], -0.1 * clipped / (clipped + 0.5), rtol=1e-5)
    free = Optimizer(learning_rate=0.1, warmup_steps=0, epsilon=0.5, gradient_clip=0.0).gradient_transformation(10)
    changes, _ = free.update(gradient, free.init(params), params)
    np.testing.assert_allclose(changes["w"], -0.1 * np.array([3 / 3.5, 4 / 4.5]), rtol=1e-5)


def test_average_warms_up_and_stays_float32():
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.ones(3, jnp.bfloat16)}
    first = update_ema(ema, params, jnp.int32(0), 0.99)["w"]
    np.testing.assert_allclose(first, 0.9, rtol=1e-6)
    later = update_ema(ema, params, jnp.int32(91), 0.99)["w"]
    np.testing.assert_allclose(later, 1 - 92 / 101, rtol=1e-5)
    last = update_ema(ema, params, jnp.int32(10**6), 0.99)["w"]
    np.testing.assert_allclose(last, 0.01, rtol=1e-5)
    assert first.dtype == later.dtype == jnp.float32


def quadratic(params, batch, key, extra):
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.mean(error**2), {"largest": jnp.mean(jnp.abs(error))}, extra


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_mean_over_the_whole_batch(parts):
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=16), jnp.float32),
    }
    params, key = {"w": jnp.asarray(rng.normal(size=5), jnp.float32)}, jax.random.key(0)
    whole = accumulated_gradient(quadratic, params, batch, key, None, 1)
    split = jax.jit(lambda p, b, k: accumulated_gradient(quadratic, p, b, k, None, parts))(params, batch, key)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
        assert a.dtype == b.dtype
    by_hand = 2 * np.asarray(batch["x"]).T @ (np.asarray(batch["x"]) @ params["w"] - batch["y"]) / 16
    np.testing.assert_allclose(split[2]["w"], by_hand, rtol=1e-5)


def test_each_micro_batch_has_its_own_key_and_examples():
    def loss(params, batch, key, extra):
        metrics = {"drawn": jax.random.uniform(key), "seen": batch["x"].astype(jnp.float32).mean()}
        return params["w"].sum() * 0.0, metrics, 10 * extra + batch["x"][0]

    batch = {"x": jnp.arange(8)}
    _, metrics, _, extra = accumulated_gradient(loss, {"w": jnp.ones(2)}, batch, jax.random.key(3), jnp.int32(7), 4)
    assert int(extra) == 70123  # each micro-batch, of every fourth example, goes on from the one before it
    drawn = [jax.random.uniform(jax.random.fold_in(jax.random.key(3), index)) for index in range(4)]
    np.testing.assert_allclose(metrics["drawn"], np.mean(drawn), rtol=1e-6)
    np.testing.assert_allclose(metrics["seen"], 3.5)


def test_bfloat16_gradients_are_summed_in_float32():
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    batch = {"x": jnp.full((256, 1), 1.0, jnp.bfloat16), "y": jnp.zeros(256, jnp.bfloat16)}
    _, _, gradient, _ = accumulated_gradient(quadratic, params, batch, jax.random.key(0), None, 256)
    # Added in bfloat16, 256 twos would stick at 512.
    assert gradient["w"].dtype == jnp.bfloat16 and float(gradient["w"][0]) == 2.0
    assert optax.tree.norm(gradient) == 2.0


def steps_of(transformation, params, gradients):
    """The parameters after each gradient."""
    state, found = transformation.init(params), []
    for gradient in gradients:
        changes, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
        found.append(params)
    return found


def test_sgd_with_momentum_by_formula():
    settings = Optimizer(name="sgd", learning_rate=0.1, momentum=0.5, warmup_steps=0, gradient_clip=0.0)
    gradients = [{"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 1.0])}]
    first, second = steps_of(settings.gradient_transformation(10), {"w": jnp.zeros(2)}, gradients)
    np.testing.assert_allclose(first["w"], [-0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(second["w"], [-0.1 - 0.1 * (0.5 + 0.5), 0.2 - 0.1 * (1.0 - 1.0)], atol=1e-7)


def test_momentum_that_grows():
    settings = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.5, "warmup_steps": 0, "gradient_clip": 0.0}
    optimizer = Optimizer(**settings, momentum_final=0.7, momentum_ramp_steps=4).gradient_transformation(10)
    gradients = np.random.default_rng(0).normal(size=(7, 3))
    found = steps_of(optimizer, {"w": jnp.zeros(3)}, [{"w": jnp.float32(gradient)} for gradient in gradients])
    w, velocity = np.zeros(3), np.zeros(3)
    for momentum, gradient, after in zip((0.5, 0.55, 0.6, 0.65, 0.7, 0.7, 0.7), gradients, found, strict=True):
        velocity = momentum * velocity + gradient
        w = w - 0.1 * velocity
        np.testing.assert_allclose(after["w"], w, atol=1e-6)
    for wrong, sentence in (
        ({"momentum_final": 0.7}, "momentum_ramp_steps is 0; with a momentum_final it must be 1 or more"),
        ({"momentum_final": 0.7, "name": "adam"}, "momentum_final is 0.7 with adam; take sgd"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Optimizer(**{**settings, **wrong})


@pytest.mark.parametrize(
    "settings", [{"name": "adam"}, {"name": "sgd", "momentum_final": 0.5, "momentum_ramp_steps": 2}]
)
def test_out_of_turn_nothing_changes(settings):
    """Neither parameters nor moments nor the schedule: the rest is as if the other updates had not been."""
    optimizer = Optimizer(learning_rate=0.1, warmup_steps=3, **settings).gradient_transformation(10)
    gradients = [{"w": jnp.float32(g)} for g in np.random.default_rng(0).normal(size=(8, 3))]
    turns = (False, True, True)
    found = steps_of(in_turn(optimizer, turns), {"w": jnp.ones(3)}, gradients)
    own = [number for number in range(8) if turns[number % 3]]
    expected = steps_of(optimizer, {"w": jnp.ones(3)}, [gradients[number] for number in own])
    np.testing.assert_array_equal(found[0]["w"], 1.0)
    for number in range(8):
        last = sum(place <= number for place in own)
        if last:
            np.testing.assert_allclose(found[number]["w"], expected[last - 1]["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", (-1.0, math.nan, math.inf)),
        ("warmup_steps", (-5, 2.5, True)),
        ("decay_rate", (0.0, 1.1, math.nan)),
        ("least_learning_rate", (-1e-9, math.nan)),
        ("momentum", (1.0, -0.1, math.nan)),
        ("momentum_final", (1.0, math.nan)),
        ("beta1", (1.0, -0.5, math.nan, "0.9")),
        ("beta2", (1.0, 2, math.nan)),
        ("epsilon", (0.0, -1e-8, math.nan)),
        ("weight_decay", (-0.1, math.nan, math.inf)),
        ("gradient_clip", (-1.0, math.nan, math.inf)),
        ("accumulation", (0, -1, 1.5, None)),
        ("ema_decay", (1.0, 2.0, -1, math.nan)),
    ],
)
def test_fields_out_of_range(name, values):
    """With any of them training would go on, and train nothing or NaN."""
    for value in values:
        with pytest.raises(InputError, match=f"^optimizer.{name} is {re.escape(repr(value))}; it must be "):
            Optimizer(**{name: value})


def test_adam_is_adamw_without_decay():
    settings = {"learning_rate": 0.1, "warmup_steps": 0}
    params, gradients = {"kernel": jnp.ones((2, 2))}, [{"kernel": jnp.full((2, 2), value)} for value in (0.3, -0.1)]
    adam = steps_of(Optimizer(name="adam", **settings).gradient_transformation(10), params, gradients)
    adamw = steps_of(Optimizer(**settings).gradient_transformation(10), params, gradients)
    np.testing.assert_allclose(adam[1]["kernel"], adamw[1]["kernel"], rtol=1e-6)
    for wrong, sentence in (
        ({"name": "lamb"}, "optimizer.name is 'lamb'; it must be adamw, adam, sgd"),
        ({"name": "sgd", "weight_decay": 0.1}, "with sgd, which has none; take adamw"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Optimizer(**wrong)


def test_each_part_of_the_parameters_has_its_own():
    sgd = Optimizer(name="sgd", learning_rate=0.5, momentum=0.0, warmup_steps=0, gradient_clip=0.0)
    adam = Optimizer(name="adam", learning_rate=0.1, warmup_steps=0, epsilon=0.5, gradient_clip=0.0)
    both = by_part({"a": sgd.gradient_transformation(9), "b": adam.gradient_transformation(9)})
    params = {"a": {"w": jnp.zeros(2)}, "b": {"w": jnp.zeros(2)}}
    gradient = {"a": {"w": jnp.array([1.0, 2.0])}, "b": {"w": jnp.array([3.0, 4.0])}}
    (after,) = steps_of(both, params, [gradient])
    np.testing.assert_allclose(after["a"]["w"], [-0.5, -1.0], rtol=1e-6)
    np.testing.assert_allclose(after["b"]["w"], -0.1 * np.array([3 / 3.5, 4 / 4.5]), rtol=1e-5)
