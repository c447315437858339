"""The latent (z_i, x_T) of the paper's Sec. 3 and its uses: each a function of a run, keys and a latent.

latent        Latent, encode, embed, reconstruct: an image as what CLIP sees in it and the noise that holds the rest
vary          the same content drawn otherwise, or the same meaning drawn anew
interpolate   between two images, or among four
edit          text diffs: from what one caption says towards what another says
inpaint       a part of an image painted anew, and an image continued beyond its edges
probe         what the first principal components of an embedding hold
series        labelled images, which all of them return
"""

from dalle2_jax.manipulate.edit import edit
from dalle2_jax.manipulate.inpaint import Inpainted, Outpainted, inpaint, outpaint
from dalle2_jax.manipulate.interpolate import interpolate, interpolate_grid, slerp
from dalle2_jax.manipulate.latent import Latent, default_steps, embed, encode, reconstruct
from dalle2_jax.manipulate.probe import pca_of_run, probe
from dalle2_jax.manipulate.series import Series
from dalle2_jax.manipulate.vary import vary

__all__ = [
    "Inpainted",
    "Latent",
    "Outpainted",
    "Series",
    "default_steps",
    "edit",
    "embed",
    "encode",
    "inpaint",
    "interpolate",
    "interpolate_grid",
    "outpaint",
    "pca_of_run",
    "probe",
    "reconstruct",
    "slerp",
    "vary",
]
