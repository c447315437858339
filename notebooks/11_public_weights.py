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
# # 11 Public weights
#
# OpenAI has never published DALL-E 2. Others have trained networks of its kind and given them away, and OpenAI has
# published parts. This library reads:

# %%
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file, save_file

from dalle2_jax import DALLE2
from dalle2_jax.cli import main
from dalle2_jax.cli.convert import SOURCES
from dalle2_jax.data.sources import captioned_shapes
from dalle2_jax.data.sources.scene import draw
from dalle2_jax.images.resize import resize
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.lineage.dvae import DVAE
from dalle2_jax.tokenizer import byte_letters
from dalle2_jax.weights.sources import glide, karlo, openai_dvae
from dalle2_jax.weights.sources.clip import MEAN, PUBLISHED, STD, clip_table
from dalle2_jax.weights.sources.karlo_original import PRIOR_MODULE

for name, (what, licence) in SOURCES.items():
    print(f"{name:12s} {what}\n{'':12s} {licence}")

# %% [markdown]
# - **Karlo** (Kakao Brain, 2022) is the only complete public one: prior, decoder and upsampler to 256 pixels, trained
#   on 115 million pairs, with OpenAI's CLIP ViT-L/14.
# - **Kandinsky** has Karlo's prior, on other CLIPs. Its decoder works on another model's latents and is not read here.
# - **GLIDE** is the decoder without $z_i$: OpenAI's smaller one, trained on images without people.
# - **CLIP** is OpenAI's own, or LAION's.
# - **openai_dvae** is the half of DALL-E 1 (**05**) that was published: images to codes and back.
#
# With network, that is one command each, and what comes of it is a run like any other:
#
# ```
# dalle2 convert karlo kakaobrain/karlo-v1-alpha runs/karlo --clip openai/clip-vit-large-patch14 --dtype bfloat16
# dalle2 generate runs/karlo "a portrait of an old monk, highly detailed" --count 4
# dalle2 vary runs/karlo photo.png --count 4
# ```
#
# How large are they?

# %%
sizes = {
    "Karlo: prior": karlo.PRIOR_PARAMETERS,
    "Karlo: decoder": karlo.DECODER_PARAMETERS + karlo.TEXT_PROJECTION_PARAMETERS,
    "Karlo: upsampler, two networks": 2 * karlo.UPSAMPLER_PARAMETERS,
    "CLIP B/32": PUBLISHED[768, 32, 224],
    "CLIP L/14": PUBLISHED[1024, 14, 224],
    "CLIP bigG/14": PUBLISHED[1664, 14, 224],
    "GLIDE: base": glide.PARAMETERS["base"],
    "GLIDE: upsampler": glide.PARAMETERS["upsample"],
    "DALL-E 1: dVAE": sum(openai_dvae.PARAMETERS.values()),
}
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.barh(list(sizes), [count / 1e6 for count in sizes.values()])
axes.invert_yaxis()
axes.set(xlabel="millions of parameters")
figure.tight_layout()
plt.show()

# %% [markdown]
# These are the published numbers. Do our networks have as many? They are built here from shapes alone, which takes no
# memory, and counted.

# %%
def parameters(module, *inputs, method="__call__"):
    """How many a network has, without making any."""
    init = partial(module.init, jax.random.key(0), method=method)
    return count_parameters(jax.eval_shape(init, *(jax.ShapeDtypeStruct(*one) for one in inputs))["params"])


size, length = PRIOR_MODULE.embedding_size, PRIOR_MODULE.context_length
vector, states = ((1, size), "float32"), ((1, length, size), "float32")
counted = {
    "Karlo: prior": parameters(PRIOR_MODULE, vector, ((1,), "int32"), vector, states, ((1, length), bool)),
    "DALL-E 1: dVAE": parameters(DVAE(), ((1, 256, 256, 3), "float32"), method="reconstruct"),
}
for name, count in counted.items():
    print(f"{name:15s} {count:13,}   published: {sizes[name]:13,}")

# %% [markdown]
# ## A file as others publish it
#
# This page needs no network, so it makes a stand-in: a CLIP in the layout of `transformers`, as OpenAI's are published,
# with their names and all their files, but tiny and with random weights.

# %%
here = os.getcwd()
os.chdir(tempfile.mkdtemp())  # all files of this page go there
folder, runs = Path("openai-clip-tiny"), Path("runs")
folder.mkdir()
SIZE, PATCH, WIDTH, LAYERS, HEADS, JOINT, LENGTH = 32, 8, 64, 2, 2, 32, 16

