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
# # 01 Generative adversarial networks
#
# How does one learn to make images without a formula for what an image is? Goodfellow et al. (2014) let two networks
# play. A generator $G$ turns noise $z$ into an image. A discriminator $D$ sees images, real ones $x$ and made ones
# $G(z)$, and says how probable it is that one is real. $D$ tries to tell them apart, $G$ tries to prevent that:
#
# $$\min_G \max_D \; V(D, G) = \mathbb E_{x \sim p_{data}} \log D(x)
#   + \mathbb E_{z \sim p_z} \log\bigl(1 - D(G(z))\bigr).$$

# %%
import os
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from configs import lineage
from dalle2_jax.evaluation.oracle import read
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_float, to_uint8
from dalle2_jax.lineage import gan
from dalle2_jax.manipulate import slerp
from train.interactive import show, start
from train.recipes.gan import GANTask

system, key = lineage.system(), jax.random.key(0)

# %% [markdown]
# ## The best discriminator
#
# Let $p$ be the density of real images and $q$ that of generated ones. At each place $x$ on its own, $p \log D + q
# \log(1 - D)$ is largest at
#
# $$D^*(x) = \frac{p(x)}{p(x) + q(x)}, \qquad\text{and there}\qquad V(D^*, G) = -\log 4 + 2\, D_{JS}(p \,\Vert\, q).$$
#
# $D_{JS}$ is the Jensen-Shannon divergence, the mean of $D_{KL}(p \Vert m)$ and $D_{KL}(q \Vert m)$ with $m = (p +
# q)/2$. It is 0 if $p = q$, and $\log 2$ if they never overlap. So against the best $D$ the generator's loss is a
# distance of two distributions, and nobody has to write down either of them: samples are enough.
#
# On two distributions that we know this can be looked at. The library's loss of the discriminator is $-V/2$, computed
# from logits, and what is left of $\log 2$ is then a bound on $D_{JS}$:

# %%
print(inspect.getsource(gan.discriminator_loss))
print(inspect.getsource(gan.divergence_bound))


# %%
def density(x, mean, deviation):
    return np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


x = np.linspace(-5, 5, 1001)
p, q = density(x, 0.0, 1.0), density(x, 1.5, 0.7)
value = np.trapezoid(p * np.log(p / (p + q)) + q * np.log(q / (p + q)), x)
divergence = np.trapezoid(p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q)), x) / 2
assert abs(value - (-np.log(4) + 2 * divergence)) < 1e-4

# %% [markdown]
# Now the same from samples alone. This discriminator has three numbers, those of a parabola as its logit, and learns
# them by the loss above from 4,000 samples of each side.


# %%
def logit(numbers, x):
    return numbers[0] + numbers[1] * x + numbers[2] * x**2


@jax.jit
def learn(real, made):
    adam = optax.adam(0.05)

    def step(carry, _):
        numbers, state = carry
        gradient = jax.grad(lambda d: gan.discriminator_loss(logit(d, real), logit(d, made)))(numbers)
        change, state = adam.update(gradient, state)
        return (numbers + change, state), None

    begin = jnp.zeros(3)
    return jax.lax.scan(step, (begin, adam.init(begin)), None, 500)[0][0]


real, made = jax.random.normal(key, (2, 4000)) * jnp.array([[1.0], [0.7]]) + jnp.array([[0.0], [1.5]])
numbers = learn(real, made)
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(x, p, label="$p$")
axes.plot(x, q, label="$q$")
axes.plot(x, p / (p + q), "k", label="$p / (p + q)$")
axes.plot(x, jax.nn.sigmoid(logit(numbers, x)), "r--", label="$D$, learned")
axes.legend(fontsize=8, loc="upper left")
plt.show()
bound = float(gan.divergence_bound(logit(numbers, real), logit(numbers, made)))
print(f"Jensen-Shannon divergence {divergence:.3f} nats; what the learned discriminator sees of it: {bound:.3f}")

# %% [markdown]
# ## Two losses for the generator
#
# Of $V$ only the second term depends on $G$, so it should minimise $\log(1 - D(G(z)))$. But early on the images are
# bad, $D$ is sure, $D(G(z))$ is close to 0, and there this loss is flat: it saturates. The paper's remedy is to
# maximise $\log D(G(z))$ instead. It has the same fixed point, and its gradient is largest where the other one's
# vanishes. With $D = \sigma(\ell)$ for a logit $\ell$,
#
# $$\frac{\partial}{\partial \ell} \log(1 - \sigma(\ell)) = -\sigma(\ell), \qquad
#   \frac{\partial}{\partial \ell} \bigl(-\log \sigma(\ell)\bigr) = -(1 - \sigma(\ell)).$$

# %%
print(inspect.getsource(gan.generator_loss))

# %%
logits = jnp.linspace(-8, 8, 161)
figure, axes = plt.subplots(figsize=(6, 2.6))
for objective in gan.OBJECTIVES:
    slope = jax.vmap(jax.grad(lambda one, objective=objective: gan.generator_loss(one[None], objective)))(logits)
    axes.plot(logits, -slope, label=objective.replace("_", "-"))
