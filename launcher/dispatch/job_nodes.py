"""See to the nodes of a Slurm job that may go on with fewer: a program of the job script.

``python -m launcher.dispatch.job_nodes --run-dir R --step NAME`` runs on the job's first node until
it is killed. When neither the ranks of a node nor its slurmd give a sign of life, it ends the
ranks' step: Slurm itself would wait for ``SlurmdTimeout``, and the ranks for the lost one.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.slurm_nodes import SlurmNodes

TICK_SECONDS = 1.0


def watch_nodes(nodes: SlurmNodes, job_id: str) -> list[str]:
    """Return the nodes of which nothing is heard any more, when there are some."""
    while not (lost := nodes.lost):
        nodes.look(time.monotonic(), job_id)
        time.sleep(TICK_SECONDS)
    return [node.host for node in lost]


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch the nodes of the job around this process, and return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    options = parser.parse_args(arguments)
    job_id = os.environ["SLURM_JOB_ID"]
    # Whoever watches the job says the rest.
    logging.getLogger("launcher").addHandler(logging.NullHandler())
    lost = watch_nodes(SlurmNodes(run_dir=options.run_dir), job_id)
    sys.stderr.write(
        f"error: neither ranks nor slurmd are heard of on {', '.join(lost)}: ending the ranks\n"
    )
    while True:
        try:
            slurm.cancel(job_id, step_name=options.step)
        except slurm.ControllerError as error:
            sys.stderr.write(f"warning: {error}\n")
            time.sleep(TICK_SECONDS)
        else:
            return 0


if __name__ == "__main__":
    sys.exit(main())
