"""What a device could compute at best: dense bfloat16 operations a second, as its vendor states them.

Sources. TPU: the page of each generation in Google Cloud's TPU documentation ("peak compute per chip"). A v2, v3 and
TPU7x chip is two of jax's devices, a chip of the others is one, so those three figures are halved here. NVIDIA: the
data sheets of the A100, H100, H200, L4, L40S, A30 and B200, and the architecture papers of the GeForce RTX 3090, 4090
and 5090 (with sums in float32). The figures "with sparsity", which stand first in most sheets, are twice these.

The names are those that jax gives in `device_kind`. A device that is not here, such as a part of a card (MIG), has no
MFU. The peak is that of bfloat16 whatever a network computes in, so that float32 shows what it leaves unused.
"""

PEAKS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}
