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
# # 07 The priors
#
# CLIP puts captions $y$ and images $x$ into one space: $z_t$ is the embedding of the caption, $z_i$ that of the image.
# DALL-E 2 draws an image in two steps. Since $z_i$ is a function of $x$,
#
# $$P(x|y) = P(x, z_i|y) = P(x|z_i, y)\,P(z_i|y).$$
#
# The second factor is the **prior**: what would CLIP see in an image of this caption? The first is the decoder, of
# which **08** tells. This notebook trains a CLIP for a short time, asks why $z_t$ will not do in place of $z_i$, and
# trains both of the paper's priors.

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from configs import shapes
from dalle2_jax.clip import encode_captions
from dalle2_jax.layers.pixels import resize, to_float
from dalle2_jax.prior import Codec, best_of, caption_condition, fit_pca, sample_prior
from train.interactive import show, start

system, key = shapes.system(), jax.random.key(0)
for name, changes in {
    "clip": {"steps": 500},
    "prior": {"steps": 400},
    "autoregressive_prior": {"steps": 400, "codec_examples": 1600},
}.items():
    system = system.with_stage(name, dataclasses.replace(system.stages[name], **changes))

# %% [markdown]
# ## A CLIP
#
# The loss is that of **06**: each image is to be nearer to its own caption than to any other of the batch.

# %%
clip = start(system, "clip")
for now in clip.steps(every=50):
    show(now)

# %% [markdown]
# ## Why a prior?
#
# Held-out images and their captions, embedded: `z_i` and `z_t`, one row each, all of length 1.

# %%
@jax.jit
def embed(params, image, tokens, mask):
    pixels = resize(to_float(image), clip.module.vision.image_size)
    return clip.module.apply({"params": params}, pixels, method="encode_image"), encode_captions(
        clip.module, params, tokens, mask
    )


z_i, captions = embed(clip.params, *(jnp.asarray(clip.examples[name]) for name in ("image", "tokens", "mask")))
z_t = captions.embedding
others = np.roll(np.arange(len(captions)), 1)  # another caption for each image


def cosine(a, b):
    return float((a * b).sum(-1).mean())


nearest = np.sort(np.asarray(z_i @ z_i.T), axis=1)[:, -2]
print(f"an image and its own caption     {cosine(z_i, z_t):5.2f}")
print(f"an image and another's caption   {cosine(z_i, z_t[others]):5.2f}")
print(f"an image and the nearest other   {nearest.mean():5.2f}")

# %% [markdown]
# The loss has done what it says: the own caption is far nearer than another's. But it only ever compares images with
# captions. Nothing asks that $z_t$ and $z_i$ be *equal*, and they are not: an image lies nearer to its neighbour among
# the images than to its own caption. This is called the modality gap. Seen along the two principal components of all
# embeddings together, with a line from each image to its caption:

# %%
pca = fit_pca([np.concatenate([z_i, z_t])], 2)
of_images, of_captions = (np.asarray(pca.project(z)) for z in (z_i, z_t))
figure, axes = plt.subplots(figsize=(5, 4))
for one, other in zip(of_images[:40], of_captions[:40]):
    axes.plot(*zip(one, other), color="0.8", linewidth=0.6, zorder=0)
axes.scatter(*of_images.T, s=12, label="images")
axes.scatter(*of_captions.T, s=12, marker="x", label="captions")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# So a decoder that has learned on embeddings of images meets, in $z_t$, a point where it has never been. And there is a
# second reason. A caption leaves things open: many images fit it, at many places of the space. What is wanted is a
# *distribution* of $z_i$, from which one draws.
#
# ## The diffusion prior
#
# It is a diffusion model whose "image" is a vector. Noise is added as in **03**, $z_i^{(t)} = \sqrt{\bar\alpha_t}\,z_i
# + \sqrt{1-\bar\alpha_t}\,\epsilon$, and a transformer takes it away again. It reads a sequence: the tokens of the
# caption, $z_t$, the timestep, $z_i^{(t)}$, and a last learned token, at whose place the answer stands. The paper found
# it better to predict $z_i$ itself than $\epsilon$:
#
# $$L_{\text{prior}} = \mathbb E_{t,\,z_i^{(t)}}\;\bigl\lVert f_\theta(z_i^{(t)}, t, y) - z_i \bigr\rVert^2 .$$
#
# In this library's functions that is

# %%
def prior_loss(params, key, z_i, t, captions, module, process):
    x_0 = module.scale_embedding(z_i)  # times the square root of the size: about one a dimension, as the noise
    x_t = process.q_sample(x_0, t, jax.random.normal(key, x_0.shape))
    predicted = module.apply({"params": params}, x_t, t, **caption_condition(module, captions))
    return jnp.mean((predicted - x_0) ** 2)


prior = start(system, "prior", {"clip": clip.loaded()})
for now in prior.steps(every=50):
    show(now)

# %% [markdown]
# What does the network go by? Below, the error of held-out embeddings at several timesteps, once under their own captions
# and once under others'. With much noise the caption is all there is: what remains of the error is what it leaves open,
# and a wrong one costs most. With little noise the answer stands in $z_i^{(t)}$, and one would expect the caption to be
# of no use. But this network believes it even there. It has never met a wrong one, and of images as simple as these the
# right one says nearly all.

