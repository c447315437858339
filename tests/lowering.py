"""Programs for devices that are not there: traced and lowered as for an NVIDIA GPU or a TPU, without any plugin."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh, Mesh

from dalle2_jax.sharding import make_mesh

DEVICES = {"cuda": AbstractDevice("NVIDIA H200", None, "gpu"), "tpu": AbstractDevice("TPU v5 lite", 1, "tpu")}


class PretendedMesh(Mesh):
    """A mesh of CPU devices that says it is one of others, so that what is traced for it is traced for those."""

    pretended: AbstractDevice

    def __new__(cls, mesh: Mesh, pretended: AbstractDevice) -> "PretendedMesh":
        self = object.__new__(cls)  # Mesh would return an equal mesh that there is already
        self.__dict__.update(mesh.__dict__, pretended=pretended)
        return self

    def __init__(self, mesh: Mesh, pretended: AbstractDevice) -> None:
        pass

    # Two that are equal share what jit has traced.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def abstract_mesh(self) -> AbstractMesh:
        return AbstractMesh(self.axis_sizes, self.axis_names, self.axis_types, abstract_device=self.pretended)


@contextlib.contextmanager
def traced_for(device: AbstractDevice, **sizes: int) -> Iterator[Mesh]:
    """Tracing inside is for a mesh of these devices, one by default; gives the mesh."""
    # jax asks cuDNN, which is not there, for its version.
    version = mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    count = math.prod(sizes.values())
    mesh = PretendedMesh(make_mesh(**sizes, devices=jax.devices()[:count]), device)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), version:
        yield mesh