axes.set(xlabel=r"$\ell$: on the left $D$ is sure that the image was made", ylabel="size of the gradient")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Algorithm 1
#
# Nobody can afford the best $D$ for each $G$. The paper takes $k$ steps of the discriminator, on new samples each, and
# then one of the generator. Written out for one dimension: the data are $\mathcal N(0, 1)$, the generator is $G(z) = a
# + e^b z$, which begins too far to the right and too narrow, and the discriminator is the parabola from above.


# %%
@jax.jit
def algorithm_1(key, k):
    steps, batch, rate = 600, 256, 0.1

    def generate(g, key):
        return g[0] + jnp.exp(g[1]) * jax.random.normal(key, (batch,))

    def discriminator(d, g, key):
        one, other = jax.random.split(key)
        return gan.discriminator_loss(logit(d, jax.random.normal(one, (batch,))), logit(d, generate(g, other)))

    def generator(g, d, key):
        return gan.generator_loss(logit(d, generate(g, key)))

    def step(players, key):
        d, g = players
        keys = partial(jax.random.fold_in, key)
        d = jax.lax.fori_loop(0, k, lambda n, d: d - rate * jax.grad(discriminator)(d, g, keys(n)), d)
        g = g - rate * jax.grad(generator)(g, d, keys(k))
        return (d, g), g

    begin = jnp.zeros(3), jnp.array([2.0, -1.0])
    return jax.lax.scan(step, begin, jax.random.split(key, steps))[1]


figure, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for k in (1, 5, 20):
    path = algorithm_1(key, k)
    axes[0].plot(path[:, 0], label=f"k = {k}")
    axes[1].plot(jnp.exp(path[:, 1]), label=f"k = {k}")
for one, name, wanted in zip(axes, ("mean $a$", "deviation $e^b$"), (0.0, 1.0)):
    one.axhline(wanted, color="k", linewidth=0.5)
    one.set(xlabel="step of the generator", title=name)
    one.legend(fontsize=8)
plt.show()

# %% [markdown]
# All three find the data's mean and deviation. With $k = 1$ the generator overshoots and circles around the solution
# before it settles: $D$ lags behind and still sends it where the samples were missing some steps ago. The larger $k$
# is, the closer $D$ is to the best one, and the straighter the way. That is the nature of a game: each step is downhill
# for one player, on a landscape that the other one has just changed. Their losses do not have to fall, and say little
# about how good the samples are.
#
# In the library one training step is one player's. The parameters have two parts, each with an optimizer of its own,
# which is at work only in its turn:

# %%
print(inspect.getsource(GANTask.gradient_transformation))

# %% [markdown]
# ## The pair of 2014
#
# First the networks of the paper: dense layers with ReLU against maxout layers with dropout, by plain SGD with
# momentum. The images are one coloured shape on a plain background. The generator's output bias starts at the mean
# image, so that its first images are grey clouds already. Left its loss, right its samples, always of the same noise.

# %%
recipe = dataclasses.replace(system.stages["gan"], steps=3000)
dense = start(system.with_stage("gan", recipe), "gan")
for now in dense.steps(every=750):
    show(now, "generator_loss")

# %% [markdown]
# That was 1500 steps of each player. The generator's loss rises, since $D$ learns faster than $G$. The samples are clouds
# of colour, hardly shapes, and most of the eight are alike.
#
# ## Convolutions
#
# The same game between convolutional networks (DCGAN; Radford et al., 2016) with Adam goes much faster. The images are
# smaller here than in `configs/lineage.py`, and so is the time; $D$ learns faster.

# %%
recipe = system.stages["gan_conv"]
recipe = dataclasses.replace(
    recipe,
    module=recipe.module.clone(image_size=16),
    discriminator_optimizer=dataclasses.replace(recipe.discriminator_optimizer, learning_rate=5e-4),
    steps=4000,
)
conv = start(system.with_stage("gan_conv", recipe), "gan_conv")
for now in conv.steps(every=25):
    if now.step % 500 == 0:
        show(now, "generator_loss")

# %% [markdown]
# Both players' curves. If $D$ could do no better than guess, its loss would be $\log 2$ (the line) and both its
# probabilities one half.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 2.6))
panels = (
    ("loss", ("discriminator_loss", "generator_loss")),
    ("what D says", ("real_probability", "fake_probability")),
    ("pairwise distance", ("data_distance", "sample_distance")),
)
for one, (title, names) in zip(axes, panels):
    for name in names:
        one.plot(*zip(*conv.history[name]), label=name.replace("_", " "))
    one.set(xlabel="step", title=title)
    one.legend(fontsize=8)
axes[0].axhline(np.log(2), color="k", linewidth=0.5)
plt.show()
last = {name: np.mean([value for _, value in points[-20:]]) for name, points in conv.history.items()}
print(gan.FAILURES.get(gan.failure(last), "neither player has won"))

