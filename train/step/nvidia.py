"""NVIDIA GPUs as XLA's compiler is given them, so that it compiles for one that is not there.

XLA asks for a `GpuTargetConfigProto`, whose fields are here one table: what the chips differ in, and what they share.

Sources. Streaming multiprocessors, clock, second-level cache, bandwidth: NVIDIA's data sheets and architecture papers
of the A100 80GB, H100, H200 and B200, in the SXM form that servers of eight have. Float32 units, shared memory,
registers and threads of a multiprocessor: the CUDA C++ Programming Guide's table of technical specifications by
compute capability. The memory is what CUDA reports of such a chip (`cudaMemGetInfo`), rounded down: 99% of the 80, 141
or 180 GiB that it has. CUDA and cuDNN are the oldest that jax's plugin for CUDA 13 takes.

`device_kind` of the devices is the name that jax gives the chip on a machine that has one.
"""

import math
from dataclasses import dataclass

CUDA, CUDNN = (13, 0, 0), (9, 12, 0)
# GiB that programs cannot have: CUDA's context is 0.6, what cuBLAS, cuDNN and NCCL load and keep comes on top.
RESERVED = 1.0


@dataclass(frozen=True)
class Chip:
    """What distinguishes a chip.

    capability: compute capability. cores: streaming multiprocessors. units: float32 units of each. shared: KiB of
    shared memory of each, of which a block may ask for all but one. cache: MiB of the second level. clock: GHz at most.
    bandwidth: bytes a second of the device's memory. memory: GiB, as CUDA reports them.
    """

    device_kind: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float
    bandwidth: float
    memory: float

    @property
    def usable(self) -> float:
        """Whole GiB that programs may use: what CUDA reports less `RESERVED`.

        All of it, where XLA's allocator takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
        """
        return float(math.floor(self.memory - RESERVED))

    @property
    def target_config(self) -> str:
        """The chip as text of a `GpuTargetConfigProto`."""
        major, minor = self.capability
        # From Hopper on there are instructions for this one architecture, such as sm_90a's.
        extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        cuda, cudnn = (".".join(map(str, version)) for version in (CUDA, CUDNN))
        return f"""\
gpu_device_info {{
  name: "{self.device_kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  clock_rate_ghz: {self.clock}
  device_memory_size: {int(self.memory * 2**30)}
  memory_bandwidth: {int(self.bandwidth)}
  ecc_enabled: true
  l2_cache_size: {self.cache * 2**20}
  shared_memory_per_core: {self.shared * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {(self.shared - 1) * 2**10}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{cudnn}"
}}
platform_name: "CUDA"
runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} patch: {CUDA[2]} }}
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{self.device_kind}"
"""


CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 1.41, 2.039e12, 79.2),
    "h100": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 1.98, 3.35e12, 79.1),
    "h200": Chip("NVIDIA H200", (9, 0), 132, 128, 228, 50, 1.98, 4.8e12, 139.7),
    "b200": Chip("NVIDIA B200", (10, 0), 148, 128, 228, 126, 1.965, 7.7e12, 178.3),
}
