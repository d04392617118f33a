"""From a signal to the end of a run: ranks that have trained are asked to save first."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from launcher import run_dir as rd
from launcher.checkpoint_time import PATIENCE_FACTOR, save_seconds
from launcher.dispatch.interruptions import Interruptions
from launcher.errors import LauncherError, RunDirError
from launcher.recipe import parse_recipe
from launcher.stop_file import ask_to_stop

_log = logging.getLogger(__name__)

SHORTEST_GRACE_SECONDS = 60.0
"""Given in any case, however short the predicted time of a save is."""


@dataclass(kw_only=True)
class Stopping:
    """Decides when a run that was told to stop has to be ended."""

    run_dir: Path
    interruptions: Interruptions
    started: float
    """Wall clock; files of ranks that are older belong to an earlier attempt."""
    _deadline: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the ranks were asked to save."""
        return self._deadline is not None

    def is_time_to_end(self) -> bool:
        """Return whether to end the ranks now; asks them to save when that comes first."""
        if (self.run_dir / rd.CANCEL).exists():
            return True
        received = self.interruptions.received
        if not received:
            return False
        if received[0] not in self.interruptions.asking or len(received) > 1:
            return True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._ask(signal.Signals(received[0]).name)
        return time.monotonic() > self._deadline

    def _ask(self, name: str) -> float:
        """Ask the ranks to save, and return for how many seconds they may take to do so."""
        if not has_trained(self.run_dir, since=self.started):
            _log.warning("%s: no step was made since the last checkpoint; ending the run", name)
            return 0.0
        grace = grace_seconds(self.run_dir)
        try:
            ask_to_stop(self.run_dir, name)
        except OSError as error:
            _log.error("%s: cannot ask the ranks to save (%s); ending the run", name, error)
            return 0.0
        _log.warning(
            "%s: the ranks save a checkpoint after this step and end, within %.0f s; "
            "a second signal ends them at once",
            name,
            grace,
        )
        return grace


def has_trained(run_dir: Path, *, since: float) -> bool:
    """Return whether ranks of this attempt have come to train, so that a save would keep work.

    Rank 0 writes its file whenever a phase begins for the first time; ``forward`` stands there
    as soon as the first one has ended.
    """
    path = rd.rank_file(run_dir, 0)
    try:
        return path.stat().st_mtime >= since - 1 and "forward" in rd.read_rank(path).phases
    except (OSError, RunDirError):
        return False


def grace_seconds(run_dir: Path) -> float:
    """Return how long ranks may take to end their step and save, by the recipe or the plan."""
    path = run_dir / rd.RECIPE
    try:
        set_seconds = parse_recipe(rd.read_text(path), source=str(path)).recovery.save_grace_seconds
        if set_seconds is not None:
            return set_seconds
        plan = rd.read_json(run_dir / rd.PLAN)
        predicted = save_seconds(
            plan["checkpoint"]["write_seconds"], step_seconds=plan["time"]["step_seconds"]
        )
    except (LauncherError, KeyError, TypeError) as error:
        # Now is not the time to refuse a file: the ranks have read theirs.
        _log.warning("the time to save is not known (%s): %.0f s", error, SHORTEST_GRACE_SECONDS)
        return SHORTEST_GRACE_SECONDS
    return max(SHORTEST_GRACE_SECONDS, PATIENCE_FACTOR * predicted)
