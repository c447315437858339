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
# # 08 The decoder and the upsamplers
#
# The prior of **07** ends with an embedding $z_i$. The **decoder** paints it: $P(x|z_i, y)$, a diffusion model of small
# images that reads $z_i$, and the caption $y$ beside it. **Upsamplers** then make the image larger. In the paper they
# go from 64 to 256 to 1,024 pixels; here it is one, from 16 to 64.
#
# Both are trained below, on a CLIP that is trained first. That takes some minutes on two cores.

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from configs import shapes
from dalle2_jax.clip import encode_captions
from dalle2_jax.data import evaluation_examples
from dalle2_jax.decoder import Decoder, caption_for, gaussian_blur, sample_decoder, sample_upsampler
from dalle2_jax.diffusion import classifier_free_guidance
from dalle2_jax.evaluation.metrics.psnr import psnr
from dalle2_jax.evaluation.oracle import score
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import resize, to_float, to_uint8
from train.interactive import show, start

system, key = shapes.system(), jax.random.key(0)
for name, steps in {"clip": 400, "decoder": 1500, "upsampler": 240}.items():
    system = system.with_stage(name, dataclasses.replace(system.stages[name], steps=steps))

clip = start(system, "clip")
for now in clip.steps(every=50):
    show(now)

# %% [markdown]
# ## The decoder
#
# It is the U-Net of **03** with two more inputs. It is GLIDE, a text-to-image model that came before, and what is new
# is how $z_i$ enters, in two ways:
#
# - projected, and added to the embedding of the timestep;
# - projected to four more tokens, which stand beside the caption's for the attention layers to look at.
#
# The loss is that of any diffusion model, under both conditions:
#
# $$L = \mathbb E_{t, x_t}\;\lVert f_\theta(x_t, t, z_i, y) - x \rVert^2$$
#
# (The paper's network says $\epsilon$. This small one says $x$, with weights on the timesteps that keep it from
# spending itself where there is nearly no noise; on images as flat as ours that learns faster.)
#
# In training each condition is withheld now and then: $z_i$ in 10% of the examples, and the caption in 50% (here 30%).
# So one network learns all four: with both, with either, with neither. Where $z_i$ is withheld, a learned vector stands
# in its place:

# %%
print(inspect.getsource(Decoder._image))

# %% [markdown]
# That is what guidance needs. At every step the network is asked twice, with the conditions $c = (z_i, y)$ and without,
# and one goes on along the difference:
#
# $$\hat f = f(x_t, \varnothing) + s\,\bigl(f(x_t, c) - f(x_t, \varnothing)\bigr).$$
#
# With a "network" that simply says its condition, 3, or 1 where there is none:

# %%
for scale in (0.0, 1.25, 2.0, 4.0):
    guided = classifier_free_guidance(
        lambda x_t, t, condition: condition, jnp.full((1, 1), 3.0), jnp.full((1, 1), 1.0), scale
    )
    print(f"s = {scale:4}: {float(guided(jnp.zeros((1, 1)), jnp.zeros(1))[0, 0])}")

# %% [markdown]
# Left the loss; right what it paints of the embeddings of held-out images.

# %%
decoder = start(system, "decoder", {"clip": clip.loaded()})
for now in decoder.steps(every=250):
    show(now)

# %% [markdown]
# ## What $z_i$ says, and what the caption says
#
# Eight held-out images. Below each, from the same noise: both conditions; $z_i$ alone; another image's $z_i$, alone;
# and none of the two, by a guidance scale of 0.

# %%
examples = evaluation_examples(clip.feed.system.data, "test", 32)


@jax.jit
def embed(images, tokens, mask):
    pixels = resize(to_float(images), clip.module.vision.image_size)
    z_i = clip.module.apply({"params": clip.params}, pixels, method="encode_image")
    return z_i, encode_captions(clip.module, clip.params, tokens, mask)


recipe = decoder.task.recipe


@jax.jit
def paint(key, params, z_i, captions, keep_caption, scale):
    """Images uint8 [b, 16, 16, 3]; keep_caption: bool [b]."""
    caption = caption_for(recipe.module, captions, keep_caption)
    sampling = dataclasses.replace(recipe.sampling, guidance_scale=scale)
    return to_uint8(sample_decoder(key, recipe.module, params, recipe.process, sampling, z_i, caption))


z_i, captions = embed(examples.images[:8], *map(jnp.asarray, clip.feed.tokenizer.encode(examples.captions[:8])))
kept, scale = jnp.ones(8, bool), recipe.sampling.guidance_scale
own = functools.partial(paint, key, decoder.params)
rows = {
    "real": examples.images[:8],
    "both": own(z_i, captions, kept, scale),
    "z_i": own(z_i, captions, ~kept, scale),
    "another's z_i": own(jnp.roll(z_i, 1, axis=0), captions, ~kept, scale),
    "nothing": own(z_i, captions, kept, 0.0),
}
caption_grid([np.asarray(row) for row in rows.values()], examples.captions[:8], labels=list(rows))

