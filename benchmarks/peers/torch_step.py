"""What both peers share: the measured steps of a PyTorch network, its precision, its memory, torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.peers.torchvision_operators import declare
from benchmarks.worker import Report, peak_memory, start

declare()  # the peers, which are imported after this file, import torchvision

LEARNING_RATE, WEIGHT_DECAY, AVERAGE = 1e-4, 1e-2, 0.9999


def start_torch() -> argparse.Namespace:
    """The process's orders, with torch set to them."""
    orders = start()
    torch.manual_seed(0)
    if orders.device == "cpu":
        torch.set_num_threads(orders.threads)
    else:  # as jax does it: float32 products may take the tensor cores' shorter format
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return orders


def precision(orders: argparse.Namespace) -> torch.autocast:
    """float32 parameters, computing in bfloat16 where that was asked for."""
    return torch.autocast(orders.device, torch.bfloat16, enabled=orders.dtype == "bfloat16")


def wait(orders: argparse.Namespace) -> None:
    """Until the device is done."""
    if orders.device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(orders: argparse.Namespace) -> int:
    """The most bytes held so far: the accelerator's, or the host's where there is none."""
    return torch.cuda.max_memory_allocated() if orders.device == "cuda" else peak_memory()


def cache_hits() -> int:
    """How many compiled graphs were found in torch.compile's caches so far."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def start_report(side: str, orders: argparse.Namespace, versions: dict[str, str]) -> Report:
    """What a process of this side will have found."""
    kind = torch.cuda.get_device_name() if orders.device == "cuda" else "cpu"
    side = f"{side}, compiled" if orders.compile else side
    known = {"versions": {"torch": torch.__version__, **versions}, "device_kind": kind}
    return Report(side, orders, lambda: peak_bytes(orders), cache_hits if orders.compile else lambda: 0, **known)


def count(modules: Iterable[torch.nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def measure_training(
    report: Report,
    modules: list[torch.nn.Module],
    forward: Callable[[], Any],
    loss: Callable[[], torch.Tensor],
) -> None:
    """forward, train_step and full_step, in this order, so that each one's peak of memory is its own.

    modules: what is trained. train_step: loss, gradients and AdamW, in one kernel a step ("fused"). full_step: also the
    gradient clipped to norm 1 and a moving average of the parameters.
    """
    orders = report.orders
    report.add(parameters=count(modules))
    params = [p for module in modules for p in module.parameters()]

    def evaluate() -> None:
        with torch.no_grad(), precision(orders):
            forward()
        wait(orders)

    if "forward" in orders.measure:
        for module in modules:
            module.eval()
        report.measure("forward", evaluate)
    for module in modules:
        module.train()
    adam = torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    average: list[torch.Tensor] = []

    def train() -> None:
        adam.zero_grad(set_to_none=True)
        with precision(orders):
            value = loss()
        value.backward()
        if average:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - AVERAGE)
        wait(orders)

    if "train_step" in orders.measure:
        report.measure("train_step", train)
    if "full_step" in orders.measure:
        average = [p.detach().clone() for p in params]
        report.measure("full_step", train)


def compiled(module: Any, orders: argparse.Namespace) -> Any:
    """The network, where that was asked for through torch.compile, and on a GPU with channels innermost.

    Both are what diffusers' pages on speed advise. On a CPU the layout changes the step's time by a twentieth.
    """
    if not orders.compile:
        return module
    if orders.device == "cuda" and isinstance(module, torch.nn.Module):
        module.to(memory_format=torch.channels_last)
    return torch.compile(module)
