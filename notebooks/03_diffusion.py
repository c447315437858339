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
# # 03 Diffusion from the equations up
#
# A VAE goes from noise to an image in one step, and blurs where that step is unsure. Ho et al. (2020) take a thousand.
# They fix the way *to* noise, little by little, and learn the way back: each step is so small that a normal
# distribution describes it well, and then the mean of all possibilities is the right thing to predict.

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
from dalle2_jax.diffusion import Process, classifier_free_guidance, ddim, ddpm, diffusion_loss
from dalle2_jax.diffusion.loss import vlb_term
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_float, to_uint8
from train.interactive import show, start

system, key = lineage.system(), jax.random.key(0)

# %% [markdown]
# The stage `ddpm` of `configs/lineage.py` is trained further down, with images of 16 px and a smaller U-Net, so that
# two cores do it in minutes. Until then we look at its data and its process.

# %%
recipe = system.stages["ddpm"]
unet = recipe.module.unet.clone(image_size=16, channels=64, channel_multipliers=(1, 1), attention_resolutions=())
recipe = dataclasses.replace(recipe, module=recipe.module.clone(unet=unet), steps=2500)
training = start(system.with_stage("ddpm", recipe), "ddpm")


def shown(images):
    return np.asarray(to_uint8(jnp.asarray(images)))


process = recipe.process
process

# %% [markdown]
# ## The way to noise
#
# Each step shrinks the image a little and adds a little noise; $\beta_1, \dots, \beta_T$ is the schedule, here from
# $10^{-4}$ to $0.02$ in $T = 1000$ steps:
#
# $$q(x_t | x_{t-1}) = \mathcal N\bigl(\sqrt{1 - \beta_t}\, x_{t-1},\; \beta_t I\bigr).$$
#
# Sums of normal variables are normal, so that any $x_t$ can be had at once. With $\alpha_t = 1 - \beta_t$ and
# $\bar\alpha_t = \alpha_1 \cdots \alpha_t$,
#
# $$q(x_t | x_0) = \mathcal N\bigl(\sqrt{\bar\alpha_t}\, x_0,\; (1 - \bar\alpha_t) I\bigr), \qquad\text{or}\qquad
#   x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon, \quad \epsilon \sim \mathcal N(0, I).$$
#
# (Here $t$ counts from 1; the arrays of `process` count from 0.)

# %%
print(inspect.getsource(Process.q_sample))

# %%
x_0 = to_float(jnp.asarray(training.examples["image"][:1]))
noise = jax.random.normal(key, x_0.shape)
times = (0, 50, 100, 200, 300, 500, 700, 999)
caption_grid(np.concatenate([shown(process.q_sample(x_0, t, noise)) for t in times]), [f"t = {t + 1}" for t in times])

# %% [markdown]
# Step by step and at once, for one pixel of the value 0.8:

# %%
rng, x = np.random.default_rng(0), np.full(5000, 0.8)
for t, beta in enumerate(process.betas, start=1):
    x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.shape)
    if t in (10, 100, 300, 1000):
        mean, deviation = 0.8 * np.sqrt(process.alphas_cumprod[t - 1]), np.sqrt(1 - process.alphas_cumprod[t - 1])
        print(f"t = {t:4}: mean {x.mean():6.3f} and {mean:.3f}, deviation {x.std():.3f} and {deviation:.3f}")

# %% [markdown]
# $\bar\alpha_t$ is how much of the variance is still the image's. The later cosine schedule (Nichol and Dhariwal, 2021)
# spends fewer steps on what is noise already; DALL-E 2 has it in all its stages but the last upsampler.

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
for schedule in ("linear", "cosine"):
    axes.plot(Process(schedule=schedule).alphas_cumprod, label=schedule)
axes.set(xlabel="t", ylabel=r"$\bar\alpha_t$")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## One step back, if the image is known
#
# From $x_t$ alone nobody can say what $x_{t-1}$ was. From $x_t$ and $x_0$ one can: by Bayes' rule $q(x_{t-1} | x_t,
# x_0)$ is proportional to $q(x_t | x_{t-1})\, q(x_{t-1} | x_0)$, a product of two normal densities, hence normal
# itself:
#
# $$q(x_{t-1} | x_t, x_0) = \mathcal N(\tilde\mu_t, \tilde\beta_t I), \quad
#   \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\, \beta_t}{1 - \bar\alpha_t}\, x_0
#               + \frac{\sqrt{\alpha_t}\, (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t}\, x_t, \quad
#   \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}\, \beta_t .$$
#
# For one pixel, with the product taken on a grid, without the formula:

