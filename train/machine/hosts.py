"""Training in several processes, one a host or one a GPU: how they start, stay together and end together.

    python -m train configs/paper.py decoder --distributed        # on a TPU VM, under SLURM or Open MPI
    python -m train configs/paper.py decoder --coordinator 10.0.0.1:1234 --processes 2 --process 0      # and 1

The first process is the coordinator: it alone logs and writes records. When a process is lost, the others hear of it
from their connections (gloo's break at once) or by missing heartbeats, and end with one sentence: jax itself would end
them by SIGABRT, so the sentence is what a handler of that signal says.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from dalle2_jax.errors import InputError
from dalle2_jax.sharding.processes import Found

# Seconds: for all to come; without a sign of life until one counts as lost; for all to leave; for a shared disk to show
# what another host wrote.
PATIENCE, SILENCE, FAREWELL, DISK = 300, 30, 10, 10
# In what jax and orbax say when another process does not answer.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "oordination service", "oordinationService", "at barrier", "heartbeat")

AGAIN = "start the same command again on every host: it goes on from the last checkpoint"
LOST = f"another process of this run was lost, or has ended with an error of its own; {AGAIN}"


@dataclass(frozen=True)
class Cluster:
    """Where the first process listens, how many there are and which one this is; None: the environment says so."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def cluster_of(distributed: bool, coordinator: str | None, count: int | None, index: int | None) -> Cluster | None:
    """What the command line says of several processes; None for a single one.

    Raises:
        InputError: if the three flags are not there together, or do not fit each other.
    """
    flags = {"--coordinator HOST:PORT": coordinator, "--processes N": count, "--process I": index}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return Cluster() if distributed else None
    if missing:
        raise InputError(f"{', '.join(flags)} go together; {' and '.join(missing)} is missing")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator is {coordinator!r}; it must be the first process's HOST:PORT, as 10.0.0.1:1234"
        )
    if count < 1 or not 0 <= index < count:
        raise InputError(f"--process is {index} of --processes {count}; it must lie in 0 to {max(count, 1) - 1}")
    return Cluster(coordinator, count, index)


def join(cluster: Cluster) -> None:
    """Waits until every process of the run is there; before jax's backend starts.

    Raises:
        InputError: if the environment is no cluster's, or the processes' devices do not make a mesh.
    """
    explicit = cluster.coordinator is not None
    came = f"--processes {cluster.count} at {cluster.coordinator}" if explicit else "the cluster's processes"
    _last_words(f"not all of {came} came within {PATIENCE} s; start every one of them, and see that the port is open")
    # It would take SIGTERM for itself; the loop stops and saves by it (train/loop/signals.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            # A batch system's variables would leave one device to each process, also where one process has a host.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=FAREWELL,
        )
    except (ValueError, KeyError, IndexError) as error:  # what jax's detection raises where there is nothing to find
        raise InputError(
            f"--distributed finds no cluster here ({error}): on a TPU VM, under SLURM and under Open MPI it does; "
            "elsewhere give every process --coordinator HOST:PORT --processes N --process I"
        ) from error
    _last_words(LOST)
    counts = Counter(device.process_index for device in jax.devices())
    _last_words(LOST)  # again: libtpu sets handlers of its own when it starts
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {index} has {counts[index]}" for index in sorted(counts))
        raise InputError(
            f"every process must have as many devices as the others, and {found}; choose them by "
            "CUDA_VISIBLE_DEVICES, or JAX_NUM_CPU_DEVICES on CPUs"
        )
    if jax.process_index() == 0:
        print(f"{len(counts)} processes with {counts[0]} devices each", flush=True)


_handlers: list[Any] = []  # C holds their addresses, not them


def _last_words(sentence: str, code: int = 1) -> None:
    """Sets what is said on SIGABRT, which jax raises from a thread of its own, where no Python handler would run."""

    def say(_: int) -> None:
        if sentence:
            os.write(2, f"\nerror: {sentence}\n".encode())
        os._exit(code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _handlers.append(handler)


def leave(code: int) -> int:
    """Waits a moment for the others to end too, and returns `code`; where they do not, ends them and this process.

    For the end of the program. A process that has met an error of its own must not leave the others waiting for it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        _last_words("", code)
        jax.distributed.shutdown()
    return code


def watched(run: Callable[[], Found]) -> Found:
    """`run()`, but ends this process with a sentence where that fails because another one was lost."""
    try:
        return run()
    except Exception as error:
        message = lost_connection(error)
        if message is None or not jax.distributed.is_initialized():
            raise
        _end(f"{message}\nerror: {LOST}")


def fail(error: BaseException) -> None:
    """Ends this process after an error of its own that is no sentence, and the others that it has joined, if any."""
    if not jax.distributed.is_initialized():
        return
    traceback.print_exception(error)
    _end(None, leave(1))


def _end(said: str | None, code: int = 1) -> NoReturn:
    if said:
        print(said, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without jax's own farewell, for which it would wait


def lost_connection(error: BaseException | None) -> str | None:
    """The line of an error, or of one that led to it, which says that another process did not answer; None: no such."""
    while error is not None:
        line = str(error).partition("\n")[0]
        if any(word in line for word in SIGNS_OF_LOSS):
            return line
        error = error.__cause__ or error.__context__
    return None
