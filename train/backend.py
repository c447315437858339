"""Settings that must be made before jax's backend starts: quieter logs, compiled programs kept, CPU cores as devices.

The experimental CPU setting that sped up weight gradients of 3x3 convolutions at 16 px
(`--xla_cpu_experimental_ynn_fusion_type`) was measured on the demo's networks, which fold pixels into channels: it made
their steps about a tenth slower, so it is not set. XLA_FLAGS stays the user's.
"""

import os
from pathlib import Path

CACHE = Path(".cache") / "jax"


def setup(several: bool = False, cache: Path = CACHE) -> None:
    """Makes the settings, where the user has not made them; call it before anything asks jax for its devices.

    several: whether this is one of several processes. On CPUs each then has one device, unless JAX_NUM_CPU_DEVICES
        says otherwise: all must have as many, and their machines' cores may differ, or be the same ones.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from dalle2_jax.sharding import use_cpu_cores

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if not several:
        use_cpu_cores()