# %%
print(inspect.getsource(Process.q_posterior))

# %%
i, known, now = 5, 0.5, 0.55  # of x_0 and of x_t
grid = np.linspace(0.4, 0.65, 2001)


def normalised(log_density):
    return np.exp(log_density) / np.trapezoid(np.exp(log_density), grid)


before = process.alphas_cumprod_previous[i]
prior = normalised(-((grid - np.sqrt(before) * known) ** 2) / (2 * (1 - before)))
likelihood = normalised(-((now - np.sqrt(process.alphas[i]) * grid) ** 2) / (2 * process.betas[i]))
product = normalised(np.log(prior) + np.log(likelihood))
mean, variance, _ = map(float, process.q_posterior(known, now, i))
np.testing.assert_allclose(product, normalised(-((grid - mean) ** 2) / (2 * variance)), atol=0.02)

figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(grid, prior, label=r"$q(x_{t-1} | x_0)$")
axes.plot(grid, likelihood, label=r"$q(x_t | x_{t-1})$")
axes.plot(grid, product, "k", label=r"$q(x_{t-1} | x_t, x_0)$")
axes.set(xlabel="$x_{t-1}$")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## From the bound to a loss
#
# The model goes back by $p_\theta(x_{t-1} | x_t) = \mathcal N(\mu_\theta(x_t, t), \sigma_t^2 I)$ from $p(x_T) =
# \mathcal N(0, I)$. The bound is the VAE's, with the whole chain $x_1, \dots, x_T$ as the latent and an encoder that
# has nothing to learn:
#
# $$-\log p_\theta(x_0) \le \mathbb E_q \Bigl[
#   \underbrace{D_{KL}\bigl(q(x_T|x_0) \Vert p(x_T)\bigr)}_{L_T}
#   + \sum_{t > 1} \underbrace{D_{KL}\bigl(q(x_{t-1}|x_t, x_0) \Vert p_\theta(x_{t-1}|x_t)\bigr)}_{L_{t-1}}
#   \underbrace{{} - \log p_\theta(x_0|x_1)}_{L_0} \Bigr].$$
#
# $L_T$ has no parameters. Each $L_{t-1}$ compares two normal distributions, so but for a constant it is $\lVert
# \tilde\mu_t - \mu_\theta \rVert^2 / 2 \sigma_t^2$. Now write $x_0$ in $\tilde\mu_t$ as what $x_t$ and $\epsilon$ make
# of it, and let the network predict that $\epsilon$ and nothing else:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}
#   \Bigl(x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}}\, \epsilon\Bigr), \qquad
#   \mu_\theta = \frac{1}{\sqrt{\alpha_t}}
#   \Bigl(x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}}\, \epsilon_\theta(x_t, t)\Bigr).$$
#
# What is left of $L_{t-1}$ is a squared error with a weight:
#
# $$\frac{\beta_t^2}{2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t)}\; \lVert \epsilon - \epsilon_\theta(x_t, t) \rVert^2
#   \qquad\longrightarrow\qquad
#   L_{simple} = \mathbb E_{t, x_0, \epsilon} \lVert \epsilon - \epsilon_\theta(x_t, t) \rVert^2 .$$
#
# Leaving out the weight is the paper's choice, for better images. Both steps can be checked, for any guess of
# $\epsilon$. The first with $\sigma_t^2 = \tilde\beta_t$, where the constant is 0; the library has its terms in bits
# per dimension.

# %%
print(inspect.getsource(vlb_term))