# %% [markdown]
# The discriminator stays ahead: its loss is below $\log 2$, and it gives real images 0.6 and samples 0.4. The losses are
# no measure of progress. In the last third of the training they are level, the generator's at more than in the
# beginning, when all samples were grey.
#
# ## Collapse, and how to see it
#
# Nothing in the loss of a single image asks for variety. A generator that makes one perfect image, whatever the noise,
# fools $D$ for a while; then $D$ learns that image, and $G$ moves on to the next. Two measures show it. One is the root
# mean square difference of two samples, beside that of two real images (the right panel above). The other one counts:
# these images have 20 pairs of shape and colour, 2 sizes and 3 backgrounds, so 120 kinds, and an oracle reads from an
# image which one it is. Of 64 samples that are all kinds alike one expects $120\,(1 - (119/120)^{64}) \approx 50$
# different ones. (The held-out images repeat no kind before each had its turn.)
#
# For comparison a collapse that we make by hand: all noises moved close to one of them.

# %%
module, params = conv.module, conv.params
generate = jax.jit(lambda noise: to_uint8(module.apply({"params": params}, noise, method="generate")))
noise = gan.gan_noise(key, module, 64)
sampled = np.asarray(generate(noise))
collapsed = np.asarray(generate(noise[:1] + 0.1 * (noise - noise[:1])))
for name, images in (("real", conv.examples["image"]), ("sampled", sampled), ("collapsed", collapsed)):
    scenes = [scene for scene in map(read, images) if scene and len(scene.objects) == 1 and scene.objects[0].shape]
    kinds = {(s.objects[0].shape, s.objects[0].color, s.objects[0].size, s.background) for s in scenes}
    distance = float(gan.pairwise_distance(to_float(jnp.asarray(images))))
    backgrounds = " ".join(sorted({scene.background for scene in scenes}))
    print(f"{name:10} distance {distance:.2f}; read {len(scenes)} of {len(images)}; {len(kinds)} kinds; {backgrounds}")

# %%
caption_grid(sampled, [""] * 64, columns=16, cell=48)

# %%
caption_grid(collapsed, [""] * 64, columns=16, cell=48)

# %% [markdown]
# Most samples are no clean shape. Among those that are, nearly all kinds differ, and the distance is no smaller than that
# of real images: no collapse. It is even larger, and that is a sign too. Fewer samples have a grey background than the
# third that the data have, and black is farther from white than grey is from either. Both measures find the hand-made
# collapse.
#
# Run this notebook on another number of cores, and the samples are others, from the same seed. Sums are rounded
# differently, and the game carries each difference on. One such run ended with no grey background at all, and 17
# samples of 64 that can be read.
#
# ## Between two noises
#
# Each row goes from one noise to another, along a great circle, since normal noise of many dimensions has nearly one
# length.

# %%
starts, ends = (jnp.repeat(some[:, None], 16, axis=1) for some in (noise[:4], noise[4:8]))
between = slerp(starts, ends, jnp.linspace(0, 1, 16))
rows = np.asarray(generate(between.reshape(64, -1))).reshape(4, 16, *sampled.shape[1:])
caption_grid(list(rows), [""] * 16, columns=16, cell=48)

# %% [markdown]
# Images change gradually from end to end: the generator has not stored images, it has learned a map from the noise.
# The way goes through images that the data do not have, in which one thing has two colours.
#
# ## No way back
#
# To vary or to edit a given image this way, one needs its noise. The generator has no inverse, and the discriminator's
# answer is a single number. One can only search: gradient descent on $\lVert G(z) - x \rVert^2$, for each image anew.
# Four real images, and four that the generator made itself, for which a $z$ with no error exists:

# %%
SEARCH = 2 if os.environ.get("DALLE2_QUICK") else 200  # steps


@jax.jit
def search(images, noise):
    adam = optax.adam(0.1)

    def error(noise):
        return jnp.square(module.apply({"params": params}, noise, method="generate") - images).mean((1, 2, 3))

    def step(carry, _):
        noise, state = carry
        change, state = adam.update(jax.grad(lambda z: error(z).sum())(noise), state)
        return (noise + change, state), None

    found = jax.lax.scan(step, (noise, adam.init(noise)), None, SEARCH)[0][0]
    return to_uint8(module.apply({"params": params}, found, method="generate")), error(found)


given = np.concatenate([conv.examples["image"][:4], sampled[:4]])
found, errors = search(to_float(jnp.asarray(given)), noise[8:16])
captions = [f"{origin}, error {error:.3f}" for origin, error in zip(["real"] * 4 + ["its own"] * 4, errors)]
caption_grid([given, np.asarray(found)], captions, labels=("given", "found"))

# %% [markdown]
# Two discs are found again, if not to the pixel. The yellow square comes back with round edges, and the red one on grey
# as a stain. Its own images come back closer. Nothing in the game asked $G$ to be able to make every image of the data.
#
# ## What went wrong, and what comes next
#
# After two minutes, and by one pass through a network, there are images in full colours with hard edges, though most
# shapes are blobs. But training is a game without a loss that says how far one is, either player may win it, kinds of
# images may be missing without a sign in the losses, and there is no way from an image to its noise.
#
# **02** begins with that way back: an encoder and a decoder that are trained together, and then a loss that is a bound
# on the likelihood of every image of the data, so that none can be left out.
