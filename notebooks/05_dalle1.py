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
# # 05 DALL-E 1
#
# A Transformer writes sequences, and DALL-E (Ramesh et al., 2021) has it write images. Two things stand in the way: an
# image has too many values, and most of them are detail that no caption speaks of. So there are two stages. A discrete
# VAE learns to say an image $x$ as a small grid of codes $z$, each out of a codebook, and to draw it from them. Then a
# transformer learns how captions $y$ and codes go together. Both raise the same lower bound:
#
# $$\ln p_{\theta,\psi}(x, y) \;\ge\; \mathbb E_{z \sim q_\phi(z|x)} \Bigl[ \ln p_\theta(x|y, z)
# - \beta\, D_{KL}\bigl(q_\phi(y, z|x)\,\Vert\,p_\psi(y, z)\bigr) \Bigr] .$$
#
# First $\phi$ and $\theta$, the dVAE's encoder and decoder, under a prior $p_\psi$ for which all codes are equally
# probable; then $\psi$, the transformer, with the dVAE as it is.

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import inspect
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from configs import lineage
from dalle2_jax.data.sources.scene import parse_caption
from dalle2_jax.evaluation.oracle import judge_all, score
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_float, to_uint8
from dalle2_jax.lineage.dalle1 import dalle1_loss
from dalle2_jax.lineage.dalle1_masks import KINDS, attention_mask, layer_kinds
from dalle2_jax.lineage.dalle1_sampling import sample_dalle1
from dalle2_jax.lineage.dvae import gumbel_softmax, sample_codes
from train.interactive import show, start

system, key = lineage.system(), jax.random.key(0)

# %% [markdown]
# ## A choice with a gradient
#
# At each place of the grid the encoder gives logits $l_k$ over the codes. To pick one of them is a choice, and a choice
# has no gradient. With noise $g_k = -\log(-\log u_k)$, $u_k$ uniform, the largest $l_k + g_k$ is a sample of the
# softmax of the logits; and the Gumbel-softmax takes the softmax in place of the largest,
#
# $$\tilde z_k = \frac{\exp\bigl((l_k + g_k)/\tau\bigr)}{\sum_j \exp\bigl((l_j + g_j)/\tau\bigr)} .$$

# %%
print(inspect.getsource(gumbel_softmax))

# %% [markdown]
# Here are 12 samples (rows) over 8 codes (columns) with the same noise at four temperatures $\tau$. A high one gives
# every code a share: the gradient is good, and the decoder learns from mixtures that it will never see in use. At a low
# one nearly all is one code. In training it falls, from 1 to 1/16.

# %%
probabilities = jnp.array([0.35, 0.25, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02])
logits = jnp.broadcast_to(jnp.log(probabilities), (12, 1, 1, 8))
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
for place, temperature in zip(axes, (4.0, 1.0, 1 / 4, 1 / 16)):
    place.imshow(gumbel_softmax(key, logits, temperature)[:, 0, 0], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    place.set_title(f"temperature {temperature:g}", fontsize=9)
plt.show()
many = sample_codes(key, jnp.broadcast_to(logits[:1], (4096, 1, 1, 8)))
print("probabilities  ", np.round(probabilities, 3))
print("of 4096 samples", np.round(np.bincount(many.ravel(), minlength=8) / 4096, 3))

# %% [markdown]
# ## The discrete VAE
#
# Images of 32×32 pixels, a grid of 8×8, 128 codes: 3,072 bytes become 64 times 7 bits, which are 56 bytes. (In the
# paper, 256×256 pixels, 32×32 places and 8,192 codes.) In the paper the weight of the KL divergence rises from 0 to 6.6.
# In a training as short as this one all places then agree on a few codes before there is anything to tell apart, and
# the other codes are never found. So here the weight begins high, which keeps the choice open, and falls together with
# the temperature. Right, held-out images as they come back through their codes.

# %%
recipe = system.stages["dvae"]
recipe = dataclasses.replace(
    recipe,
    steps=700,
    temperature=dataclasses.replace(recipe.temperature, steps=630),
    kl_weight=dataclasses.replace(recipe.kl_weight, steps=630),
)
dvae = start(system.with_stage("dvae", recipe), "dvae")
for now in dvae.steps(every=100):
    show(now)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4))
for place, name in zip(axes, ("temperature", "kl", "perplexity")):
    place.plot(*zip(*dvae.history[name]))
    place.set(xlabel="step", title=name)
figure.tight_layout()
plt.show()
{name: round(value, 3) for name, value in dvae.validate().items()}