# %%
plain = dataclasses.replace(process, variance="fixed_small", clip=None)
weight = plain.betas[1:] ** 2 / (2 * plain.posterior_variance[1:] * plain.alphas[1:] * (1 - plain.alphas_cumprod[1:]))
i = jnp.array([400])
x_t = plain.q_sample(x_0, i, noise)
guess = 0.5 * x_t
error = jnp.square(noise - guess).mean()
np.testing.assert_allclose(vlb_term(guess, x_0, x_t, i, plain)[0], weight[400 - 1] * error / np.log(2), rtol=1e-3)
loss, _ = diffusion_loss(key, lambda x_t, t: 0.5 * x_t, x_0, process, timesteps=i, noise=noise)
np.testing.assert_allclose(loss[0], error, rtol=1e-5)

figure, axes = plt.subplots(figsize=(6, 2.6))
axes.semilogy(np.arange(2, len(weight) + 2), weight, label="the bound's weight")
axes.axhline(1.0, color="k", linewidth=0.8, label=r"$L_{simple}$")
axes.set(xlabel="t")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The bound cares most for the first few $t$, noise that hardly shows. With equal weights the network spends itself on
# larger $t$, where it is decided what the image shows.
#
# ## The way back
#
# The paper's Algorithm 2 begins with noise and takes the steps $p_\theta(x_{t-1} | x_t)$, with $\sigma_t^2 = \beta_t$:
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}}
#   \Bigl(x_t - \frac{1 - \alpha_t}{\sqrt{1 - \bar\alpha_t}}\, \epsilon_\theta(x_t, t)\Bigr) + \sigma_t z .$$
#
# In numpy; beside each $x_t$ it keeps $\hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta) /
# \sqrt{\bar\alpha_t}$, the image that the network has in mind.


# %%
def algorithm_2(f, x, key, process):
    path = []
    for i in reversed(range(process.steps)):
        alpha, abar, sigma = process.alphas[i], process.alphas_cumprod[i], np.sqrt(process.betas[i])
        epsilon = f(x, process.timestep_map[i])
        path.append((x, (x - np.sqrt(1 - abar) * epsilon) / np.sqrt(abar)))
        z = np.asarray(jax.random.normal(jax.random.fold_in(key, i), x.shape)) if i > 0 else 0.0
        x = (x - (1 - alpha) / np.sqrt(1 - abar) * epsilon) / np.sqrt(alpha) + sigma * z
    return x, path


# %% [markdown]
# The library's `ddpm` is one compiled scan and goes by $\hat x_0$, which it can clamp to $[-1, 1]$. Without the clamp
# it must give the same on the same noise. For this no network is needed. If the data are $\mathcal N(0, s^2)$, the best
# guess is known: $\epsilon_\theta = x_t \sqrt{1 - \bar\alpha_t} \,/\, (\bar\alpha_t s^2 + 1 - \bar\alpha_t)$. All
# thousand steps:

# %%
table = np.sqrt(1 - process.alphas_cumprod) / (process.alphas_cumprod * 0.5**2 + 1 - process.alphas_cumprod)
x_T = np.asarray(jax.random.normal(key, (4096, 1)))


def best(x, t):
    return jnp.asarray(table, jnp.float32)[t][:, None] * x


ours, _ = algorithm_2(lambda x, t: table[t] * x, x_T, key, process)
library = np.asarray(ddpm(key, best, x_T, process.unclamped()))
np.testing.assert_allclose(ours, library, atol=1e-4)
print(f"largest difference {np.abs(ours - library).max():.1e}; deviation {ours.std():.2f}, of the data 0.50")

# %% [markdown]
# ## Training
#
# Training is Algorithm 1: an image, a random $t$, noise, one gradient step on $L_{simple}$. No second player, no
# encoder. The network is a U-Net, which sees $x_t$ and $t$. Left the loss, right samples by 50 steps of DDIM (see
# below).

# %%
for now in training.steps(every=500):
    show(now)

# %% [markdown]
# Samples over time. We take 100 of the 1,000 timesteps; the formulas stay, with the $\bar\alpha$ of those that are kept
# and $\alpha_t = \bar\alpha_t / \bar\alpha_{t-1}$.

# %%
network = jax.jit(lambda params, x, t: training.module.apply({"params": params}, x, t))


def f(x, t):
    return np.asarray(network(training.params, jnp.float32(x), jnp.full(len(x), t)))


