# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 Autoencoder and VAE
#
# A GAN has no way from an image back to its noise. An autoencoder is that way and its return: an encoder $f$ squeezes an
# image $x$ into a few numbers $z = f(x)$, a decoder $g$ unfolds them again, and both learn from the error
#
# $$\mathcal L_{AE} = \lVert x - g(f(x)) \rVert^2 .$$
#
# The variational autoencoder (Kingma and Welling, 2014) makes of the same two networks a model that one can sample from.

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from configs import lineage
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_uint8
from dalle2_jax.lineage import vae
from dalle2_jax.lineage.autoencoder import reconstruct
from train.interactive import show, start

system, key = lineage.system(), jax.random.key(0)
for name in ("autoencoder", "vae"):  # half of their steps, to be done in five minutes
    system = system.with_stage(name, dataclasses.replace(system.stages[name], steps=1500))

# %% [markdown]
# ## An autoencoder
#
# The images are one coloured shape on a plain background. Left the loss; right, held-out images as they come back.

# %%
autoencoder = start(system, "autoencoder")
for now in autoencoder.steps(every=300):
    show(now)

# %% [markdown]
# Its reconstructions are good. But what does it decode of numbers that no image gave? Nothing in $\mathcal L_{AE}$ says
# what lies between the points $f(x)$, or how far apart they are, so that a $z$ from $\mathcal N(0, I)$ falls anywhere.

# %%
module, params = autoencoder.module, autoencoder.params
noise = jax.random.normal(key, (8, module.latent_size))
caption_grid(np.asarray(to_uint8(module.apply({"params": params}, noise, method="decode"))), [""] * 8)

# %% [markdown]
# ## A variational one
#
# Now the encoder gives a distribution, $q(z|x) = \mathcal N(\mu(x), \sigma^2(x))$, the decoder another, $p(x|z)$, and a
# prior $p(z) = \mathcal N(0, I)$ says how latents lie. What is maximised is a lower bound on $\log p(x)$:
#
# $$\log p(x) \;\ge\; \mathbb E_{q(z|x)} \log p(x|z) \;-\; D_{KL}\bigl(q(z|x)\,\Vert\,p(z)\bigr),$$
#
# and with the reparametrisation $z = \mu + \sigma\epsilon$, $\epsilon \sim \mathcal N(0, I)$, its gradient goes through
# the sampling. For two normal distributions the divergence has a closed form:
#
# $$D_{KL} = -\tfrac12 \sum_j \bigl(1 + \log\sigma_j^2 - \mu_j^2 - \sigma_j^2\bigr).$$
#
# One finds it written with $\sigma$ where $\sigma^2$ belongs, as $-\tfrac12\sum(1 + \log\sigma - \mu^2 - \sigma^2)$, and the
# first term of the bound left out. That is no divergence: at $\mu = 0$ it is least at $\sigma = 1/\sqrt2$, where it is
# negative. And without the first term nothing would tie $z$ to the image.

# %%
sigma = jnp.linspace(0.05, 2.0, 200)
right = -0.5 * (1 + jnp.log(sigma**2) - sigma**2)
wrong = -0.5 * (1 + jnp.log(sigma) - sigma**2)
figure, axes = plt.subplots(figsize=(5, 2.5))
axes.plot(sigma, right, label=r"$\log\sigma^2$: least at 1, where it is 0")
axes.plot(sigma, wrong, label=rf"$\log\sigma$: least at {float(sigma[wrong.argmin()]):.2f}, where it is {float(wrong.min()):.3f}")
axes.set(xlabel=r"$\sigma$", ylim=(-0.2, 1.5))
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# In this library the bound is these lines. Both terms are summed over their own dimensions and averaged over the batch
# alone: a mean over pixels in one and a sum over latents in the other would be a hidden weight.

# %%
print(inspect.getsource(vae.elbo))

# %%
trained = start(system, "vae")
for now in trained.steps(every=300):
    show(now, "negative_elbo")

# %% [markdown]
# Both terms, in nats an image: what it costs to say the image when $z$ is known, and what it costs to say $z$.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.5))
for one, name in zip(axes, ("reconstruction", "kl")):
    one.plot(*zip(*trained.history[name]))
    one.set(xlabel="step", title=name)
plt.show()
{name: round(value, 3) for name, value in trained.validate().items()}

# %% [markdown]
# The bound's gap to $\log p(x)$ closes with more samples $z_k$ of each image (Burda et al., 2016):
# $\log \frac1K \sum_k p(x, z_k) / q(z_k|x)$. `importance_bound` above is the same for K = 8, and as it must be, lower.
#
# Now sampling is what the model was made for: $z \sim \mathcal N(0, I)$, decoded.

# %%
module, params = trained.module, trained.params
sampled = vae.sample_vae(key, module, params, 16)
caption_grid(np.asarray(to_uint8(sampled)), [""] * 16)

# %% [markdown]
# ## The latent space
#
# The line between two images' latents, and below it what each of the first latents does, from -2 to 2, while the others
# rest at the first image's.

# %%
held_out = trained.examples["image"][:2]
images = trained.task._images({"image": jnp.asarray(held_out)}, key)
mean, _ = module.apply({"params": params}, images, method="encode")


def decode(latent):
    return np.asarray(to_uint8(module.apply({"params": params}, latent, method="decode").images))


rows = [decode(vae.interpolate(mean[0], mean[1], 9))]
rows += [decode(vae.traverse(mean[0], dimension, jnp.linspace(-2, 2, 9))) for dimension in range(4)]
caption_grid(rows, [""] * 9, columns=9, labels=["line", *(f"z{dimension}" for dimension in range(4))])

# %% [markdown]
# ## What went wrong, and what comes next
#
# The samples are blurred. $p(x|z)$ takes each pixel on its own, so where the model is not sure of an edge it says the
# mean of all places where the edge could be; and colours and shapes between two known ones are neither. A GAN has sharp
# samples, since a blur is what its discriminator sees first, but is hard to train; a VAE is easy to train and blurs.
#
# **03** keeps the VAE's bound and gives up its single step from noise to image: a chain of a thousand small ones, each
# of which is nearly a normal distribution, where a mean of possibilities is right.
