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
# # 12 Your own images
#
# Everything before used one data set. What is needed for another is a folder: `NAME.png`, and beside it `NAME.txt` with
# its caption, each line one more way to say it. (Or one `metadata.jsonl` or `metadata.csv` with `file_name` and
# `text`.) Then the commands are
#
# ```
# dalle2 data check IMAGES                                                          # what is in it, what is wrong
# python -m train configs/folder.py IMAGES all                                      # every stage, from nothing
# python -m train configs/folder.py IMAGES all --run tuned --init-from runs/emoji   # going on from a trained run
# dalle2 curves runs/IMAGES runs/tuned                                              # their losses, side by side
# dalle2 generate runs/tuned "a caption" --count 8 --grid --out sheet.png
# ```
#
# This page goes through them with a folder that it makes itself.

# %%
import os
import sys

sys.path += ["..", "."]  # the checkout, for configs/ and train/

import dataclasses
import inspect
import shutil
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from configs import folder as folder_config
from configs import shapes
from dalle2_jax import DALLE2
from dalle2_jax.checkpoint import CheckpointWriter, write_record
from dalle2_jax.cli import main
from dalle2_jax.data.sources import captioned_shapes
from dalle2_jax.data.sources.folder import read_folder
from dalle2_jax.data.sources.scene import draw
from dalle2_jax.sharding import make_mesh
from train.interactive import show, start
from train.run.cascade import train_stages

QUICK = bool(os.environ.get("DALLE2_QUICK"))
here = os.getcwd()
os.chdir(tempfile.mkdtemp())  # all files of this page go there


def example(split, number):
    """An image and its captions. Put your own in place of this."""
    scene, captions = captioned_shapes.example(captioned_shapes.CONFIGS["one_object"], split, number)
    return draw(scene), captions


def write_folder(folder, split, numbers):
    """NAME.png and NAME.txt, a pair for each number."""
    folder.mkdir()
    for number in numbers:
        image, captions = example(split, number)
        Image.fromarray(image).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


images = write_folder(Path("images"), "train", range(200))
print((images / "0000.txt").read_text())

# %% [markdown]
# Folders of real life are not that clean. So three things are added: an image without a caption, half of a file, and a
# caption whose image has gone.

# %%
shutil.copy(images / "0000.png", images / "forgotten.png")
(images / "cut.png").write_bytes((images / "0001.png").read_bytes()[:100])
(images / "cut.txt").write_text("a file of which half is missing\n")
(images / "gone.txt").write_text("an image that is no longer there\n")

main(["data", "check", str(images), "--out", "sheet.png"])
Image.open("sheet.png").copy()

# %% [markdown]
# Look at the sheet before anything else. It shows what training sees: the central square of each image. Most failures
# of own data are in it: captions that belong to other images, borders, images of which the square cuts off the subject.
#
# What cannot be used is named and left out. The splits follow from the files' names, about 90% for training and 5% each
# for validation and test, so that an image stays where it is when others are added.
#
# ## The config
#
# `configs/folder.py` takes the networks of `configs/emoji.py` and sets the steps and the data:

# %%
print(inspect.getsource(folder_config.on_folder))

# %% [markdown]
# How many steps? The more images, the more. The measure is how often each image is seen. Its own numbers are those that
# 271 emoji bore, after which the prior and the decoder got worse on held-out images; for 200 images that is

# %%
count = len(read_folder(images).split("train"))
for name, recipe in folder_config.system(str(images)).stages.items():
    seen = recipe.steps * recipe.batch_size / count
    print(f"{name:22s} {recipe.steps:5d} steps of {recipe.batch_size}: each of {count} training images {seen:4.0f} times")

# %% [markdown]
# And how many images?
#
# - **Some hundred** teach a look: colours, line, a few kinds of things. Captions must use the same words for the same
#   things. What is not in them is not drawn. Better start from a trained run (below).
# - **Some thousand** of one kind, such as the 3,655 emoji, teach to put things together anew. Give as many steps as
#   `configs/emoji.py` has; 90 minutes on two cores.
# - For **photographs of anything** the paper took 250 million. Start from public weights (**11**) and
#   `configs/karlo.py`.
#
# ## Training, and reading the curves
#
# CLIP first, as all others are built on it. To have it in a minute, with the small networks of `configs/shapes.py`.

# %%
def system_of(folder, steps):
    """The networks of configs/shapes.py for the images of a folder, with so many steps for CLIP."""
    system = folder_config.on_folder(shapes.system(), str(folder), {**folder_config.STEPS, "clip": steps})
    return dataclasses.replace(system, data=dataclasses.replace(system.data, folder=str(folder), data_dir="cache"))


clip = start(system_of(images, 500), "clip")
held_out = []
for now in clip.steps(every=20):
    held_out.append((now.step, now.validate()["loss"]))
    show(now)

