"""Zero-shot classification against brute force."""

import numpy as np

from dalle2_jax.clip import classify, zero_shot_weights


def _unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_against_brute_force():
    random = np.random.default_rng(0)
    text = _unit(random.normal(size=(5, 3, 7)))
    image = _unit(random.normal(size=(4, 7)))
    probabilities = classify(image, zero_shot_weights(text), 20.0)
    for row in range(4):
        logits = []
        for name in range(5):
            mean = sum(text[name, template].astype(np.float64) for template in range(3)) / 3
            logits.append(20.0 * image[row] @ mean / np.sqrt(mean @ mean))
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(probabilities[row], expected, rtol=1e-4)


def test_an_image_equal_to_its_caption_wins():
    text = _unit(np.random.default_rng(1).normal(size=(6, 1, 8)))
    weights = zero_shot_weights(text)
    np.testing.assert_allclose(weights, text[:, 0], atol=1e-6)
    np.testing.assert_array_equal(classify(text[:, 0], weights, 100.0).argmax(axis=1), np.arange(6))