letters = list(byte_letters().values())
vocabulary = [*letters, *(letter + "</w>" for letter in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
half = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
config = {
    "model_type": "clip",
    "projection_dim": JOINT,
    "text_config": {**half, "vocab_size": len(vocabulary), "max_position_embeddings": LENGTH},
    "vision_config": {**half, "image_size": SIZE, "patch_size": PATCH},
}
(folder / "config.json").write_text(json.dumps(config))
(folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
(folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
(folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH, "pad_token": "<|endoftext|>"}))


def named_shapes():
    """The names of OpenAI's CLIP as transformers has them, and the shapes of this size."""
    found = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (len(vocabulary), WIDTH),
        "text_model.embeddings.position_embedding.weight": (LENGTH, WIDTH),
        "text_projection.weight": (JOINT, WIDTH),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": ((SIZE // PATCH) ** 2 + 1, WIDTH),
        "visual_projection.weight": (JOINT, WIDTH),
    }
    norms = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    linear = {}
    halves = ("text_model", "vision_model")
    for name in (f"{half}.encoder.layers.{layer}" for half in halves for layer in range(LAYERS)):
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
        linear |= {f"{name}.self_attn.{part}_proj": (WIDTH, WIDTH) for part in ("q", "k", "v", "out")}
        linear |= {f"{name}.mlp.fc1": (4 * WIDTH, WIDTH), f"{name}.mlp.fc2": (WIDTH, 4 * WIDTH)}
    for name, (outputs, inputs) in [*linear.items(), *((name, (WIDTH, None)) for name in norms)]:
        found[f"{name}.weight"] = (outputs,) if inputs is None else (outputs, inputs)
        found[f"{name}.bias"] = (outputs,)
    return found


rng = np.random.default_rng(0)
tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in named_shapes().items()}
tensors |= {name: tensors[name] + 1 for name in tensors if "norm" in name and name.endswith(".weight")}
save_file(tensors, folder / "model.safetensors")
print(f"{len(tensors)} tensors, {sum(value.size for value in tensors.values()):,} numbers")

# %% [markdown]
# ## Converting it
#
# The command, called from Python. It returns 0.

# %%
main(["convert", "clip", str(folder), str(runs / "clip")])

# %% [markdown]
# As many parameters as there are numbers in the file. What goes where says a table with an entry for each of our
# parameters. It is strict: every tensor of the file is used exactly once, every parameter is made exactly once, every
# shape is as it has to be. Some entries (ours are the transposed matrices, with queries, keys and values side by side):

# %%
model = DALLE2.load(runs / "clip")
for entry in clip_table(model.clip.module).entries[4:16]:
    print(f"{entry.target}  <-  {', '.join(entry.sources)}")

# %% [markdown]
# ## Was anything changed on the way?
#
# Counting says that nothing is missing. That each number stands in its right place, and that the network computes with
# it what its makers did, is another matter: a matrix turned the wrong way has the right count. So here is OpenAI's CLIP
# once more, written down from its description in plain NumPy and by *their* names. It reads the published file and
# knows nothing of this library.

# %%
published = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}


def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * published[f"{name}.weight"] + published[f"{name}.bias"]


def linear(x, name):
    return x @ published[f"{name}.weight"].T + published[f"{name}.bias"]


def attention(x, name, mask):
    q, k, v = (linear(x, f"{name}.{part}_proj").reshape(len(x), HEADS, -1).swapaxes(0, 1) for part in "qkv")
    scores = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(WIDTH / HEADS), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return linear(mixed.swapaxes(0, 1).reshape(len(x), WIDTH), f"{name}.out_proj")


def blocks(x, half, mask):
    for name in (f"{half}.encoder.layers.{layer}" for layer in range(LAYERS)):
        x = x + attention(norm(x, f"{name}.layer_norm1"), f"{name}.self_attn", mask)
        hidden = linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f"{name}.mlp.fc2")  # the "quick" GELU
    return x


def embedded(state, projection):
    z = state @ published[projection].T
    return z / np.linalg.norm(z)


