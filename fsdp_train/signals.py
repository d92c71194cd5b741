"""Being told to end, or to save, by a signal: after the step that is being done, on all processes alike."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Self


class Stopped(RuntimeError):
    """A signal asked for an end, after a checkpoint; `signal` is its number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.signal = number


class Signals:
    """SIGTERM and SIGINT ask for a checkpoint and the end, SIGUSR1 for a checkpoint. Outside `with` they mean what
    they always do.

    `stop` is the number of the signal that asked for the end, or zero.
    """

    def __init__(self, failed: Callable[[], bool]) -> None:
        """Args: whether the checkpoint in flight has failed, which asks for one, too: so all processes find out."""
        self._failed = failed
        self.stop, self._save = 0, False

    def take(self) -> list[int]:
        """What this process was told since the last step, to be summed over all of them: (end, checkpoint)."""
        save, self._save = self._save or self._failed(), False
        return [self.stop, save]

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._note) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self._save = True
        else:
            self.stop = number
