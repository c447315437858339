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
# # What each stage of a run contributes
#
# `make demo` leaves a trained cascade in `runs/demo`: CLIP, a prior, a decoder and an upsampler. This notebook loads a
# run and looks at what each of them does with a caption. Another run is looked at by its folder.

# %%
import os
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import DALLE2
from dalle2_jax.data import evaluation_examples
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.layers.pixels import to_uint8

RUN = os.environ.get("DALLE2_RUN") or next(str(path) for path in (Path("runs/demo"), Path("../runs/demo")) if path.is_dir())
model = DALLE2.load(RUN)
data = model.recorded("data")
print(f"{RUN}: {data.name}, {model.image_size} px")

# %% [markdown]
# ## From captions to images
#
# The captions here are the first of the run's own test split; write your own. A key makes an image: the same key and
# caption give the same image again, alone or among others.

# %%
examples = evaluation_examples(data, data.test_split, 6)
captions = examples.captions
key = jax.random.key(0)
drawn = model.generate(key, captions, return_stages=True)
caption_grid([examples.images, drawn.decoded, drawn.images], captions, labels=("real", "decoder", "final"))

# %% [markdown]
# ## The caption, and its neighbours
#
# CLIP puts captions and images into one space. These are the cosines of each caption's embedding with the embeddings of
# the real images above: the largest of a row should stand on the diagonal.

# %%
text = np.asarray(drawn.text_embeddings)
real = np.asarray(model.encode_image(examples.images))
print(np.round(text @ real.T, 2))
for row, caption in zip(text @ real.T, captions, strict=True):
    print(f"{caption!r} is nearest to the image of {captions[int(row.argmax())]!r}")

# %% [markdown]
# ## The prior
#
# From a caption the prior draws the embedding of an image. It should lie nearer to the true image's embedding than the
# caption's own does, and different keys should give different ones.

# %%
again = np.asarray(model.sample_prior(jax.random.key(1), captions))
first = drawn.image_embeddings
print("caption to true image      ", np.round((text * real).sum(-1), 2))
print("prior's to true image      ", np.round((first * real).sum(-1), 2))
print("two draws for one caption    ", np.round((first * again).sum(-1), 2))

# %% [markdown]
# ## The embedding alone, and the caption alone
#
# The decoder reads both. Without the caption only the embedding speaks; with another image's embedding the two disagree.

# %%
alone = model.generate(key, captions, image_embeddings=first, caption_to_decoder=False)
other = model.generate(key, captions, image_embeddings=np.roll(first, 1, axis=0))
caption_grid([drawn.images, alone, other], captions, labels=("both", "embedding", "another's"))

# %% [markdown]
# ## Guidance
#
# A larger scale leans further towards the conditions, at the cost of variety. Scale 0 leaves them out altogether.

# %%
scales = (0.0, 1.0, 2.0, 4.0)
guided = [model.generate(key, captions, image_embeddings=first, guidance_scale=scale) for scale in scales]
caption_grid(guided, captions, labels=[f"scale {scale:g}" for scale in scales])

# %% [markdown]
# ## Samplers and steps
#
# Deterministic samplers follow the same path with larger or smaller steps. DPM-Solver++ needs fewest.

# %%
settings = [("ddim", "4"), ("dpmpp_2m", "4"), ("ddim", "20"), ("dpmpp_2m", "20"), ("ddpm", "20")]
sampled = [
    model.generate(key, captions, image_embeddings=first, decoder={"sampler": sampler, "steps": steps})
    for sampler, steps in settings
]
caption_grid(sampled, captions, labels=[f"{sampler} {steps}" for sampler, steps in settings])

# %% [markdown]
# ## There and back
#
# `invert` finds the noise from which DDIM draws a given image again: with CLIP's embedding, it is the image (Sec. 3 of
# the paper). With fresh noise instead, the embedding keeps what it knows and the rest varies.

# %%
steps = {"steps": "50", "sampler": "ddim", "guidance_scale": 1.0}
embeddings, x_T = model.invert(examples.images, captions, steps="50")
back = to_uint8(model.decode(key, embeddings, captions, x_T=x_T, **steps))
varied = to_uint8(model.decode(key, embeddings, captions, **steps))
caption_grid([examples.images, np.asarray(back), np.asarray(varied)], captions, labels=("real", "there and back", "varied"))
