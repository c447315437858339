"""Compiler options for what a test computes for long: those of conftest.py compile fast, and compute slowly."""

from train.machine.compiler import jaxlib_knows

OPTIONS = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
OPTIMISED = {name: value for name, value in OPTIONS.items() if jaxlib_knows(name)}