# %%
of_module = functools.partial(prior_loss, module=prior.module, process=prior.task.recipe.process)
error = jax.jit(of_module)
times = np.linspace(0, 999, 9).astype(int)
figure, axes = plt.subplots(figsize=(5, 2.6))
for label, rows in (("own caption", np.arange(len(captions))), ("another's", others)):
    errors = [error(prior.params, key, z_i, jnp.full(len(z_i), t), captions[rows]) for t in times]
    axes.plot(times, errors, marker="o", label=label)
axes.set(xlabel="t", ylabel="squared error a dimension")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Sampling starts at noise and goes back in 25 steps of DDIM. The paper draws two and keeps the one with the larger
# $z_i \cdot z_t$:

# %%
print(inspect.getsource(best_of))


@functools.partial(jax.jit, static_argnames=("module", "process"))
def draw(key, params, captions, sampling, *, module, process=None):
    return sample_prior(jax.random.split(key, len(captions)), module, params, process, sampling, captions)


recipe = prior.task.recipe
settings = {"sampling": recipe.sampling.turned(), "module": recipe.module, "process": recipe.process}
first, second = (draw(one, prior.params, captions, **settings) for one in jax.random.split(key))


def report(name, z):
    to = cosine(z, z_i), cosine(z, z_t), cosine(z, z_t[others])
    print(f"{name:24s} to the true image {to[0]:5.2f}   to the caption {to[1]:5.2f}   to another's {to[2]:5.2f}")


report("the true image", z_i)
report("the caption", z_t)
report("the diffusion prior", first)
print(f"two draws of one caption: {cosine(first, second):.3f}")

# %% [markdown]
# What is drawn is nearer to the true image than the caption is: it has crossed the gap. It is about as near to the
# caption as true images are, not nearer. Two draws of one caption are nearly the same vector: this CLIP keeps of an
# image what captions say and little else, so that there is little left to draw. In the paper's, with real images and
# 1,024 dimensions, there is more.
#
# ## The autoregressive prior
#
# The other way is that of DALL-E 1 (**05**): make a sequence of the thing and predict it piece by piece. A vector
# becomes a sequence in two steps.
#
# 1. *Principal components.* The paper's CLIP has 1,024 dimensions, of which 319 components hold nearly everything. Here
#    20 of 24 are kept, in the order of their variance.
# 2. *Buckets.* Each component is cut into intervals (1,024 in the paper, 64 here). The number of the interval is a
#    code.
#
# $$P(z_i|y) \approx \prod_{k} P(c_k \mid c_{<k}, y), \qquad c_k = \text{bucket}\bigl(u_k^\top (z_i - \mu)\bigr)$$

# %%
print(inspect.getsource(Codec.encode))

autoregressive = start(system, "autoregressive_prior", {"clip": clip.loaded()})
module = autoregressive.module
codes, similarity = module.apply({"params": autoregressive.params}, z_i, z_t, method="encode")
coded = module.apply({"params": autoregressive.params}, codes, method="decode")
print("an image's codes:", *np.asarray(codes[0]))
print(f"its embedding and what the codes say of it: cosine {cosine(z_i[:1], coded[:1]):.4f}")

# %% [markdown]
# Before the codes stand the caption's tokens, $z_t$, and a token for the bucket of $z_i \cdot z_t$. In training it is
# the true one. In sampling it is drawn from the upper half of its buckets: "an embedding that fits its caption well,
# please".

# %%
for now in autoregressive.steps(every=50):
    show(now)

# %% [markdown]
# The loss is the mean of $-\log P(c_k|c_{<k}, y)$ over the codes, in nats. Guessing among 64 buckets costs
# $\log 64 = 4.16$ each. Code by code:

# %%
@jax.jit
def nats(params, codes, similarity, captions):
    logits = module.apply({"params": params}, codes, similarity, **caption_condition(module, captions))
    return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean(0)


figure, axes = plt.subplots(figsize=(5, 2.6))
axes.bar(range(1, module.components + 1), nats(autoregressive.params, codes, similarity, captions))
axes.axhline(np.log(module.buckets), color="0.5", linestyle="--")
axes.set(xlabel="code, by decreasing variance of its component", ylabel="nats")
plt.show()

# %% [markdown]
# The first codes, which say most of an image, are the ones that the caption tells most about. The last ones are little
# more than guessed, but little depends on them.
#
# Both priors, side by side:

# %%
settings = {"sampling": autoregressive.task.recipe.sampling.turned(), "module": module}
of_codes, again = (draw(one, autoregressive.params, captions, **settings) for one in jax.random.split(key))
report("the true image", z_i)
report("the caption", z_t)
report("the diffusion prior", first)
report("the autoregressive prior", of_codes)
print(f"two draws of one caption: diffusion {cosine(first, second):.3f}, autoregressive {cosine(of_codes, again):.3f}")

# %% [markdown]
# ## What went wrong, and what comes next
#
# Nothing, on this page: both priors cross the gap, and the diffusion prior is nearer to the true image, after as many
# steps. The paper came to the same choice: its diffusion prior was cheaper to train and its images were preferred. The
# autoregressive one varies more from draw to draw. On captions as plain as these most of that is error.
#
# But a cosine is no image. Whether a vector of 24 numbers, drawn by a network, is good for anything shows only once
# somebody paints it. And what CLIP has not put into $z_i$, no prior can put there: where the shape stands, for one.
#
# **08** trains the decoder $P(x|z_i, y)$, which has to make up what $z_i$ leaves out, and an upsampler on top of it.
