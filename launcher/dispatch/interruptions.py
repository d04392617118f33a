"""Ctrl-C and its relatives, remembered in place of ending this process in the middle of things."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interruptions:
    """Remembers signals that ask to stop, in place of dying of them.

    Use as a context manager in the main thread, around starting and watching a job.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
    """The last one comes from a timer that a caller may have set to limit a job's time."""
    ASKING = (signal.SIGTERM, signal.SIGUSR1)
    """What schedulers, service managers and `kill` send before they use force."""

    def __init__(self, *, saves: bool = False) -> None:
        self.received: list[int] = []
        self.asking: tuple[int, ...] = self.ASKING if saves else ()
        """Signals after which the ranks may save; after any other, a run ends at once."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            # What nohup or a shell's '&' made ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