def image_embedding(image):
    pixels, side = (image / 255 - np.array(MEAN)) / np.array(STD), SIZE // PATCH
    patches = pixels.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(side**2, -1)
    x = patches @ published["vision_model.embeddings.patch_embedding.weight"].reshape(WIDTH, -1).T
    x = np.concatenate([published["vision_model.embeddings.class_embedding"][None], x])
    x = norm(x + published["vision_model.embeddings.position_embedding.weight"], "vision_model.pre_layrnorm")
    first = blocks(x, "vision_model", True)[0]
    return embedded(norm(first, "vision_model.post_layernorm"), "visual_projection.weight")


def caption_embedding(tokens):
    x = published["text_model.embeddings.token_embedding.weight"][tokens]
    x = x + published["text_model.embeddings.position_embedding.weight"][: len(tokens)]
    last = blocks(x, "text_model", np.tri(len(tokens), dtype=bool))[-1]  # at the end token
    return embedded(norm(last, "text_model.final_layer_norm"), "text_projection.weight")


# %% [markdown]
# The same images and captions, by both:

# %%
scenes = [captioned_shapes.example(captioned_shapes.CONFIGS["one_object"], "test", number)[0] for number in range(8)]
images = resize(np.stack([draw(scene) for scene in scenes]), SIZE)
captions = ["a dog", "A  Dog!", "two dogs", "do", "x", "a cat", "dog dog", "12"]
encoded = model.encode_text(captions)
tokens = [row[kept] for row, kept in zip(np.asarray(encoded.tokens), np.asarray(encoded.mask))]
print("tokens of 'a dog':", [vocabulary[token] for token in tokens[0]])

theirs = np.stack([image_embedding(image) for image in images]), np.stack([caption_embedding(row) for row in tokens])
ours = np.asarray(model.encode_image(images)), np.asarray(encoded.embedding)
for what, one, other in zip(("images", "captions"), ours, theirs):
    print(f"{what:9s} largest number {np.abs(other).max():.3f}, largest difference {np.abs(one - other).max():.1e}")

figure, axes = plt.subplots(figsize=(3.2, 3.2))
for what, one, other in zip(("images", "captions"), ours, theirs):
    axes.plot(other.ravel(), one.ravel(), ".", markersize=4, label=what)
axes.set(xlabel="by the published file, in NumPy", ylabel="by the run")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The difference is that of single and double precision: the seventh digit. The tests of this library do the same with
# the makers' own programs (`docs/results/weights.md`).
#
# From here on it is a run. With real weights the cosines below would mean something; with random ones they do not.

# %%
np.round(np.asarray(model.scores(list(images), captions))[:4, :4], 3)

# %% [markdown]
# ## What does not fit is refused
#
# By the tensor's name, in one sentence, with nothing left on the disk. Here one name has a misprint:

# %%
spoiled = {name.replace("visual_projection", "visual_projektion"): value for name, value in tensors.items()}
save_file(spoiled, folder / "model.safetensors")
code = main(["convert", "clip", str(folder), str(runs / "spoiled")])
print("exit code", code, "and in the folder of runs:", [path.name for path in runs.iterdir()])

# %% [markdown]
# Older files are worse: PyTorch's are pickles, and a pickle is a program. OpenAI's dVAE was published as two of them,
# and to open one as it was meant to be opened is to run it. This library reads such a file by a reader of its own,
# which knows what tensors and layers look like and calls nothing. A file that would run something:

# %%
class Harmful:
    """Pickled as a call. Here it would only print; it could do anything."""

    def __reduce__(self):
        return print, ("this was run",)


pickles = Path("dvae")
pickles.mkdir()
for part in ("encoder", "decoder"):
    with zipfile.ZipFile(pickles / f"{part}.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state": Harmful()}, protocol=2))
        archive.writestr("archive/byteorder", "little")

print("exit code", main(["convert", "openai_dvae", str(pickles), str(runs / "dvae")]))
print("opened by Python's own pickle:")
_ = pickle.loads(pickle.dumps(Harmful(), protocol=2))

# %%
temporary = os.getcwd()
os.chdir(here)
shutil.rmtree(temporary)

# %% [markdown]
# ## What went wrong, and what comes next
#
# Two things cannot be shown here. The weights themselves: Karlo has 13 GB. And that they are good: random numbers go
# through the same tables as trained ones, but nobody can see from them what the network knows.
#
# Also mind the licences. They are recorded in the run, and a run that is trained further keeps them: `dalle2 describe`
# says them.
#
# And public weights have seen the whole web, but not your images. **12** is about those: from nothing, or going on from
# what others have trained.
