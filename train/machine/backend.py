"""Settings that must be made before jax's backend starts: quieter logs, compiled programs and freed memory kept, CPU
cores as devices, loops joined.

What the user says in XLA_FLAGS stays; what a single step is compiled with says compiler.py.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(".cache") / "jax"
# Settings of XLA that no `compiler_options` of a program can make.
EXTRA, JOINED = "xla_backend_extra_options", "xla_cpu_use_multi_output_fusion"
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
OTHER_PLUGINS = ("libtpu", "jax_rocm7_plugin", "jax_rocm60_plugin")
# Where jax looks for an NVIDIA GPU; the last is that of WSL.
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def setup(several: bool = False, cache: Path = CACHE) -> None:
    """Makes the settings, where the user has not made them; call it before anything asks jax for its devices.

    several: whether this is one of several processes. On CPUs each then has one device, unless JAX_NUM_CPU_DEVICES
        says otherwise: all must have as many, and their machines' cores may differ, or be the same ones.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if on_cpu() and _installed(CUDA_PLUGINS):
        compute_on_cpu()
    import jax

    from dalle2_jax.sharding import use_cpu_cores

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if on_cpu():
        keep_freed_memory()
        join_loops()
    if not several:
        use_cpu_cores()


def on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as that can be known before it starts.

    A CUDA plugin without an NVIDIA GPU is one to compile with.
    """
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen == "cpu"
    return not (_installed(OTHER_PLUGINS) or (has_nvidia_gpu() and _installed(CUDA_PLUGINS)))


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU, by the same files by which jax tells."""
    return any(os.path.exists(name) for name in NVIDIA_DEVICES)


def _installed(packages: Iterable[str]) -> bool:
    return any(importlib.util.find_spec(name) for name in packages)


def compute_on_cpu() -> None:
    """Has jax compute on the CPU, unless JAX_PLATFORMS says otherwise; call it before a backend starts.

    Without a GPU and without this, jax's CUDA plugin misses CUDA's libraries and leaves, so that nothing can be
    compiled for it either.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_platforms", "cpu")  # where jax has read the variable already


def join_loops() -> bool:
    """Lets XLA for a CPU join loops over the same arrays, unless XLA_FLAGS has such options already.

    AdamW's moments and parameters are the gain: three loops over arrays of their size become one, for which the memory
    is the limit. Returns whether it was done.
    """
    from train.machine.compiler import jaxlib_knows

    flags = os.environ.get("XLA_FLAGS", "")
    if EXTRA in flags or not (jaxlib_knows(EXTRA) and jaxlib_knows(JOINED)):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} --{EXTRA}={JOINED}=true".strip()
    return True


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, on Linux with glibc and unless MALLOC_ variables say otherwise.

    A compiled step takes its temporaries as one large piece and gives it back at its end. glibc asks the kernel for a
    piece of that size anew each time, and the first touch of each of its pages is a fault: 160,000 of them, a ninth of
    the processor's time, in a step of a prior of 40 million parameters. Returns whether it was done.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    most_mapped, trim_threshold, most_arenas = -4, -1, -8  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        allocator = ctypes.CDLL("libc.so.6")
        return all(
            allocator.mallopt(*setting) for setting in ((most_mapped, 0), (trim_threshold, -1), (most_arenas, 1))
        )
    return False
