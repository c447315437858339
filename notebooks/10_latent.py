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
# # 10 Manipulating the latent
#
# A decoder and a CLIP make a latent of two parts of any image $x$:
#
# - $z_i$, what CLIP sees in it;
# - $x_T$, the noise from which DDIM, conditioned on $z_i$, samples it again. It holds all the rest.
#
# Section 3 of the paper varies, mixes and edits images by them. These are its figures on your own run: `make demo`
# leaves one in `runs/demo`, and `DALLE2_RUN` names another. No caption is at work below but where one is named.

# %%
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from dalle2_jax import DALLE2
from dalle2_jax.data import evaluation_examples
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.manipulate import (
    default_steps,
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
    slerp,
    vary,
)
from dalle2_jax.unclip import generate_best

RUN = os.environ.get("DALLE2_RUN") or next(str(path) for path in (Path("runs/demo"), Path("../runs/demo")) if path.is_dir())
model = DALLE2.load(RUN)
# The paper takes 250 steps of DDIM; 100 are enough to look at.
STEPS = os.environ.get("DALLE2_STEPS") or default_steps(model, 4 if os.environ.get("DALLE2_QUICK") else 100)
data = model.recorded("data")
examples = evaluation_examples(data, data.test_split, 4)
images, captions, key = list(examples.images), examples.captions, jax.random.key(0)

# %% [markdown]
# ## There and back
#
# A step of DDIM (**03**) from noise level $t$ to $t-1$ takes the image that the network sees in $x_t$ and puts a little
# less of the network's noise on it:
#
# $$x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\hat x_0 + \sqrt{1-\bar\alpha_{t-1}-\sigma_t^2}\;\hat\epsilon + \sigma_t\,\epsilon,
# \qquad \sigma_t = \eta\sqrt{\tfrac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}}\sqrt{1-\tfrac{\bar\alpha_t}{\bar\alpha_{t-1}}} .$$
#
# At $\eta = 0$ nothing in it is drawn, so it can be taken the other way: from an image, step by step, to the $x_T$ it
# would have come from. That is $x_T$ of an image. It is exact but for the size of the steps; what the upsampler adds is
# its own.

# %%
latent = encode(model, images, steps=STEPS)
caption_grid([np.stack(images), reconstruct(model, key, latent).images], captions, labels=("given", "reconstructed"))

# %% [markdown]
# ## Variations (Fig. 3)
#
# With $\eta > 0$ new noise comes in on the way, and $x_T$ is forgotten by and by. From the inverted $x_T$ with
# $\eta = 0.5$, images share content:

# %%
vary(model, key, latent[:2], 4, share="content").sheet()

# %% [markdown]
# From fresh noise they share what $z_i$ holds alone:

# %%
vary(model, key, latent[:2], 4, share="semantics").sheet()

# %% [markdown]
# So one sees what CLIP keeps of an image and what it lets go.
#
# ## Interpolations (Fig. 4)
#
# Between two images one goes along great circles of both parts. For vectors at an angle $\Omega$,
#
# $$\mathrm{slerp}(a, b; \theta) = \frac{\sin((1-\theta)\Omega)}{\sin\Omega}\,a + \frac{\sin(\theta\Omega)}{\sin\Omega}\,b,
# \qquad \theta \in [0, 1].$$
#
# Why not a straight line? Embeddings have length 1, and noise of $n$ dimensions has length about $\sqrt n$. The middle
# of a straight line is shorter, and the network has never been shown such noise.

# %%
a, b = jax.random.normal(key, (2, 768))
thetas = np.linspace(0, 1, 21)
figure, axes = plt.subplots(figsize=(5, 2.4))
axes.plot(thetas, [np.linalg.norm((1 - theta) * a + theta * b) for theta in thetas], label="straight line")
axes.plot(thetas, [np.linalg.norm(slerp(a, b, theta)) for theta in thetas], label="slerp")
axes.set(xlabel=r"$\theta$", ylabel="length", ylim=(0, 32))
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The ends are the reconstructions:

# %%
interpolate(model, key, latent[:2], 7).sheet()

# %% [markdown]
# With one fixed noise instead of the inverted ones, the ends only share meaning with the images. What changes from left
# to right is $z_i$ alone:

# %%
interpolate(model, key, embed(model, images[:2], steps=STEPS), 7, noise="fixed").sheet()

# %% [markdown]
# And among four images, which stand in the corners:

# %%
interpolate_grid(model, key, latent, 4, 4).sheet()

# %% [markdown]
# ## Text diffs (Fig. 5)
#
# Captions live in the same space. So the difference of two captions is a direction, in which an image can be turned:
#
# $$z_d = \frac{z_t - z_{t_0}}{\lVert z_t - z_{t_0} \rVert}, \qquad z_\theta = \mathrm{slerp}(z_i, z_d; \theta),$$
#
# where $t_0$ says what the image is now and $t$ what it is to become. $x_T$ stays. The paper takes $\theta$ up to 0.25
# or 0.5. Here from what the first caption says to what the second one says; write your own.

# %%
edit(model, key, latent[:1], captions[1], captions[0]).sheet()

# %% [markdown]
# ## How many dimensions does an image need? (Fig. 7)
#
# The embedding from its first principal components alone, $z_i \approx \mu + \sum_{k \le K} u_k u_k^\top (z_i - \mu)$,
# decoded from one noise:

# %%
probe(model, key, images[:2], pca_of_run(model, 500), steps=STEPS).sheet()

# %% [markdown]
# With few components only the coarsest of what CLIP sees is there; what is told apart more finely comes later.
#
# ## Painting in, and painting on
#
# A mask is white (True) where to paint. Everything else comes out byte for byte. This decoder was not trained for it.
# It works by RePaint: at every step the known part is replaced by the given image with as much noise as is due, and
# steps are taken back and forth so that both parts agree.

# %%
mask = np.zeros(images[0].shape[:2], bool)
mask[:, mask.shape[1] // 2 :] = True
inpaint(model, key, [images[0]], [mask], [captions[1]]).sheet()

# %%
outpaint(model, key, [images[0]], [captions[0]], factor=1.5).sheet()

# %% [markdown]
# ## The best of several
#
# Whatever was drawn, CLIP can compare it with its caption.

# %%
best, cosines = generate_best(model, key, captions[0], candidates=8, keep=4)
caption_grid(best.images, [f"cosine {cosine:.3f}" for cosine in cosines])

# %% [markdown]
# ## What went wrong, and what comes next
#
# Everything here moves in CLIP's space, so it can do what CLIP can tell apart and no more (**09**). A text diff changes
# more than was asked where two things go together in the captions. Nothing could be said about *where* a thing is to
# be: that lies in $x_T$, of which nobody can read a number. And an inverted $x_T$ is not quite noise, so that an edit
# far from the image may come apart. Painting with a mask is what people use most, and for that a decoder is better
# trained to see what is known (the fields `inpainting` of the decoder and the upsampler).
#
# All of it was done on images of coloured shapes. **11** loads networks that others trained on hundreds of millions of
# photographs: the same functions take them.
