"""A rank without torch: behaves towards the launcher as the training worker does.

What it does is in the variable PROBE: finish, wait, raise, kill, or flood.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from launcher import run_dir as rd
from launcher.peaks import RankFailure, RankPeaks, RankState, peaks_to_json

LINE = "x" * 999 + "\n"
FLOOD_LINES = 100_000
"""100 MB from each of two ranks."""


def main() -> int:
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    rank, what = int(os.environ["RANK"]), os.environ["PROBE"]

    def write(state: RankState, failure: RankFailure | None = None) -> None:
        peaks = RankPeaks(
            rank=rank,
            local_rank=0,
            world_size=2,
            host=socket.gethostname(),
            pid=os.getpid(),
            device="cpu",
            device_name="cpu",
            state=state,
            steps_done=0,
            failure=failure,
        )
        rd.write_json(rd.rank_file(run_dir, rank), peaks_to_json(peaks))

    def until_both(state: RankState) -> None:
        while [peaks.state for peaks in rd.read_ranks(run_dir)] != [state] * 2:
            time.sleep(0.05)

    def interrupt(number: int, _frame: object) -> None:
        write("interrupted")
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, interrupt)
    write("running")
    if what == "flood":
        for _ in range(FLOOD_LINES):
            sys.stdout.write(LINE)
    if what in ("finish", "flood"):
        write("finished")
        if rank == 0:  # the last, as after a barrier
            until_both("finished")
            rd.write_status(run_dir, "finished")
        return 0
    # A child in its own session, as a data loader or a tracker may be.
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    until_both("running")
    if rank == 1 and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "raise":
        try:
            raise ValueError("deliberate")
        except ValueError as error:
            text = traceback.format_exc()
            write(
                "failed",
                RankFailure(phase="forward", type="ValueError", message=str(error), traceback=text),
            )
            return 1
    time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
