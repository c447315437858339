"""What is sampled of tokens: the most probable ones in their proportions, and guidance between two predictions."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.token_sampling import TokenSampling, guided_log_probabilities, restrict


def test_restricted_to_the_most_probable():
    logits = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32) * 2
    for top_k, top_p, temperature in ((None, 1.0, 1.0), (3, 1.0, 1.0), (None, 0.6, 1.0), (4, 0.7, 0.5), (1, 0.1, 2.0)):
        sampling = TokenSampling(top_k=top_k, top_p=top_p, temperature=temperature)
        found = np.asarray(restrict(jnp.asarray(logits), sampling.turned()))
        for row, result in zip(logits.astype(np.float64) / temperature, found, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            kept, total = [], 0.0
            for place in np.argsort(-probabilities):
                if len(kept) == (top_k or 9) or (total >= top_p and kept):
                    break
                kept.append(place)
                total += probabilities[place]
            np.testing.assert_array_equal(np.flatnonzero(np.isfinite(result)), np.sort(kept))
            np.testing.assert_allclose(result[kept], np.log(probabilities[kept]), rtol=1e-4, atol=1e-5)
    coldest = restrict(jnp.asarray(logits), TokenSampling(temperature=0.0))
    np.testing.assert_array_equal(np.isfinite(coldest).sum(1), 1)
    np.testing.assert_array_equal(np.argmax(coldest, axis=1), logits.argmax(1))


def test_guidance_of_one_is_the_conditional():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    np.testing.assert_array_equal(guided_log_probabilities(logits[:2], None), logits[:2])
    guided = guided_log_probabilities(logits, jnp.float32(1.0))
    np.testing.assert_allclose(guided, jax.nn.log_softmax(logits[:2]), atol=1e-6)
