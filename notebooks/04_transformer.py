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
# # 04 The Transformer
#
# So far it was all about images. The other half of the way to DALL-E is text: a sequence of tokens of any length, in
# which a word can change what another one far away means. The Transformer (Vaswani et al., 2017) reads all tokens at
# once and lets each of them look at every other one. It was made to translate. Here it learns to reverse a sequence,
# which takes about a minute, and where one knows beforehand what has to look where.

# %%
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from configs import lineage
from dalle2_jax.layers.attention import MultiHeadAttention, attention_weights, dot_product_attention
from dalle2_jax.layers.positions import sinusoidal_positions
from dalle2_jax.lineage.encoder_decoder import START, EncoderDecoder, Layer, attention_maps
from dalle2_jax.lineage.encoder_decoder_sampling import greedy_decode
from dalle2_jax.lineage.sequence_tasks import FIRST, SequenceTask, make_sequences
from train.interactive import show, start

system, key = lineage.system(), jax.random.key(0)

# %% [markdown]
# ## Attention
#
# Each token asks with a query $q$, and each has a key $k$ by which it is found and a value $v$ that it gives. With the
# queries, keys and values of all tokens as the rows of $Q$, $K$ and $V$, and queries and keys of size $d_k$,
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right) V .$$
#
# That is three lines. Below them is how far they are from the library's function, which has the batch and the heads as
# axes of their own and chooses the fastest form for the device.


# %%
def attention(queries, keys, values):
    logits = queries @ keys.T / jnp.sqrt(queries.shape[-1])
    weights = jax.nn.softmax(logits, axis=-1)
    return weights @ values


queries, keys, values = jax.random.normal(key, (3, 6, 16))
library = dot_product_attention(*(x[None, :, None] for x in (queries, keys, values)))[0, :, 0]
float(abs(attention(queries, keys, values) - library).max())

# %% [markdown]
# Why the root? The product of two random vectors of size $d_k$ has a variance of $d_k$. Without the root the softmax of
# large vectors gives nearly everything to one key, and its gradient is nearly zero. Here each of 64 random queries has
# 64 random keys:

# %%
sizes = [4, 16, 64, 256, 1024]
pairs = [np.random.default_rng(0).normal(size=(2, 64, size)) for size in sizes]
products = np.stack([q @ k.T for q, k in pairs])
figure, axes = plt.subplots(figsize=(5, 2.5))
for logits, label in ((products, "$QK^T$"), (products / np.sqrt(sizes)[:, None, None], r"$QK^T / \sqrt{d_k}$")):
    axes.semilogx(sizes, jax.nn.softmax(logits).max(axis=-1).mean(axis=-1), label=label)
axes.set(xlabel="$d_k$", ylabel="largest weight", ylim=(0, 1))
axes.legend()
plt.show()

# %% [markdown]
# ## Several heads
#
# One softmax makes one kind of choice. So there are several, each on projections of its own, and their answers side by
# side are projected once more:
#
# $$\mathrm{MultiHead}(X) = \mathrm{Concat}(h_1, \dots, h_H)\,W^O, \qquad
# h_i = \mathrm{Attention}(XW_i^Q, XW_i^K, XW_i^V).$$
#
# The library keeps all $W_i^Q, W_i^K, W_i^V$ in one kernel, so that they are one matrix product. Again the difference
# (biases start at zero and are left out):

# %%
layer, x = MultiHeadAttention(heads=4), jax.random.normal(key, (6, 32))
params = jax.jit(layer.init)(key, x[None])["params"]


def multi_head(x):
    qkv = jnp.einsum("nd,dhpe->phne", x, params["qkv"]["kernel"])  # p: query, key or value; h: head; e: its dimensions
    heads = jax.vmap(attention)(*qkv)
    return jnp.concatenate(list(heads), axis=-1) @ params["out"]["kernel"]


float(abs(multi_head(x) - layer.apply({"params": params}, x[None])[0]).max())

# %% [markdown]
# ## Masks
#
# Two things must not be seen. Sequences of a batch have different lengths and are filled up with padding, which means
# nothing. And a decoder that learns to write the next token must not see the tokens that it is to write: token $i$
# looks at tokens up to $i$ alone. A mask sets the logits of all others to $-\infty$ before the softmax.
#
# Left and in the middle, weights under the two masks: a row is a query, a column a key. Right, what really depends on
# what: where a causal layer's output $i$ (row) has a gradient in input $j$ (column). A future that leaked would show
# there.

# %%
causal = MultiHeadAttention(heads=4, is_causal=True)


@jax.jit
def depends(x):
    by_input = jax.jacobian(lambda x: causal.apply({"params": params}, x[None])[0])(x)
    return abs(by_input).sum((1, 3)) > 0