x_T = np.asarray(jax.random.normal(key, (8, 16, 16, 3)))
chain = process.respaced("100")
samples, path = algorithm_2(f, x_T, key, chain)
places = (0, 30, 50, 60, 70, 80, 90, 99)
rows = [np.stack([path[place][kind][image] for place in places]) for image in (0, 1) for kind in (0, 1)]
labels = ("x_t", "x_0 in mind") * 2
times = [f"t = {chain.timestep_map[99 - place] + 1}" for place in places]
caption_grid([shown(row) for row in rows], times, labels=labels)

# %% [markdown]
# The image in mind begins as noise, where the step to $x_0$ is so long that any error is magnified. Then it is a blur, a
# mean over all that is possible, as in a VAE. The chain does not stop at it: it goes one small step towards it and asks
# again. Colours are settled first, edges last.
#
# ## Fewer steps
#
# DDIM (Song et al., 2021) keeps the network and changes the way back. From $\hat x_0$ it goes to $x_{t-1}$ with the
# same $\epsilon$, and adds no noise:
#
# $$x_{t-1} = \sqrt{\bar\alpha_{t-1}}\; \hat x_0 + \sqrt{1 - \bar\alpha_{t-1}}\; \epsilon_\theta .$$
#
# So each $x_T$ has one image, and the steps can be long. Here $\hat x_0$ is clamped to $[-1, 1]$, as in the library,
# and $\epsilon$ is what leads from $x_t$ to the clamped one.


# %%
def few_steps(f, x, process):
    limit = process.clip or np.inf
    for i in reversed(range(process.steps)):
        abar, before = process.alphas_cumprod[i], process.alphas_cumprod_previous[i]
        x_0 = (x - np.sqrt(1 - abar) * f(x, process.timestep_map[i])) / np.sqrt(abar)
        x_0 = np.clip(x_0, -limit, limit)
        epsilon = (x - np.sqrt(abar) * x_0) / np.sqrt(1 - abar)
        x = np.sqrt(before) * x_0 + np.sqrt(1 - before) * epsilon
    return x


line, chain = np.linspace(-3, 3, 256)[:, None], process.respaced("20")
library = np.asarray(ddim(key, best, jnp.float32(line), chain))
np.testing.assert_allclose(few_steps(lambda x, t: table[t] * x, line, chain), library, atol=1e-4)

ways = {f"DDIM, {steps}": few_steps(f, x_T, process.respaced(steps)) for steps in ("5", "10", "25", "50")}
ways["Alg. 2, 25"] = algorithm_2(f, x_T, key, process.respaced("25"))[0]
ways["Alg. 2, 100"] = samples
caption_grid([shown(images) for images in ways.values()], [""] * 8, labels=list(ways))

# %% [markdown]
# All rows begin with the same noise. DDIM's become the same images as the steps grow in number; those of Algorithm 2 go
# their own ways, since it adds noise that depends on the steps.
#
# ## Bits per dimension
#
# The bound itself, in bits a pixel and channel; to write the bytes down as they are takes 8. Here are single terms of
# held out images, for a few of the thousand $t$; the first is $L_0$. (`training.validate()` estimates the sum without
# bias, by random $t$.)

# %%
term = jax.jit(vlb_term, static_argnames="process")
held_out = to_float(jnp.asarray(training.examples["image"][:8]))
noise, found = jax.random.normal(key, held_out.shape), []
places = np.unique(np.geomspace(1, 1000, 24).astype(int)) - 1
for place in places:
    i = jnp.full(8, place)
    x_t = process.q_sample(held_out, i, noise)
    found.append(float(term(f(x_t, place), held_out, x_t, i, process=process).mean()))
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.loglog(places + 1, found, ".-")
axes.set(xlabel="t", ylabel="bits a dimension, one step")
plt.show()
every = np.exp(np.interp(np.log(np.arange(1, 1001)), np.log(places + 1), np.log(np.maximum(found, 1e-9))))
print(f"all thousand, read off the curve: {every.sum():.2f} bits a dimension; the first ten: {every[:10].sum():.2f}")

