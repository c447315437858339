"""SIGTERM and SIGINT end a stage after the step under way; a second one ends the process at once."""

import os
import signal
import threading


class StopSignals:
    """While entered, `received` is the number of the first signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        # Not print: it may be what the signal interrupted.
        os.write(2, f"{signal.Signals(number).name}: saving after this step (again: stop at once)\n".encode())

    def __enter__(self) -> "StopSignals":
        # Python delivers signals to the main thread only, and only it may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
