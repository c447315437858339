"""For which device a function is being traced."""

import re

import jax

# cuDNN's flash attention, and bfloat16 in the tensor cores, need Ampere or newer.
BEFORE_AMPERE = re.compile(r"Tesla|Quadro|TITAN|GTX|RTX 20|\b(K80|P4|P40|P100|T4|V100)\b")


def traced_for_nvidia() -> bool:
    """Whether what is traced now is for an NVIDIA GPU of the Ampere generation or newer.

    The mesh in whose context it is traced says so (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), and without one
    jax's default backend. A mesh of chips that are not there counts as well, and jit keeps the traces apart.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    if device is None or device.platform not in ("gpu", "cuda"):
        return False
    return device.device_kind.startswith("NVIDIA") and not BEFORE_AMPERE.search(device.device_kind)
