"""For which device a function is traced: the mesh says so."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice

from dalle2_jax.layers.kernels.target import traced_for_nvidia
from tests.lowering import DEVICES, traced_for


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("gpu", "NVIDIA H200", True),
        ("gpu", "NVIDIA GeForce RTX 4090", True),
        ("gpu", "NVIDIA A100-SXM4-40GB", True),
        ("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", True),
        ("gpu", "NVIDIA L40S", True),
        ("gpu", "Tesla T4", False),
        ("gpu", "NVIDIA GeForce RTX 2080 Ti", False),
        ("gpu", "NVIDIA GeForce GTX 1080", False),
        ("gpu", "Tesla V100-SXM2-16GB", False),
        ("gpu", "AMD Instinct MI300X", False),
        ("tpu", "TPU v5 lite", False),
        ("cpu", "cpu", False),
    ],
)
def test_which_devices_have_flash_attention(platform, kind, expected):
    with traced_for(AbstractDevice(kind, None, platform)):
        assert traced_for_nvidia() == expected
    assert not traced_for_nvidia()


def test_the_device_of_the_mesh_decides_also_where_jit_has_traced_before():
    """A GPU's machine has CPU devices too, and a trace for one is not one for the other."""
    x = jnp.zeros((2, 8, 2, 16), jnp.bfloat16)
    found = []

    @jax.jit
    def attend(x):
        found.append(traced_for_nvidia())
        return x

    attend(x)
    with traced_for(DEVICES["cuda"]):
        attend.trace(x)
    attend(x)
    assert found == [False, True]