# %% [markdown]
# A few steps at small $t$ cost most of the bits: they say the last, invisible part of each pixel's value. This is what
# $L_{simple}$ gives up on, and why likelihood and looks are two different aims.
#
# ## With a caption, and guided
#
# Up to here nobody was asked what to draw. With a condition $c$, a class or a caption, the network is
# $\epsilon_\theta(x_t, t, c)$. The stage `ddpm_captions` is that: an encoder of captions is trained with the U-Net,
# which looks at its output by attention. In a tenth of the training examples the caption is withheld, so that the same
# network also knows $\epsilon_\theta(x_t, t, \varnothing)$. Then sampling can go further in the direction in which the
# caption leads, with a scale $s$ (classifier-free guidance; Ho and Salimans, 2021):
#
# $$\tilde\epsilon = \epsilon_\theta(x_t, t, \varnothing)
#   + s\, \bigl(\epsilon_\theta(x_t, t, c) - \epsilon_\theta(x_t, t, \varnothing)\bigr).$$
#
# At $s = 0$ nothing is asked for, and $s = 1$ is the conditional model itself. What more does can be seen where both
# $\epsilon$ are known. Let there be two classes of numbers, $\mathcal N(-0.5, 0.3^2)$ and $\mathcal N(0.5, 0.3^2)$,
# which overlap, and ask for the second one.


# %%
def both(x, t):
    """The best guess of epsilon given the class, and without it."""
    abar = process.alphas_cumprod[t]
    variance = abar * 0.3**2 + 1 - abar
    off = [x - np.sqrt(abar) * mean for mean in (-0.5, 0.5)]
    second = 1 / (1 + np.exp((off[1] ** 2 - off[0] ** 2) / (2 * variance)))  # the probability of the second class
    guesses = [np.sqrt(1 - abar) * one / variance for one in off]
    return guesses[1], (1 - second) * guesses[0] + second * guesses[1]


def guided(scale):
    def f(x, t):
        with_class, without = both(x, t)
        return without + scale * (with_class - without)

    return f


# The library's, of a denoiser that sees the class where `keep` is true.
line, t = np.linspace(-2, 2, 9)[:, None], 300
keep, withheld = jnp.ones((9, 1), bool), jnp.zeros((9, 1), bool)
guesses = [jnp.tile(jnp.float32(guess), (2, 1)) for guess in both(line, t)]
library = classifier_free_guidance(lambda x, t, keep: jnp.where(keep, *guesses), keep, withheld, 3.0)
np.testing.assert_allclose(library(jnp.float32(line), jnp.full(9, t)), guided(3.0)(line, t), atol=1e-5)

many, chain = np.random.default_rng(0).standard_normal(20_000), process.unclamped().respaced("100")
figure, axes = plt.subplots(figsize=(6, 2.6))
for scale in (0, 1, 2, 4):
    drawn = few_steps(guided(scale), many, chain)
    axes.hist(drawn, bins=120, range=(-1.6, 1.6), density=True, histtype="step", label=f"s = {scale}")
    print(f"s = {scale}: mean {drawn.mean():5.2f}, deviation {drawn.std():.2f}, below zero {(drawn < 0).mean():.1%}")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# A larger scale keeps away from what might as well be of the other class, and pays with variety: the samples are too
# far out, and too much alike. For images that is: closer to the caption, plainer, with colours that are too strong.
# **08** shows it on DALL-E 2's decoder. To train the stage with captions, and to ask it:
#
# ```
# python -m train configs/lineage.py ddpm_captions
# dalle2 generate runs/lineage/ddpm_captions "a small purple cross on a white background" --count 4 --grid
# ```
#
# ## What went wrong, and what comes next
#
# Training was quiet, and the samples are varied: all colours, backgrounds and sizes are there, though after so short a
# training few clean shapes. The price is time: each image takes dozens of passes through the network, or a thousand,
# where a GAN and a VAE take one, and each pass is over all pixels, four times as many of them for twice the side. And
# what a caption means has to be learned from scratch, from the captions of these images alone.
#
# DALL-E 2 answers both. It makes a small image first and lets two more diffusion models enlarge it (**08**), and it
# takes what language means from a model that was trained for that on its own (**06**). That model, and most of what
# follows, is a network for sequences: **04**, the Transformer.
