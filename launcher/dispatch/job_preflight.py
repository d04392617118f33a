"""Look at the nodes of a Slurm job before its ranks start: a program of the job script.

``python -m launcher.dispatch.job_preflight --run-dir R --num-nodes N --ranks-per-node G`` runs on
the job's first node. It writes the names of the N nodes to use into the run directory, and ends
with status 1 when there are fewer that are good; the run directory then says which is bad and why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launcher import run_dir as rd
from launcher.dispatch.preflight import Needs, Preflight, check_allocation, needs_from_json
from launcher.dispatch.preflight_view import render_preflight
from launcher.errors import LauncherError, RunDirError
from launcher.machine_file import hosts_of_node_list
from launcher.sbatch_script import NEEDS, NODES, PREFLIGHT

_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the nodes of the job around this process, and return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    options = parser.parse_args(arguments)
    run_dir, num_nodes = options.run_dir, options.num_nodes
    # Of an earlier start of the same job.
    (run_dir / NODES).unlink(missing_ok=True)
    try:
        made = check_allocation(
            hosts_of_node_list(os.environ["SLURM_JOB_NODELIST"], where="SLURM_JOB_NODELIST"),
            _read_needs(run_dir),
            ranks_per_node=options.ranks_per_node,
            num_wanted=num_nodes,
            measure=num_nodes > 1,
        )
        rd.write_json(run_dir / PREFLIGHT, made.to_json())
        Console(width=_WIDTH, highlight=False).print(render_preflight(made))
        problem = why_not(made, num_nodes=num_nodes)
        if problem is None:
            chosen = [host.name for host in made.good[:num_nodes]]
            rd.write_text(run_dir / NODES, ",".join(chosen) + "\n")
            return 0
    except LauncherError as error:
        problem = error.problem
    rd.write_status(run_dir, "failed", reason=problem)
    sys.stderr.write(f"error: {problem}\n")
    return 1


def why_not(made: Preflight, *, num_nodes: int) -> str | None:
    """Return why a job cannot start on ``num_nodes`` of the nodes; ``None`` when it can."""
    if len(made.good) >= num_nodes:
        return made.rates_problem
    bad = [f"{node.host.name}: {node.problems[0]}" for node in made.nodes if not node.is_good]
    more = f"; and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"{len(made.good)} of {num_nodes} nodes are good; {'; '.join(bad[:4])}{more}"


def _read_needs(run_dir: Path) -> Needs:
    path = run_dir / NEEDS
    try:
        return needs_from_json(rd.read_json(path))
    except ValueError as error:
        raise RunDirError(str(error), where=str(path), fix="make the run anew") from None


if __name__ == "__main__":
    sys.exit(main())