one = queries[None, :, None], keys[None, :, None]  # a batch of one sequence, with one head
real = (jnp.arange(6) < 4)[None, None, None]
shown = {
    "four tokens and padding": attention_weights(*one, mask=real)[0, 0],
    "causal": attention_weights(*one, is_causal=True)[0, 0],
    "gradient in a causal layer": depends(x),
}
figure, axes = plt.subplots(1, 3, figsize=(8, 2.6))
for place, (title, image) in zip(axes, shown.items()):
    place.imshow(image, cmap="Greys", vmin=0, vmax=1)
    place.set(title=title, xlabel="key", ylabel="query")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Positions
#
# Attention is a weighted sum, and a sum has no order. If the tokens come in another order, the outputs come in that
# order, and are the same:

# %%
order = jnp.array([3, 5, 0, 4, 1, 2])
float(abs(multi_head(x[order]) - multi_head(x)[order]).max())

# %% [markdown]
# So each token is told its place. Position $p$ is a vector of sines and cosines, of waves from short to very long ones:
#
# $$PE_{p, 2i} = \sin\left(p / 10000^{2i/d}\right), \qquad PE_{p, 2i+1} = \cos\left(p / 10000^{2i/d}\right),$$
#
# which is added to the token's embedding. The product of two positions depends on their distance alone (right), so that
# a query can ask for "three places before me" wherever it stands.

# %%
positions = sinusoidal_positions(64, 64)
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8))
axes[0].imshow(positions, cmap="RdBu", aspect="auto")
axes[0].set(xlabel="dimension", ylabel="position")
axes[1].plot(jnp.arange(64) - 10, positions @ positions[10], label="from position 10")
axes[1].plot(jnp.arange(64) - 40, positions @ positions[40], "--", label="from position 40")
axes[1].set(xlabel="distance", ylabel="product")
axes[1].legend()
plt.show()

# %% [markdown]
# ## An encoder and a decoder
#
# The encoder's layers let the source's tokens look at each other and then give each one to a small MLP. A decoder's
# layer does the same with the target's tokens so far, and between the two it has *cross-attention*: the queries are the
# target's, the keys and values the source's. Each of these parts $f$ is added to what came in, and there is a norm. In
# 2017 it stood behind the sum, soon after before the part:
#
# $$\text{post-LN:}\quad x \leftarrow \mathrm{LN}(x + f(x)) \qquad\qquad
# \text{pre-LN:}\quad x \leftarrow x + f(\mathrm{LN}(x)) .$$
#
# With post-LN all that passes from layer to layer goes through norms, the gradients of the last layers are large at the
# start, and training hangs on a slow warm-up of the learning rate. With pre-LN a sum without a norm runs from the first
# layer to the last, and deep stacks train more easily (Xiong et al., 2020). CLIP and both DALL-Es have pre-LN. The
# layer below can be either: `_before` is the norm of pre-LN, `_after` that of post-LN, and each does nothing in the
# other's place.

# %%
print(inspect.getsource(Layer.__call__))

# %% [markdown]
# ## Training
#
# The source is ten random symbols out of 20, the target the same ten in reverse. The decoder reads the true target up
# to each token, and its loss is the cross-entropy of the next one. All of these are learned at once, in one pass: that
# is what the causal mask buys. Sequences are made up anew in each step, and those that are held out never occur among
# them.

# %%
reversing = start(system, "encoder_decoder")
for now in reversing.steps(every=100):
    show(now)

# %% [markdown]
# ## Writing a target
#
# In use there is no true target: the decoder writes a token, reads it, and writes the next. What earlier tokens gave as
# keys and values does not change any more, as they do not see the new one. So it is kept, in a cache, and a step
# computes one token alone. As a function, the cache goes in and comes out:

# %%
print(inspect.getsource(EncoderDecoder.advance))

# %% [markdown]
# `greedy_decode` takes the most probable token each time, in one `lax.scan`. Below are held-out sequences of one to
# fifteen symbols, and the first of ten among them as they are written. Then a check: if the whole target that was
# written is read at once, without a cache, how many of the tokens are the most probable ones again?

# %%
module, LENGTH = reversing.module, 15


@jax.jit
def write(params, source):
    return greedy_decode(module, params, source, LENGTH + 1)


@jax.jit
def read(params, source, target):
    return module.apply({"params": params}, source, target).argmax(axis=-1)


task = SequenceTask("reverse", symbols=20, length=LENGTH, shortest=1)
sequences = jax.jit(make_sequences, static_argnums=(1, 2, 3))(key, task, 512, True)
written = np.asarray(write(reversing.params, sequences.source))
source, target = (np.asarray(tokens) for tokens in sequences)
lengths = (source >= FIRST).sum(axis=1)


def text(tokens):
    return " ".join(f"{token - FIRST:2d}" for token in tokens if token >= FIRST)


