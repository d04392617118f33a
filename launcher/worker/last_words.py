"""What a rank does last when an error ends it: say why, in its file and once in the log."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import run_dir
from launcher.errors import LauncherError
from launcher.failure_kind import FailureKind
from launcher.redact import redacted
from launcher.stop_file import clear_stop
from launcher.worker.checkpoints import storage_failure
from launcher.worker.ranks import Ranks

if TYPE_CHECKING:
    from launcher.worker.peak_memory import PeakRecorder


def report_failure(
    error: BaseException, ranks: Ranks, recorder: PeakRecorder | None, *, folder: Path
) -> FailureKind:
    """Write down and print why this rank ends; return what it means for the run.

    Args:
        error: what ended it.
        ranks: which rank this is.
        recorder: what it measured; ``None`` when it had not begun.
        folder: the run directory.
    """
    error = storage_failure(error, folder) or error
    kind = error.kind if isinstance(error, LauncherError) else FailureKind.other
    # The others may be told to end now; they must not take it for the request to save.
    with contextlib.suppress(OSError):
        clear_stop(folder)
    if recorder is not None:
        from launcher.worker.failures import failure_kind

        kind = failure_kind(error)
        if kind in (FailureKind.gpu_oom, FailureKind.host_oom):
            from launcher.worker.post_mortem import keep_post_mortem

            # Before anything else: the error's frames still hold the tensors.
            keep_post_mortem(error, kind, recorder, folder=folder)
        with contextlib.suppress(OSError):  # a full disk must not hide the reason
            recorder.fail(error)
        # The launcher says it too, in the end; nobody else does when job.sh is started by hand.
        with contextlib.suppress(OSError):
            said = f"rank {ranks.rank}: {type(error).__name__}: {error}".splitlines()[0]
            run_dir.write_status(folder, "failed", reason=redacted(said))
    if not _is_first_of_its_kind(error, folder):
        text = f"the same as on the rank above: {type(error).__name__}: {error}".splitlines()[0]
    elif isinstance(error, LauncherError):
        text = f"error: {error}"
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    prefix = f"[rank {ranks.rank}] "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in redacted(text).splitlines()))
    sys.stderr.flush()
    return kind


def _is_first_of_its_kind(error: BaseException, folder: Path) -> bool:
    """Return whether no rank of this launcher has yet failed at the same place.

    What every rank runs into is shown once, not once a rank: the first one leaves a mark.
    """
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    kind = f"{type(error).__name__} {frames}".encode()
    # The parent tells this attempt from an earlier one in the same run directory.
    name = f".shown-{os.getppid()}-{hashlib.sha256(kind).hexdigest()[:16]}"
    try:
        (folder / run_dir.RANKS / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # a full disk, or no run directory: better twice than never
    return True