# %% [markdown]
# The loss says how hard it is to find an image's caption among those of the batch. By guessing it is the logarithm of
# their number. There are fewer held-out images than images in a batch, so the two are divided by that: 1 is guessing.

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
for label, points, size in (
    ("training", clip.history["loss"], clip.task.recipe.batch_size),
    ("held out", held_out, len(clip.examples["captions"])),
):
    steps, losses = zip(*points)
    axes.plot(steps, np.array(losses) / np.log(size), label=f"{label}, of {size}")
axes.set(xlabel="step", ylabel="loss / log of the batch", ylim=(0, None))
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Here both fall, and the held-out one lies below: it is of each image's full caption, while training says only a part in
# half of the cases ("something red"), which many images of a batch share. So compare their course, not their height.
#
# How to read it:
#
# - *Both fall*: it learns what holds for other images too. Go on.
# - *Training falls, held-out stays or rises*: it learns these images by heart. Stop about where they part; more steps
#   need more images.
# - *Both stay high*: captions that do not tell the images apart, or a learning rate too small or too large.
# - *Training jumps up and stays there*: the learning rate is too large. Halve it (`clip.optimizer.learning_rate=5e-4`).
# - The held-out curve of a dozen images is rough. Believe its course and not its steps.
#
# For the decoder's loss the absolute number says little: much of it is noise that nobody could foretell. Look at the
# previews in `runs/NAME/decoder/samples` as well.
#
# ## Fine-tuning
#
# Now 60 images of things that the first folder has not: red circles, blue squares, yellow triangles and green crosses.
# Few images, and the words are known, each for itself. `--init-from` starts every stage from another run's stage of its
# name, with the tokenizer of that run; the optimizer starts afresh. So the CLIP from above becomes a stage in a run's
# folder, as the training program leaves one, and `train_clip` is what the command calls.

# %%
def save(training, folder):
    """What was trained above, as a stage's folder."""
    with CheckpointWriter(folder) as writer:
        writer.save(training.step, {"ema": training.params})
    write_record(folder, dataclasses.replace(training.loaded().record, step=training.step, finished=True))


def train_clip(folder, run, steps, init_from=None):
    """python -m train configs/folder.py FOLDER clip --run RUN [--init-from INIT_FROM]"""
    system = system_of(folder, steps)
    short = {"steps": 2, "batch_size": 8, "log_every": 1} if QUICK else {"batch_size": 32, "log_every": 10}
    start_from = None if init_from is None else str(init_from / "clip")
    same = {"module": clip.module, "init_from": start_from, "checkpoint_every": steps}
    recipe = dataclasses.replace(system.stages["clip"], **same, **short)
    run_dir, mesh, lines = Path("runs") / run, make_mesh(devices=jax.devices()[:1]), []
    train_stages(system.with_stage("clip", recipe), ["clip"], run_dir, mesh, command="train {stage}", log=lines.append)
    print("\n".join(line for line in lines if "starts from" in line or "trained" in line))
    return run_dir


base = Path("runs/base")
save(clip, base / "clip")
few = write_folder(Path("few"), "unseen", range(60))
alone = train_clip(few, "alone", 100)
tuned = train_clip(few, "tuned", 100, init_from=base)

# %% [markdown]
# The training losses and, as dots, those of the seven held-out images that so small a folder has:

# %%
main(["curves", str(alone), str(tuned), "--out", "curves.png"])
Image.open("curves.png").copy()

# %% [markdown]
# So few held-out images say nothing. But more of the kind can be had here: 24 new ones, each of another caption. How
# often is an image's own caption the nearest of the 24?

# %%
new = [example("unseen", number) for number in range(72, 96)]
for run in (base, alone, tuned):
    cosines = np.asarray(DALLE2.load(run).scores([image for image, _ in new], [captions[0] for _, captions in new]))
    print(f"{run.name:6s} {(cosines.argmax(1) == np.arange(24)).mean():.2f}   (by chance {1 / 24:.2f})")

# %% [markdown]
# *base* has never seen these pairs, *alone* has seen nothing else. *tuned* has both, and finds most.

# %%
temporary = os.getcwd()
os.chdir(here)
shutil.rmtree(temporary)

# %% [markdown]
# ## What went wrong, and what comes next
#
# A folder of hundreds is learned by heart sooner than one thinks. The measures above are for noticing it: a held-out
# curve, and images that were kept away. On 271 emoji the decoder's held-out loss was least after 360 of its 900 steps
# when it went on from a trained run, and 0.057 there against 0.087 from nothing (`docs/results/folder.md`).
#
# What comes next is yours. Train the other stages (`python -m train configs/folder.py IMAGES all`), look at
# `runs/IMAGES/decoder/samples` while it runs, and take the result apart with **quickstart** and **10**, which need no
# more than `DALLE2_RUN=runs/IMAGES`.
