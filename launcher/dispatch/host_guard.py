"""The program that stands by on every host of a job: tells of ranks that end, ends those left.

``python -m launcher.dispatch.host_guard --run-id ID --run-dir DIR``, started through ssh. It
writes one JSON object a line and reads "ping", a line every few seconds, and "end". When its
input ends or stays silent, the launcher is gone or this host is cut off: it then ends the run's
processes here, and no other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.rank_watch import RankWatch

POLL_SECONDS = 0.2
ALIVE_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Stand by until told to end, or until there is nobody left to tell."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--is-master", action="store_true")
    parser.add_argument("--lost-after", type=float, required=True)
    options = parser.parse_args(arguments)
    # sshd sends it when the connection breaks, which is when there is work to do.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    problem = _look_around(options.run_dir, options.run_id)
    if problem is None and options.is_master:
        problem = describe_listener(options.master_port)
    _tell(event="hello", host=socket.gethostname(), problem=problem)
    at_once = _stand_by(options.run_id, lost_after=options.lost_after)
    is_gone = process_group.end_processes(options.run_id, at_once=at_once)
    for path in process_group.shared_memory_leftovers(master_port=options.master_port):
        path.unlink(missing_ok=True)
    left = [process.pid for process in process_group.find_processes(options.run_id)]
    _tell(event="gone", left=[] if is_gone else left)
    return 0


def describe_listener(port: int) -> str | None:
    """Return who listens on a port of this host, or ``None`` when it is free."""
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            pass
        else:
            return None
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                name = psutil.Process(connection.pid).name()
                return f"port {port} is taken by process {connection.pid} ({name})"
    return f"port {port} is taken"


def _look_around(run_dir: Path, run_id: str) -> str | None:
    try:
        script = (run_dir / rd.JOB_SCRIPT).read_text(encoding="utf-8")
    except OSError as error:
        return f"the run directory {run_dir} cannot be read there: {error.strerror}"
    if run_id not in script:
        return f"another folder is at {run_dir} there"
    return None


def _stand_by(run_id: str, *, lost_after: float) -> bool:
    """Report until it is time to end the run; return whether that must be at once."""
    ranks = RankWatch(run_id=run_id, session_id=None)
    heard = alive = time.monotonic()
    told: set[int] = set()
    try:
        while time.monotonic() - heard < lost_after:
            ranks.look()
            for rank, dead in ranks.ended.items():
                if rank not in told:
                    told.add(rank)
                    _tell(
                        event="ended",
                        rank=rank,
                        exit_status=dead.exit_status,
                        is_oom_kill=dead.is_oom_kill,
                    )
            if time.monotonic() - alive >= ALIVE_SECONDS:
                alive = time.monotonic()
                _tell(event="alive")
            if ranks.wait_for_input(POLL_SECONDS, descriptor=0):
                heard = time.monotonic()
                commands = os.read(0, 4096).split()
                if not commands or b"kill" in commands:
                    return bool(commands)
                if b"end" in commands:
                    return False
    finally:
        ranks.close()
    return True


def _tell(**event: Any) -> None:
    try:
        # In one piece, and not at all when nobody reads: never wait for the network.
        os.write(1, (json.dumps(event) + "\n").encode())
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main())
