"""What the worker's programs begin with: quiet libraries, messages on stderr, a clean end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from types import FrameType, MappingProxyType

from launcher.redact import redacted

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
    quiet_libraries(logging.INFO)
    signal.signal(signal.SIGTERM, _leave)


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