# %% [markdown]
# `perplexity` is as how many equally frequent codes the codebook is used; `usage` is the share of it that occurs at
# all. `negative_elbo` is with hard codes and `relaxed_negative_elbo` with those of the temperature at the end. They
# should have come close, and have: what lies between them is what the decoder was taught and does not meet in use.
#
# ## An image in codes
#
# Held-out images, their codes (each code has a colour of its own, which means nothing), and what the decoder makes of
# these codes alone.

# %%
module, examples = dvae.module, dvae.examples
COUNT = len(examples["image"])


@jax.jit
def encode(params, images):
    return module.apply({"params": params}, to_float(images), method="encode")


@jax.jit
def decode(params, codes):
    return to_uint8(module.apply({"params": params}, codes, method="decode_codes"))


codes = encode(dvae.params, examples["image"])
rebuilt = np.asarray(decode(dvae.params, codes))
palette = np.random.default_rng(0).integers(30, 255, (module.codebook_size, 3)).astype(np.uint8)
rows = [examples["image"][:8], palette[np.asarray(codes[:8])], rebuilt[:8]]
caption_grid(rows, examples["captions"][:8], labels=("image", "codes", "decoded"))

# %% [markdown]
# What does a code stand for? Each of these images is one code in all 64 places, the most frequent first.

# %%
frequent = np.argsort(-np.bincount(np.asarray(codes).ravel(), minlength=module.codebook_size))[:COUNT]
alone = np.broadcast_to(frequent[:, None, None], codes.shape).astype(np.int32)
caption_grid(np.asarray(decode(dvae.params, alone))[:8], [f"code {code}" for code in frequent[:8]])

# %% [markdown]
# ## One sequence of text and image
#
# The transformer reads a start token, the caption, and the codes row after row, and predicts each from those before it.
# Padding has a learned vector for each position, so that no token of the text need be hidden. All of the text is seen
# from everywhere; of the image a layer sees a part:

# %%
texts, grid = 1 + system.context_length, lineage.GRID
print(layer_kinds(4))
figure, axes = plt.subplots(2, 3, figsize=(9, 6))
for (above, below), kind in zip(axes.T, KINDS):
    mask = attention_mask(kind, texts, grid, window=5)
    above.imshow(mask, cmap="Greys")
    above.set(title=kind, xlabel="key", ylabel="query")
    row, column = 5, 3
    below.imshow(mask[texts + row * grid + column, texts:].reshape(grid, grid), cmap="Greys")
    below.plot(column, row, "o")
    below.set(title=f"seen from ({row}, {column})")
figure.tight_layout()
plt.show()

# %% [markdown]
# Above, whole masks: the dark band at the left is the text. Below, what of the grid one code sees. "Row" is the eight
# codes before it and itself, across the end of a row, and so back to the code straight above. "Column" is the codes
# above. "Convolution", in the last layer alone, is a window around the code, as far as it came before.
#
# The loss is the cross-entropy of the next token, with the text's and the image's apart, each a mean over its kind:
#
# $$\mathcal L = \tfrac18\,\mathcal L_{text} + \tfrac78\,\mathcal L_{image} .$$
#
# It is the image that one wants. The text is there to be read; that the network could also write captions is a
# by-product.

# %%
print(inspect.getsource(dalle1_loss))

# %% [markdown]
# Left the cross-entropy of a code, where guessing would cost $\ln 128 = 4.85$ nats. Right, images that are sampled
# under held-out captions, those of the images above.

# %%
recipe = dataclasses.replace(system.stages["dalle1"], steps=500)
training = start(system.with_stage("dalle1", recipe), "dalle1", {"dvae": dvae.loaded()})
for now in training.steps(every=100):
    show(now, "image_loss")

# %% [markdown]
# The text's is soon at what the grammar leaves open: a caption of these images is a choice of a few words. The image's
# goes on falling.

# %%
figure, axes = plt.subplots(figsize=(5, 2.4))
for name in ("text_loss", "image_loss"):
    axes.plot(*zip(*training.history[name]), label=name)
axes.set(xlabel="step", ylabel="nats a token")
axes.legend()
plt.show()

# %% [markdown]
# ## Sampling
#
# A code is sampled from the softmax, read, and the next one sampled, 64 times, from a cache of keys and values as in
# 04. The same captions give other images with other keys. What they show can be read off by a program that knows how
# these images are made (`dalle2_jax.evaluation.oracle`); `all` is the share of images in which everything that the
# caption says is right.


# %%
@jax.jit
def sample(params, keys, tokens, mask):
    return sample_dalle1(keys, training.module, params, tokens, mask, training.task.recipe.sampling)


