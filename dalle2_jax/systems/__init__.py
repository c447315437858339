"""Any trained run as a system that one can sample from: DALL-E 2's cascade, and those that led to it.

model = dalle2_jax.load("runs/lineage/vae")
images = model.generate(jax.random.key(0), count=16)       # uint8 [16, h, w, 3]
model = dalle2_jax.load("runs/demo")                       # a DALLE2
images = model.generate(jax.random.key(0), ["a small red circle on a gray background"], count=4)
"""

from dalle2_jax.systems.load import load
from dalle2_jax.systems.model import ImageModel
from dalle2_jax.systems.sequences import SequenceModel

__all__ = ["ImageModel", "SequenceModel", "load"]