# %% [markdown]
# $z_i$ alone is nearly enough: the decoder was given no word, and paints what CLIP saw. Given another's, it paints the
# other image. With nothing it paints any of the shapes, or something between them.
#
# How much do they vary? In each row below one embedding is painted from eight noises; the first column is the image
# that was embedded.

# %%
def variations(row):
    same = jnp.broadcast_to(z_i[row][None], z_i.shape)
    return np.asarray(paint(jax.random.key(row), decoder.params, same, captions, ~kept, scale))


chosen = range(4)
drawn = [variations(row) for row in chosen]
first_column = [resize(to_float(jnp.asarray(examples.images[row][None])), 16) for row in chosen]
sheet = [
    np.concatenate([np.asarray(to_uint8(real)), images[:7]]) for real, images in zip(first_column, drawn, strict=True)
]
caption_grid(sheet, ["embedded", *[f"noise {number}" for number in range(1, 8)]], labels=examples.captions[:4])

# %% [markdown]
# What stays from image to image is what $z_i$ holds. An oracle, which reads images without any network, says how often
# each attribute of the embedded image comes back:

# %%
score(np.concatenate(drawn), [examples.scenes[row] for row in chosen for _ in range(8)])

# %% [markdown]
# Colour, background and size come back. The shape does in a third of the images: so much of drawing the decoder has
# learned in 1,500 steps (the demo's takes 5,000, and gets nearly all right). *Where* the shape stands changes from
# noise to noise: CLIP was trained on images that were moved about, and captions do not name places. What captions never
# name, the embedding need not keep. That is the point of it: $z_i$ is what an image *means*, and the noise is how it
# looks.
#
# ## Guidance
#
# A larger scale leans further towards the conditions:

# %%
scales = (0.0, 1.25, 3.0, 8.0)
guided = [np.asarray(own(z_i, captions, kept, s)) for s in scales]
caption_grid(guided, examples.captions[:8], labels=[f"s = {s:g}" for s in scales])

# %% [markdown]
# At 0 the images have nothing to do with the captions. At 1.25 they do, and at 3 edges are a little clearer. At 8 all is
# overdone: shapes are torn, and plain backgrounds have a pattern.
#
# ## The upsampler
#
# Another diffusion model, whose condition is the small image, enlarged and laid beside $x_t$ as three more channels.
# The paper's reads no caption and has no attention: convolutions only. So it can be trained on crops (here half of the
# side) and run on whole images.
#
# One trick makes it robust. What it will get is not a real small image but the decoder's, with flaws. So its input is
# made worse in training: blurred with a 3 x 3 Gaussian of $\sigma = 0.6$.

# %%
real = resize(to_float(jnp.asarray(examples.images[:8])), 16)
worse = gaussian_blur(real, sigma=0.6)
caption_grid([np.asarray(to_uint8(real)), np.asarray(to_uint8(worse))], [""] * 8, labels=("16 px", "blurred"))

# %%
upsampler = start(system, "upsampler")
for now in upsampler.steps(every=60):
    show(now, preview=False)

# %% [markdown]
# Against bicubic interpolation, in dB of PSNR to the real images of 64 px, where the small image is clean and where it
# is blurred:

# %%
of_upsampler = upsampler.task.recipe


@jax.jit
def enlarge(key, params, small):
    settings = of_upsampler.process, of_upsampler.sampling.turned()
    return to_uint8(sample_upsampler(key, of_upsampler.module, params, *settings, small, of_upsampler.size))


@jax.jit
def bicubic(small):
    return to_uint8(resize(small, of_upsampler.size, "cubic"))


def compared(spoil):
    """PSNR of bicubic interpolation and of the upsampler, over all the examples."""
    found = [[], []]
    for start_row in range(0, len(examples.images), 8):
        small = spoil(resize(to_float(jnp.asarray(examples.images[start_row : start_row + 8])), 16))
        found[0].append(bicubic(small))
        found[1].append(enlarge(key, upsampler.params, small))
    return [psnr(np.concatenate(images), examples.images) for images in found]


for name, spoil in (("clean", lambda small: small), ("blurred", lambda small: gaussian_blur(small, 0.6))):
    theirs, ours = compared(spoil)
    print(f"{name:8s} bicubic {theirs:5.2f} dB   upsampler {ours:5.2f} dB   gain {ours - theirs:+.2f} dB")

# %% [markdown]
# It knows that edges here are sharp, which bicubic interpolation cannot know. On the decoder's own images:

# %%
small = to_float(rows["both"])
caption_grid(
    [np.asarray(rows["both"]), np.asarray(bicubic(small)), np.asarray(enlarge(key, upsampler.params, small))],
    examples.captions[:8],
    labels=("decoder", "bicubic", "upsampler"),
)

# %% [markdown]
# ## What went wrong, and what comes next
#
# Some shapes are wrong: the decoder was trained for two minutes, and at 16 pixels a small circle and a small cross are
# a few pixels apart. The upsampler makes a sharp edge of whatever it is given; it adds no meaning and mends no shape.
# And all images here had *true* embeddings. The prior's are a little off, and errors of a stage are the next one's
# input.
#
# **09** takes the whole cascade, trained for longer, apart: what each stage contributes, and where all of it fails.