def draw(key, tokens, mask):
    return np.asarray(decode(dvae.params, sample(training.params, jax.random.split(key, COUNT), tokens, mask)))


examples = training.examples
stated = [parse_caption(caption) for caption in examples["captions"]]
sampled = [draw(jax.random.key(seed), examples["tokens"], examples["mask"]) for seed in (1, 2)]
for name, images in (("dVAE's reconstructions", rebuilt), ("sampled", np.concatenate(sampled))):
    print(name, {of: round(share, 2) for of, share in score(images, stated * (len(images) // COUNT)).items()})
rows = [examples["image"][:8], rebuilt[:8], *(images[:8] for images in sampled)]
caption_grid(rows, examples["captions"][:8], labels=("image", "dVAE", "sampled", "again"))

# %% [markdown]
# ## Several candidates
#
# A sample can fail and the next one succeed. DALL-E drew 512 for a caption and showed the best. The second caption
# below is one of a pair of shape and colour that no training image has and no caption names: the words are known, their
# combination is not. Under each image stands how the same program judges it.

# %%
candidates, marks = [], []
for caption in ("a large purple cross on a white background", "a large red circle on a white background"):
    tokens, mask = training.feed.tokenizer.encode([caption] * COUNT, warn=False)
    images = draw(key, tokens, mask)
    right = [found["all"] for found in judge_all(images, [parse_caption(caption)] * COUNT)]
    print(f"{caption}: {sum(right)} of {COUNT} are right")
    candidates.extend(images[:8])
    marks.extend("right" if one else "wrong" for one in right[:8])
caption_grid(np.stack(candidates), marks)

# %% [markdown]
# If each candidate is right with probability $p$, one of $N$ is with $1 - (1 - p)^N$. But someone has to say which.
# Colour and background are as the captions say, of the second one too: colour is a matter of which codes are taken, and
# shape of where. But outlines are finer than a code, and the program finds no clean cross and no clean circle among all
# of these.
#
# ## What went wrong, and what comes next
#
# **The dVAE is the ceiling.** The transformer sees codes and never a pixel, so that no image is better than what the
# decoder makes of its codes. Compare the rows "image" and "dVAE" above, edges above all. And the dVAE spends its codes
# by pixels: what matters to a reader of the caption is worth no more to it than any other patch.
#
# **Nothing is taken back.** Each code is read as if it were true. Here the first three of eight rows of a held-out
# image are given and the rest is sampled, four times; then again with the same random numbers, but with one of the
# given codes exchanged for one of another image.

# %%
@jax.jit
def go_on(params, keys, tokens, mask, given):
    return sample_dalle1(keys, training.module, params, tokens, mask, training.task.recipe.sampling, given)


keys = jnp.concatenate([jax.random.split(key, 4)] * 2)
tokens, mask = (np.repeat(examples[name][:1], 8, axis=0) for name in ("tokens", "mask"))
given = jnp.repeat(codes[:1, :3], 8, axis=0)
given = given.at[4:, 1, 3].set(codes[1, 4, 4])  # the second half's
finished = go_on(training.params, keys, tokens, mask, given)
differ = (finished[:4, 3:] != finished[4:, 3:]).mean()
print(f"{float(differ):.0%} of the codes behind them come out otherwise")
shown = np.asarray(decode(dvae.params, jnp.resize(finished, codes.shape)))[:8]
caption_grid([shown[:4], shown[4:]], [examples["captions"][0]] * 4, labels=("as it was", "one code exchanged"))

# %% [markdown]
# The foreign patch stays in every image: nobody goes back to it, and the rest is drawn as if it belonged there. Samples
# have such patches of their own making; see the candidates above.
#
# **It is slow.** Codes are sampled one after the other, and no device can do it otherwise:


# %%
def seconds(function, *arguments):
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun


keys = jax.random.split(key, COUNT)
one_by_one = seconds(sample, training.params, keys, examples["tokens"], examples["mask"])
at_once = seconds(decode, dvae.params, codes)
print(f"{COUNT} images: {one_by_one:.2f} s for 64 codes in turn, {at_once:.2f} s for the dVAE to decode them at once")

# %% [markdown]
# 64 steps here are 1,024 in the paper, times 512 candidates, through 12 billion parameters.
#
# **And it cannot tell a good image.** The transformer gives a probability to a sequence of codes, which is not whether
# the image shows what the caption says. DALL-E left this choice to another network, which was trained for nothing but
# to say how well an image and a caption go together. That network is **06**. DALL-E 2 made it the heart of the matter.
