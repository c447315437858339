"""`--profile`: a trace of a few training steps, what the devices and the host did when."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_jax.errors import InputError

# After compilation, and after the first batches, which are slower.
FIRST, COUNT = 10, 6
FOLDER = "profile"


def profiled_steps(text: str) -> tuple[int, int]:
    """(first, last) of what stands after `--profile`: FIRST:LAST, a number of steps from the 10th on, or nothing.

    Steps are counted from 1 where training starts or goes on, so that a run that goes on is recorded too.

    Raises:
        InputError: for anything else, and for the first step, in which the program is compiled.
    """
    if not text:
        return FIRST, FIRST + COUNT - 1
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if found is None:
        raise InputError(f"--profile takes steps as FIRST:LAST or their number, not {text!r}; write --profile=10:15")
    number = int(found[2])
    first, last = (FIRST, FIRST + number - 1) if found[1] is None else (int(found[1]), number)
    if first < 2 or last < first:
        raise InputError(
            f"--profile {text}: the first step must be 2 or more (step 1 compiles) and the last not before it"
        )
    return first, last


class Profile:
    """Records the steps `steps` = (first, last) into `directory`; a context manager, whose end ends the recording.

    None records nothing. A training that ends before the last step leaves a trace of the steps there were.
    """

    def __init__(self, name: str, steps: tuple[int, int] | None, directory: Path, log: Callable[[str], None]):
        self.name, self.steps, self.directory, self.log = name, steps, directory, log
        self._running, self._seen = False, 0

    def step(self, number: int, before: Any) -> contextlib.AbstractContextManager:
        """What to dispatch step `number` in; the recording starts when the work `before` the first one is done."""
        import jax

        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            return contextlib.nullcontext()
        if not self._running:
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would slow the steps and crowd out the devices' work
            jax.profiler.start_trace(self.directory, create_perfetto_trace=True, profiler_options=options)
            self._running = True
        self._seen = number
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def ends(self, number: int) -> bool:
        """Whether `stop` is due after step `number`."""
        return self._running and number >= self.steps[1]

    def stop(self) -> None:
        """Ends the recording, of work that is done; writes it and says where."""
        import jax

        self._running = False
        jax.profiler.stop_trace()
        file = max(self.directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self.log(
            f"{self.name}: steps {self.steps[0]} to {self._seen} of this start are recorded; to see them open {file} "
            f"in Perfetto, or run: tensorboard --logdir {self.directory} (its profile plugin: pip install xprof)"
        )

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._running:
            self.stop()
        elif self.steps is not None and not self._seen and kind is None:
            self.log(f"{self.name}: nothing is recorded, training ended before step {self.steps[0]} of this start")
