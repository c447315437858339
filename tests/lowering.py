"""Programs for devices that are not there: traced and lowered as for an NVIDIA GPU or a TPU, without any plugin."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
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
def pretended(device: AbstractDevice, **sizes: int) -> Iterator[Mesh]:
    """A mesh of these devices, one by default; inside, jax finds a cuDNN when it asks for its version."""
    mesh = PretendedMesh(make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())]), device)
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200):
        yield mesh


@contextlib.contextmanager
def traced_for(device: AbstractDevice, **sizes: int) -> Iterator[Mesh]:
    """Tracing inside is for such a mesh."""
    with pretended(device, **sizes) as mesh, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution of a lowered program: where the network asks for it, and its operands' types."""

    path: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """What a lowered program holds, of each function as often as it is called; a loop's body once.

    kernels: cuDNN's attention calls, by their target. softmax: the shapes of exponentials of four axes or more, which
    are those of all queries by all keys; a single query's do not count. products: all matrix products and convolutions.
    """

    kernels: Counter[str]
    softmax: set[tuple[int, ...]]
    products: list[Product]

    def float32_products(self, allowed: str) -> list[str]:
        """The paths of products of two float32 arrays that the regular expression does not hold."""
        found = {p.path for p in self.products if all(kind == "f32" for kind in p.types)}
        return sorted(path for path in found if not re.search(allowed, path))


def analyse(lowered: jax.stages.Lowered) -> Program:
    """Reads a lowered program, function by function."""
    functions = {op.attributes["sym_name"].value: op for op in lowered.compiler_ir("stablehlo").body.operations}
    program = Program(Counter(), set(), [])

    def visit(operation: Any) -> None:
        for region in operation.regions:
            for block in region.blocks:
                for op in block.operations:
                    read(op.operation)
                    visit(op.operation)

    def read(op: Any) -> None:
        if op.name == "func.call":
            callee = op.attributes["callee"].value
            visit(functions[callee].operation)
        if op.name == "stablehlo.exponential" and not _negated(op.operands[0]):  # as a sigmoid's is
            shape = tuple(op.results[0].type.shape)
            if len(shape) > 3 and shape[-2] > 1 and shape[-1] > 3:  # nor a learned variance's, of three channels
                program.softmax.add(shape)
        if op.name == "stablehlo.custom_call" and "fmha" in (target := op.attributes["call_target_name"].value):
            program.kernels[target] += 1
        if op.name in ("stablehlo.dot_general", "stablehlo.convolution"):
            types = tuple(str(operand.type.element_type) for operand in op.operands)
            path = re.search(r'"([^"]*)"', str(op.location))
            program.products.append(Product(path[1] if path else "", types))

    visit(functions["main"].operation)
    return program


def _negated(value: Any) -> bool:
    return getattr(value.owner, "name", "") == "stablehlo.negate"
