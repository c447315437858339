"""Imported before torchvision, whose wheels are for CUDA: with a torch for CPUs two operators are missing.

    python -m tests.parity.torchvision_shim tests.parity.make_clip

does so and runs a module, since transformers and diffusers import torchvision where it is installed.
"""

import runpy
import sys

from benchmarks.peers.torchvision_operators import declare

declare()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
