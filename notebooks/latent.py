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
# # What an image's latent is for
#
# A decoder and a CLIP make a latent of two parts of any image: z_i, what CLIP sees in it, and x_T, the noise from which
# DDIM samples it again. Section 3 of the paper varies, mixes and edits images by them; these are its figures on your own
# run. `make demo` leaves one in `runs/demo`; on two CPU cores all cells take about five minutes.

# %%
import os
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import DALLE2
from dalle2_jax.data import evaluation_examples
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.manipulate import (
    edit,
    embed,
    encode,
    inpaint,
    interpolate,
    interpolate_grid,
    outpaint,
    pca_of_run,
    probe,
    reconstruct,
    vary,
)
from dalle2_jax.unclip import generate_best

RUN = os.environ.get("DALLE2_RUN") or next(str(path) for path in (Path("runs/demo"), Path("../runs/demo")) if path.is_dir())
STEPS = os.environ.get("DALLE2_STEPS")  # None: 250 steps of DDIM, as in the paper
model = DALLE2.load(RUN)
data = model.recorded("data")
examples = evaluation_examples(data, data.test_split, 4)
images, captions, key = list(examples.images), examples.captions, jax.random.key(0)

# %% [markdown]
# ## There and back
#
# The decoder's DDIM is run backwards, conditioned on z_i, and forwards again. It is exact but for the size of its steps;
# what the upsampler adds is its own.

# %%
latent = encode(model, images, steps=STEPS)
caption_grid([np.stack(images), reconstruct(model, key, latent).images], captions, labels=("given", "reconstructed"))

# %% [markdown]
# ## Variations (Fig. 3)
#
# From the inverted x_T with noise on the way, images share content; from fresh noise they share what z_i holds alone.

# %%
vary(model, key, latent[:2], 4, share="content").sheet()

# %%
vary(model, key, latent[:2], 4, share="semantics").sheet()

# %% [markdown]
# ## Interpolations (Fig. 4)
#
# Along great circles of both parts: the ends are the reconstructions. With one fixed noise instead of the inverted ones,
# the ends only share meaning with the images.

# %%
interpolate(model, key, latent[:2], 7).sheet()

# %%
interpolate(model, key, embed(model, images[:2], steps=STEPS), 7, noise="fixed").sheet()

# %%
interpolate_grid(model, key, latent, 4, 4).sheet()

# %% [markdown]
# ## Text diffs (Fig. 5)
#
# The difference of two captions' embeddings is a direction in which z_i is turned, while x_T stays. Write your own.

# %%
edit(model, key, latent[:1], captions[1], captions[0]).sheet()

# %% [markdown]
# ## How many dimensions does an image need? (Fig. 7)
#
# Its embedding from the first principal components alone, decoded from one noise.

# %%
probe(model, key, images[:2], pca_of_run(model, 500)).sheet()

# %% [markdown]
# ## Painting in, and painting on
#
# A mask is white (True) where to paint. Everything else comes out byte for byte.

# %%
mask = np.zeros(images[0].shape[:2], bool)
mask[:, mask.shape[1] // 2 :] = True
inpaint(model, key, [images[0]], [mask], [captions[1]]).sheet()

# %%
outpaint(model, key, [images[0]], [captions[0]], factor=1.5).sheet()

# %% [markdown]
# ## The best of several
#
# CLIP compares finished images with their caption.

# %%
best, cosines = generate_best(model, key, captions[0], candidates=8, keep=4)
caption_grid(best.images, [f"cosine {cosine:.3f}" for cosine in cosines])