tens = np.flatnonzero(lengths == 10)
for row in tens[:4]:
    print(f"source   {text(source[row])}\nwritten  {text(written[row])}\n")
so_far = np.concatenate([np.full((len(written), 1), START, np.int32), written[:, :-1]], axis=1)
again = np.asarray(read(reversing.params, source, so_far))
print(f"the same without a cache: {(again == written)[written > 0].mean():.4f} of the tokens")
right = (written == target[:, 1:]).all(axis=1)
print(f"of {len(tens)} held-out sequences of ten, {right[tens].mean():.3f} are written without a mistake")

# %% [markdown]
# ## What looks where
#
# The weights are there to be looked at. Each image is one head, its rows the queries and its columns the keys. In
# cross-attention a row is named by the token that is written from it.

# %%
maps = jax.jit(lambda params, source, target: attention_maps(module, params, source, target))

one, its_target = source[tens[0], :11], target[tens[0], :12]
found = {name: weights[:, 0] for name, weights in maps(reversing.params, one[None], its_target[None, :-1]).items()}
rows = {
    "encoder layer 1": found["encoder"][0],
    "cross layer 1": found["cross"][0],
    "cross layer 2": found["cross"][1],
}
read_names = [*text(one).split(), "end"]
figure, axes = plt.subplots(3, 4, figsize=(10, 7.8))
for line, (title, weights) in zip(axes, rows.items()):
    names = read_names if title.startswith("encoder") else [*text(its_target).split(), "end"]
    for head, (place, image) in enumerate(zip(line, weights)):
        place.imshow(image, cmap="Greys", vmin=0, vmax=1)
        place.set_xticks(range(11), read_names, fontsize=6, rotation=90)
        place.set_yticks(range(11), names, fontsize=6)
        place.set_title(f"{title}, head {head + 1}", fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# To write the first token the decoder needs the source's last, to write the second the last but one, and so on: a
# reversed sequence is a diagonal from the top right to the bottom left, and cross-attention finds it.
#
# Where to look is a matter of places here. For a sorted sequence it is a matter of what the symbols are: the next to be
# written is the smallest of those that are not yet written. The network can be the same. Set
# `sequences=SequenceTask("sort")` in the recipe (with `dataclasses.replace` and `system.with_stage`), and look again.
#
# ## What went wrong, and what comes next
#
# In training all sequences had ten symbols. Here is how many of the held-out ones are reversed without a mistake, by
# their length:

# %%
figure, axes = plt.subplots(figsize=(6, 2.4))
by_length = [right[lengths == length].mean() for length in range(1, LENGTH + 1)]
axes.bar(range(1, LENGTH + 1), by_length, color=["C1" if length == 10 else "C0" for length in range(1, LENGTH + 1)])
axes.set(xlabel="symbols", ylabel="right", ylim=(0, 1))
plt.show()

# %% [markdown]
# It has learned to reverse ten symbols, not to reverse: a token that was always at place 10 is looked for at place 10.
# Sinusoids were hoped to carry over to lengths that were never seen. A Transformer knows what its data show, and so the
# way on was more data, and larger models.
#
# The other thing that did not last is the encoder with its cross-attention. If source and target are put one behind the
# other, a single causal stack can read the one and write the other, and it is a decoder's layer without the middle
# part. Here is which of this library's networks have cross-attention among their parameters:


# %%
def has_cross_attention(module, *inputs):
    params = jax.tree_util.tree_leaves_with_path(jax.eval_shape(module.init, key, *inputs))
    return any("cross_attention" in jax.tree_util.keystr(path) for path, _ in params)


tokens, images = jnp.zeros((1, system.context_length), jnp.int32), jnp.zeros((1, 32, 32, 3))
codes, embedding, mask = jnp.zeros((1, lineage.GRID, lineage.GRID), jnp.int32), jnp.zeros((1, 24)), tokens == 0
inputs = {
    "encoder_decoder": (tokens, tokens),
    "dalle1": (tokens, mask, codes),
    "clip": (images, tokens, mask),
    "prior": (embedding, jnp.zeros(1, jnp.int32), embedding, tokens, mask),
}
{name: has_cross_attention(system.stages[name].module, *values) for name, values in inputs.items()}

# %% [markdown]
# In DALL-E 1 and in all transformers of DALL-E 2, CLIP's two and both priors, there is none of it: they are single
# stacks, with pre-LN. (DALL-E 2's decoder is a U-Net; where it reads a caption, the caption's keys and values are put
# beside the image's own, in one softmax.)
#
# What keeps one from writing an image in this way? Attention compares all with all: twice the length is four times the
# work. A caption has a dozen tokens, an image of 256×256 pixels has 196,608 values. **05** makes a short sequence of an
# image first: a grid of codes, each of which is a word for a small patch.
