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
# # 06 CLIP
#
# DALL-E 1 makes many images of a caption and cannot say which of them show it. CLIP (Radford et al., 2021) can do
# nothing but that. It writes no text and paints no image: it has an encoder for images and one for captions, which put
# both into one space, and it is trained on the question which caption of a batch belongs to which image.
#
# With $u_i$ the embedding of image $i$ and $v_j$ that of caption $j$, both of length 1, and a learned inverse
# temperature $s$, each image is classified among all captions and each caption among all images:
#
# $$\mathcal L = -\frac{1}{2N} \sum_{i=1}^{N} \left[ \log \frac{e^{s\,u_i \cdot v_i}}{\sum_j e^{s\,u_i \cdot v_j}}
# + \log \frac{e^{s\,u_i \cdot v_i}}{\sum_j e^{s\,u_j \cdot v_i}} \right] .$$

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from configs import shapes
from dalle2_jax.clip import classify, contrastive_loss, zero_shot_weights
from dalle2_jax.data.dataset import Data
from dalle2_jax.data.sources import scene as scenes
from dalle2_jax.images.resize import shrink
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_float
from train.interactive import show, start

key = jax.random.key(0)

# %% [markdown]
# As code, and the difference from the library's, which also does without the whole matrix where a batch is large.
# Random embeddings tell nothing, and with $s = 1$ the loss is close to $\ln N$, the cost of guessing.


# %%
def clip_loss(images, captions, scale):
    logits = scale * images @ captions.T  # a row an image, a column a caption
    of_images = jnp.diag(jax.nn.log_softmax(logits, axis=1))
    of_captions = jnp.diag(jax.nn.log_softmax(logits, axis=0))
    return -(of_images + of_captions).mean() / 2


u, v = jax.random.normal(key, (2, 64, 24))
u, v = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
print("difference", float(abs(clip_loss(u, v, 14.3) - contrastive_loss(u, v, 14.3)[0])))
print(f"loss {float(clip_loss(u, v, 1.0)):.3f}, ln 64 = {np.log(64):.3f}")

# %% [markdown]
# ## Training
#
# A vision transformer cuts the image into patches, four of 16×16 pixels here, and reads them as tokens; a causal
# transformer reads the caption. The data have one object or two, and captions that say all or a part of it. So a pair
# is told from others by shapes, colours, sizes, the background, and how two objects stand to each other.

# %%
small = shapes.system()
recipe = small.stages["clip"]
text = recipe.module.text.clone(context_length=16)  # two objects take more words than one
recipe = dataclasses.replace(recipe, module=recipe.module.clone(text=text), steps=2000)
system = dataclasses.replace(
    small,
    data=Data(name="captioned_shapes", config="mixed"),
    context_length=16,
    stages={"clip": recipe},
    optional=(),
)
clip = start(system, "clip")
for now in clip.steps(every=200):
    show(now)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4))
for name in ("accuracy_image_to_text", "accuracy_text_to_image"):
    axes[0].plot(*zip(*clip.history[name]), label=name)
axes[0].set(xlabel="step")
axes[0].legend(fontsize=7)
axes[1].plot(*zip(*clip.history["logit_scale"]))
axes[1].set(xlabel="step", title="inverse temperature $s$")
plt.show()

# %% [markdown]
# In training the accuracy cannot reach 1: "a circle" fits many images of a batch, and the loss calls all but one of
# them wrong. Below captions are the full ones.
#
# ## Images and captions in one matrix
#
# Cosines of held-out images (columns) and captions (rows). The largest of a row should stand on the diagonal, and
# others should be the higher the more of the caption they share.

# %%
module, params, BATCH = clip.module, clip.params, 64


@jax.jit
def encode_images(params, images):
    return module.apply({"params": params}, to_float(images), method="encode_image")


@jax.jit
def encode_captions(params, tokens, mask):
    return module.apply({"params": params}, tokens, mask, method="encode_text")[0]


