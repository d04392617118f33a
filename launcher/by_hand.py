"""What ``bash job.sh`` does when nobody watches it: it watches the script that it was started by.

``python -m launcher.by_hand --run-dir DIR --run-id ID --master-port PORT`` runs the files as they
are, also when they were changed by hand. It starts no other plan when the run fails.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch.base import run_to_end
from launcher.dispatch.deepspeed import HostfileBackend, read_hostfile
from launcher.dispatch.local import LocalBackend
from launcher.dispatch.run_lock import hold
from launcher.errors import LauncherError
from launcher.job_script import JOB_SCRIPT, RUN_ID_VARIABLE, JobRequest, launcher_mark
from launcher.resume import check_has_stopped, set_aside
from launcher.run_checkpoints import UNFINISHED

_AS_THEY_ARE = (
    rd.STATUS, rd.RECIPE, rd.PLAN, rd.DS_CONFIG, rd.ENVIRONMENT, rd.JOB_SCRIPT, rd.HOSTFILE,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run job.sh to its end and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.by_hand", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--on-hosts", action="store_true", help="those of the hostfile")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        _run(options.run_dir, options.run_id, options.master_port, on_hosts=options.on_hosts)
    except LauncherError as error:
        if not error.is_shown:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _run(run_dir: Path, run_id: str, master_port: int, *, on_hosts: bool) -> None:
    if rd.read_status(run_dir).state == "finished":
        sys.stdout.write(f"{run_dir}: this run has finished; there is nothing to do\n")
        return
    backend = LocalBackend(master_port=master_port, num_cores=1, run_id=run_id)
    mark = run_id
    if on_hosts:
        hosts = read_hostfile(run_dir / rd.HOSTFILE)
        backend = HostfileBackend(master_port=master_port, num_cores=1, run_id=run_id, hosts=hosts)
        mark = launcher_mark(run_id)
    request = JobRequest(files={}, argv=("bash", JOB_SCRIPT), env={RUN_ID_VARIABLE: mark})
    with hold(run_dir):
        check_has_stopped(run_dir)
        if any((run_dir / rd.RANKS).iterdir()):
            shutil.rmtree(run_dir / rd.CHECKPOINTS / UNFINISHED, ignore_errors=True)
            set_aside(run_dir, kept=_AS_THEY_ARE)
        run_to_end(backend, request, run_dir=run_dir, console=sys.stdout.buffer)


if __name__ == "__main__":
    raise SystemExit(main())
