"""How the worker's programs begin and end: quiet libraries, messages on stderr, quick imports."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO

from launcher.redact import StreamRedactor, has_secrets, redacted

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

QUIET_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_DISABLE_CONFIG_PRINT": "1",
        # Nobody is told that someone trains.
        "DO_NOT_TRACK": "1",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
)
"""Read by libraries when they are imported; what the user has set stays."""


def begin_program() -> None:
    """Prepare a program of one process, before it imports the training stack.

    Its messages go to stderr; SIGTERM ends it as an exception does, so that temporary folders
    are removed.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TQDM_DISABLE", "1")
    # None of these programs computes with DeepSpeed, which else warns that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hide_secrets()
    quiet_libraries(logging.INFO)
    signal.signal(signal.SIGTERM, _leave)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end this process with its status, without freeing its memory piece by piece.

    What is registered with ``atexit`` from now on runs as always, and threads are waited for. What
    is left out is Python's walk through all objects of the training stack, 1.2 s of a processor;
    the system takes the memory back at once. What open files still buffer is lost: close them. Call
    it before anything else is imported. Where ``main`` raises, the end is Python's own.
    """
    statuses: list[int] = []

    def leave_now() -> None:
        if statuses:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(statuses[0])

    # The first that is registered runs last.
    atexit.register(leave_now)
    # Nothing of an import is garbage: looking for it takes a quarter of the time of all imports.
    gc.disable()
    try:
        statuses.append(main())
    except BaseException:
        # Compiled modules would name on stderr all that the frozen imports keep.
        gc.unfreeze()
        raise
    raise SystemExit(statuses[0])


def collect_garbage_from_now_on() -> None:
    """Look for garbage again, but never again among the half a million objects of the imports.

    For a program to call when it has imported what it needs. Each look at all of them would stop
    a rank for 0.3 s, and with it all ranks.
    """
    gc.freeze()
    gc.enable()


def hide_secrets() -> None:
    """Let no token or key of the environment be printed from now on, whoever prints it in Python.

    For a program to call once: what a rank prints stays in a file.
    """
    if has_secrets():
        sys.stdout = _without_secrets(sys.stdout)
        sys.stderr = _without_secrets(sys.stderr)


def _without_secrets(stream: TextIO) -> TextIO:
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    return io.TextIOWrapper(
        _Filter(stream.buffer),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Filter(io.BufferedIOBase):
    """Writes to another stream, without secrets."""

    name = "without secrets"

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._redactor = StreamRedactor()
        # A signal's handler may print while its thread does.
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._target.fileno()

    def isatty(self) -> bool:
        return self._target.isatty()

    def write(self, data: Buffer) -> int:
        content = bytes(data)
        with self._lock:
            self._target.write(self._redactor.feed(content))
        return len(content)

    def flush(self) -> None:
        with self._lock:
            self._target.write(self._redactor.rest())
            self._target.flush()


def quiet_libraries(own_level: int) -> None:
    """Log our own messages from ``own_level`` on, and of libraries only errors."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[shown])
    logging.getLogger("launcher").setLevel(own_level)
    # Warnings of libraries about each other; nothing in them is the user's to mend.
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class _WithoutSecrets(logging.Formatter):
    """Log neither tokens nor keys, also where a library's error quotes them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
