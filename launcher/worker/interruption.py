"""Act on SIGTERM and SIGINT at once, also while the main thread waits for other ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


_STOP_REQUESTED = threading.Event()  # of the whole process, as signals are


def listen_for_stop() -> None:
    """Remember SIGUSR1 in place of dying of it; call it before the slow imports."""
    signal.signal(signal.SIGUSR1, lambda _number, _frame: _STOP_REQUESTED.set())


def stop_was_requested() -> bool:
    """Return whether SIGUSR1 has come: save what there is and end soon."""
    return _STOP_REQUESTED.is_set()


def exit_on_signal(last_act: Callable[[], None], *, is_stopping: Callable[[], bool]) -> None:
    """End the process on a signal, after ``last_act``, with status 128 + the signal's number.

    SIGTERM is left alone while the run is being stopped with a checkpoint: whoever sends it to
    all processes at once (a service manager, for example) has asked for just that, and sends
    SIGKILL to those that take too long.

    Python runs a signal's handler only between two bytecodes of the main thread, and a rank
    whose peer died waits inside a collective for many minutes. The interpreter writes the
    signal's number to a socket at once, whatever the main thread does; a thread waits there.

    Args:
        last_act: runs in that thread; the main thread may still be working.
        is_stopping: whether the ranks were asked to save and end; asked in that thread.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)  # noqa: FBT003 - positional-only
    for number in SIGNALS:
        # Some handler must exist, or the signal ends the process before anything is written.
        signal.signal(number, _leave_it_to_the_thread)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    # The thread holds the writing end open, which nothing else refers to.
    def wait(_writing: socket.socket) -> None:
        while True:
            number = reading.recv(1)[0]
            if number in SIGNALS and not (number == signal.SIGTERM and is_stopping()):
                break
        try:
            last_act()
        finally:
            # Not sys.exit: the main thread may never come back from its collective.
            os._exit(128 + number)

    threading.Thread(target=wait, args=(writing,), name="signals", daemon=True).start()


def _leave_it_to_the_thread(_number: int, _frame: object) -> None:
    return