def in_batches(function, *arrays):
    """By batches of one size, so that it is compiled once; the last one is filled up."""
    count = len(arrays[0])
    filled = [np.resize(x, (-(-count // BATCH) * BATCH, *x.shape[1:])) for x in arrays]
    starts = range(0, len(filled[0]), BATCH)
    return np.concatenate([function(params, *(x[begin : begin + BATCH] for x in filled)) for begin in starts])[:count]


def of_images(images):
    return in_batches(encode_images, images)


def of_captions(captions):
    return in_batches(encode_captions, *clip.feed.tokenizer.encode(captions, warn=False))


scale = min(float(np.exp(params["logit_scale"])), module.max_logit_scale)
images, captions = clip.examples["image"], clip.examples["captions"]
loss, metrics = contrastive_loss(jnp.asarray(of_images(images)), jnp.asarray(of_captions(captions)), scale)
print(f"{len(images)} held-out pairs:", {name: round(float(value), 3) for name, value in metrics.items()})

cosines = of_captions(captions[:8]) @ of_images(images[:8]).T
figure, axes = plt.subplots(figsize=(7.5, 4.5))
axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
axes.set_yticks(range(8), captions[:8], fontsize=7)
axes.set_xticks([])
for row, column in np.ndindex(8, 8):
    axes.text(column, row, f"{cosines[row, column]:.2f}", ha="center", va="center", fontsize=7)
for column in range(8):
    above = axes.inset_axes((column / 8 + 0.01, 1.02, 0.105, 0.17))
    above.imshow(images[column])
    above.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A classifier that was never trained as one
#
# To classify an image, write a caption for each class and take the nearest. Several captions a class, averaged, say it
# more surely than one. Here on new images of single objects, also those of the four pairs of shape and colour that CLIP
# has never seen or read of.

# %%
random = np.random.default_rng(0)
singles = [
    scenes.place_one(random, background, *pair, size)
    for pair in (*scenes.SEEN_PAIRS, *scenes.HELD_OUT_PAIRS)
    for size in scenes.SIZES
    for background in scenes.BACKGROUNDS
    for _ in range(3)
]
embeddings = of_images(shrink(np.stack([scenes.draw(one) for one in singles]), 32))
facts = {name: np.array([getattr(one.objects[0], name) for one in singles]) for name in ("shape", "color", "size")}
facts["background"] = np.array([one.background for one in singles])
is_new = np.array([(one.objects[0].shape, one.objects[0].color) in scenes.HELD_OUT_PAIRS for one in singles])

words = {"shape": scenes.SHAPES, "color": tuple(scenes.COLORS), "size": scenes.SIZES}
words["background"] = tuple(scenes.BACKGROUNDS)
templates = {
    "shape": ("a {}", "a small {}", "a large {}"),
    "color": ("something {}", "a {} shape", "a small {} shape", "a large {} shape"),
    "size": ("a {} shape", "a {} circle", "a {} square", "a {} triangle", "a {} cross"),
    "background": ("a {} background", "a small shape on a {} background", "a large shape on a {} background"),
}
weights = {}
for name, classes in words.items():
    written = of_captions([template.format(word) for word in classes for template in templates[name]])
    weights[name] = zero_shot_weights(jnp.asarray(written).reshape(len(classes), len(templates[name]), -1))
    found = np.array(classes)[classify(jnp.asarray(embeddings), weights[name], scale).argmax(axis=1)]
    right = found == facts[name]
    print(f"{name:10}  of {len(classes)}: seen pairs {right[~is_new].mean():.2f}, new pairs {right[is_new].mean():.2f}")

# %% [markdown]
# Colour, size and background are read of pairs that were never seen, too. Their shape is not (a quarter is
# chance): what it has learned of a colour includes the shapes with which it came.
#
# ## The temperature
#
# Cosines lie in -1 to 1, and a softmax of such numbers is nearly flat. The inverse temperature $s$ stretches them.
# Left, the probabilities of the shapes for one image at four of them. Right, the loss of the held-out pairs at any: too
# small and nothing is ever certain, too large and each mistake is. It is learned with the rest, from 1/0.07, and kept
# below 100.

# %%
levels = np.geomspace(1, 300, 40).astype(np.float32)
pairs = jnp.asarray(of_images(images)), jnp.asarray(of_captions(captions))
losses = jax.jit(jax.vmap(lambda level: clip_loss(*pairs, level)))(levels)
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for number, level in enumerate((1.0, 1 / 0.07, scale, 100.0)):
    probabilities = classify(jnp.asarray(embeddings[:1]), weights["shape"], level)[0]
    axes[0].bar(np.arange(4) + 0.2 * number - 0.3, probabilities, 0.2, label=f"s = {level:.1f}")
axes[0].set_xticks(range(4), [f"a {word}" for word in words["shape"]])
axes[0].set(title=scenes.full_caption(singles[0]))
axes[0].legend(fontsize=7)
axes[1].semilogx(levels, losses)
axes[1].axvline(scale, color="C1", label="learned")
axes[1].set(xlabel="s", title="loss of held-out pairs")
axes[1].legend(fontsize=7)
plt.show()

# %% [markdown]
# ## The gap
#
# One would think that an image and its caption meet at one point. They do not: the loss only asks that the own caption
# be nearer than others, and in most CLIPs images and captions lie in two clouds apart (Liang et al., 2022). Here are
# all these images and their full captions on the first two principal components of both, a few pairs joined by a line.

# %%
texts = of_captions([scenes.full_caption(one) for one in singles])
both = np.concatenate([embeddings, texts])
*_, components = np.linalg.svd(both - both.mean(axis=0), full_matrices=False)
flat_images, flat_texts = ((x - both.mean(axis=0)) @ components[:2].T for x in (embeddings, texts))
figure, axes = plt.subplots(figsize=(5, 4))
axes.plot(*flat_images.T, ".", label="images")
axes.plot(*flat_texts.T, ".", label="captions")
for one in range(0, len(singles), 24):
    axes.plot(*np.stack([flat_images[one], flat_texts[one]], axis=1), "k-", linewidth=0.5)
axes.legend()
plt.show()

gap = embeddings.mean(axis=0) - texts.mean(axis=0)
middle = both.mean(axis=0) @ gap
sides = np.concatenate([embeddings @ gap > middle, texts @ gap < middle]).mean()
others = np.roll(np.arange(len(singles)), len(singles) // 2)
print(f"an image and its caption: cosine {(embeddings * texts).sum(axis=1).mean():.2f}")
print(f"an image and another image: {(embeddings * embeddings[others]).sum(axis=1).mean():.2f}")
print(f"a caption and another caption: {(texts * texts[others]).sum(axis=1).mean():.2f}")
print(f"distance of the means: {np.linalg.norm(gap):.2f}; along it {sides:.0%} of all lie on the side of their own kind")

# %% [markdown]
# Where the last number is well above a half, a caption's embedding is not one that an image could have, and a decoder
# of image embeddings has never seen its like. It is one of the reasons for DALL-E 2's prior.
#
# ## What is kept, and what is lost
#
# An embedding has 24 numbers, an image 3,072. What survives is what tells captions apart. With a linear map from the
# embeddings, fitted on one half of the images, how much of a fact's variance in the other half can be read off? The
# first four are in the captions. Where exactly an object lies, and how bright its colour is, no caption ever says.

# %%
order = np.random.default_rng(1).permutation(len(singles))
fitted, tested = np.array_split(order, 2)


def read_off(target):
    """R² on the second half, of a linear map from the embeddings to target [n, k]."""
    inputs = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(inputs[fitted], target[fitted], rcond=None)
    error = ((inputs[tested] @ solution - target[tested]) ** 2).sum()
    return 1 - error / ((target[tested] - target[fitted].mean(axis=0)) ** 2).sum()


targets = {name: facts[name][:, None] == np.array(words[name]) for name in ("shape", "color", "background")}
drawn = [one.objects[0] for one in singles]
targets["extent"] = np.array([[one.extent] for one in drawn])
targets |= {f"centre {axis}": np.array([[one.center[number]] for one in drawn]) for number, axis in enumerate("xy")}
targets["brightness"] = np.array([[one.brightness] for one in drawn])
figure, axes = plt.subplots(figsize=(7, 2.4))
axes.bar(targets.keys(), [max(0.0, read_off(target.astype(np.float64))) for target in targets.values()])
axes.set(ylabel="$R^2$", ylim=(0, 1))
plt.show()

# %% [markdown]
# ## What belongs to what
#
# Two objects, each with a shape and a colour. Is a caption told from one in which a colour occurs that is not there?
# From one with the same words, but the two colours exchanged? From one in which the first object stands on the other
# side? Each time the image chooses between the right caption and the wrong one, so that chance is a half.

# %%
doubles = []
while len(doubles) < 256:
    (shape, color), (other_shape, other_color) = random.choice(scenes.SEEN_PAIRS, 2, replace=False)
    exchanged = {(shape, other_color), (other_shape, color)}
    if shape != other_shape and color != other_color and exchanged <= set(scenes.SEEN_PAIRS):
        kinds = [(shape, color, random.choice(scenes.SIZES)), (other_shape, other_color, random.choice(scenes.SIZES))]
        background, relation = random.choice(list(scenes.BACKGROUNDS)), random.choice(scenes.RELATIONS)
        doubles.append(scenes.place_two(random, background, relation, kinds))


def with_colors(scene, *colors):
    objects = tuple(dataclasses.replace(one, color=color) for one, color in zip(scene.objects, colors))
    return dataclasses.replace(scene, objects=objects)


def with_a_new_color(scene):
    first, second = scene.objects
    known = [color for shape, color in scenes.SEEN_PAIRS if shape == first.shape]
    return with_colors(scene, random.choice([c for c in known if c not in (first.color, second.color)]), second.color)


wrong = {
    "a colour that is not there": [with_a_new_color(scene) for scene in doubles],
    "colours exchanged": [with_colors(scene, *(one.color for one in scene.objects[::-1])) for scene in doubles],
    "the other side": [dataclasses.replace(scene, relation=scenes.INVERSE[scene.relation]) for scene in doubles],
}
shown = shrink(np.stack([scenes.draw(scene) for scene in doubles]), 32)
of_doubles = of_images(shown)


def cosines_with(described):
    return (of_doubles * of_captions([scenes.full_caption(scene) for scene in described])).sum(axis=1)


true = cosines_with(doubles)
figure, axes = plt.subplots(figsize=(7, 2.4))
axes.bar(wrong.keys(), [(true > cosines_with(described)).mean() for described in wrong.values()])
axes.axhline(0.5, color="black", linewidth=0.5)
axes.set(ylabel="right one chosen", ylim=(0, 1))
plt.show()
exchanged = wrong["colours exchanged"]
told = [
    f"{right:.2f} {scenes.full_caption(scene)} / {other:.2f} {scenes.full_caption(changed)}"
    for right, scene, other, changed in zip(true[:6], doubles, cosines_with(exchanged), exchanged)
]
caption_grid(shown[:6], told, columns=6, cell=150)

# %% [markdown]
# A colour that is not there is noticed. Which of two shapes has which of two colours is not known at all, and on which
# side it stands neither: both are at chance, and the two cosines are the same to two places. In a batch there is hardly
# ever a caption with the same words in another order, so the list of what there is wins the game, and the loss asks for
# no more.
#
# ## What went wrong, and what comes next
#
# CLIP knows what an image and a caption have to do with each other, in a few numbers. Those numbers forget where things
# are, and more or less what belongs to what, because no choice among captions hung on it. For picking the best of
# DALL-E 1's images that is good enough. But if an image's meaning is a vector, one can also turn the matter round: make
# up the vector that an image for this caption would have, and paint an image that has it.
#
# That is DALL-E 2: a prior $P(z_i|y)$ that crosses the gap from the caption to an image's embedding, which is **07**,
# and a decoder $P(x|z_i, y)$, which inverts CLIP, **08**. What CLIP does not bind together, they cannot know either:
# **09** comes back to it.
